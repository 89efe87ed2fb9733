"""Is one pass faster than N? The same conversations forward and backward, in several ways, in turn.

    single_pass      one tree a conversation
    per_turn_packed  one sequence a turn, packed without padding, plain causal attention per sequence, by the fastest
                     kernel there is: the fair baseline
    per_turn_padded  one sequence a turn, rows padded to the longest of their batch, the model's own attention

The bound is arithmetic: `limit.tokens` is the ratio of tokens, `limit.flops` that of all the work that is needed, and
`figure_of_merit` the share of it that the speed-up over the faster baseline reaches.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtr.attention.choice import activate_flash_attention, choose_backends, fastest, pad_to_multiple_of, usable_backends
from mtr.attention.interface import use_own_attention, use_tree_attention
from mtr.attention.masks import Backend
from mtr.attention.model_parts import base_model, decoder, text_config
from mtr.bench.synthetic import Shape, make_views
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.verify import first_views, without_dropout
from mtr.errors import UserError
from mtr.model.device import peak_memory, pick_device, reset_peak_memory
from mtr.model.flops import FlopCounter, device_matrix_rate
from mtr.model.kernels import compile_layers, use_liger_kernel
from mtr.model.loading import load_model
from mtr.model.loss import weighted_nll
from mtr.model.memory import checkpoint_activations, choose_checkpointing
from mtr.model.tree_model import OutputHead, TreeModel
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Recipe
from mtr.training.environment import environment
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout, View
from mtr.tree.packing import build_packs, merge_conversations


@dataclass(frozen=True)
class Options:
    """Which cases, and of which model; the recipe says the rest."""

    attention: tuple[str, ...] = ()
    """Backends in place of the recipe's: the first for the first cases, the others as further cases."""
    all_backends: bool = False
    random_weights: bool = False
    padded: bool = True
    """False leaves the padded baseline out."""
    versus_trl: bool = False


@dataclass(frozen=True)
class Case:
    """One way to do the same work."""

    strategy: str
    attention: str
    num_tokens: int
    """Positions that the device computes, padding included."""
    flops: float
    """That are needed: padding and recomputation left out."""
    run: Callable[[], float]
    """Forward and backward of everything; returns sum(weight * nll)."""


@dataclass
class Timing:
    """What was measured of a case. `error` where it ran out of memory."""

    seconds: list[float]
    memory: int = 0
    loss: float = 0.0
    error: str | None = None


def bench(recipe: Recipe, conversations: int = 8, repeats: int = 5, options: Options | None = None) -> dict[str, Any]:
    """Time the cases on the first conversations of `data.train`.

    Returns:
        What `mtr bench --json` prints.
    """
    recipe = without_dropout(recipe)
    renderer = load_renderer(recipe, load_tokenizer(recipe))
    views = first_views(recipe, Builder(recipe, renderer), conversations)
    own = Bench(recipe, repeats, options or Options())
    return {**own.about, **own.measure(views, renderer.pad_id)}


def sweep(
    recipe: Recipe,
    shapes: Sequence[Shape],
    conversations: int = 1,
    repeats: int = 5,
    options: Options | None = None,
) -> dict[str, Any]:
    """Time the cases on synthetic conversations of each shape, with the recipe's model.

    Returns:
        What `mtr bench --sweep --json` prints: as of `bench`, with `points` for the shapes.
    """
    longest = max(shape.longest for shape in shapes)
    longest = max(longest, recipe.sequence.max_length)
    recipe = without_dropout(recipe).replace(
        sequence={"max_length": longest, "max_tokens": max(longest, recipe.sequence.budget)}
    )
    own = Bench(recipe, repeats, options or Options())
    points = []
    for number, shape in enumerate(shapes):
        print(f"shape {number + 1} of {len(shapes)}: {shape}", file=sys.stderr)
        measured = own.measure(make_views(shape, conversations, own.vocabulary), pad_id=0)
        points.append({**vars(shape), **measured})
    return {**own.about, "points": points}


class Bench:
    """A model on its device, and the ways to take conversations through it."""

    def __init__(self, recipe: Recipe, repeats: int, options: Options) -> None:
        self.recipe, self.repeats, self.options = recipe, repeats, options
        self.device = pick_device()
        if options.versus_trl:
            from mtr.bench.peers import check_trl

            check_trl()
        self.model = load_model(recipe, self.device, random_weights=options.random_weights)
        training = recipe.training
        if training.use_liger_kernel:
            use_liger_kernel(self.model, self.device)
        if training.torch_compile:
            compile_layers(self.model)
        use_tree_attention(self.model)
        self.model.train()
        config = text_config(base_model(self.model).config)
        self.vocabulary = int(config.vocab_size)
        self.usable = usable_backends(config, self.device, self.model.dtype)
        names = options.attention or (recipe.model.attention,)
        self.asked = [choose_backends(name, config, self.device, self.model.dtype) for name in names]
        """The candidates of each name; the fastest of them is used."""
        if "varlen" in self.usable:
            activate_flash_attention()
        kept = training.checkpointing
        if kept == "auto":
            tree_model = TreeModel(self.model, *self.asked[0], choose=fastest)
            kept = choose_checkpointing(tree_model, self.device, recipe.sequence.budget)
        else:
            checkpoint_activations(self.model, kept)
        self.counter = FlopCounter(self.model)
        self.matrix = device_matrix_rate(self.device, self.model.dtype)
        described = environment(recipe.training.seed, self.device, 1, recipe.date or "")
        self.about = {
            "device": described["device"],
            "model": {
                "name_or_path": recipe.model.name_or_path,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "random_weights": options.random_weights,
            },
            "gradient_checkpointing": kept,
            "torch_compile": training.torch_compile,
            "use_liger_kernel": training.use_liger_kernel,
            "matrix_rate": self.matrix,
            "environment": described,
        }

    def measure(self, views: list[list[View]], pad_id: int) -> dict[str, Any]:
        """All cases on the same conversations."""
        budget = self.recipe.sequence.budget
        merge = self.recipe.sequence.merge
        single = merge_conversations(views, "single_pass", merge, budget)
        per_turn = merge_conversations(views, "per_turn", merge, budget)
        cases = [
            self._fastest("single_pass", single, self.asked[0]),
            self._fastest("per_turn_packed", per_turn, self.usable),
        ]
        if self.options.padded:
            cases.append(self._padded([view for group in views for view in group], per_turn, pad_id))
        further = dict.fromkeys(name for names in self.asked[1:] for name in names)
        further |= dict.fromkeys(self.usable if self.options.all_backends else [])
        for strategy, layouts, first in (("single_pass", single, cases[0]), ("per_turn_packed", per_turn, cases[1])):
            cases += [self._packed(strategy, layouts, name) for name in further if name != first.attention]
        timings = self._time(cases)
        for case, timing in zip(cases[:2], timings[:2], strict=True):
            if timing.error:
                raise UserError(
                    f"{case.strategy} ({case.attention}): {timing.error}; lower sequence.max_tokens, or turn on "
                    "training.gradient_checkpointing"
                )
        result = self._result(views, cases, timings)
        result["shape"] |= {"trees": len(single), "merge": merge}
        result["limit"] = {
            "tokens": cases[1].num_tokens / cases[0].num_tokens,
            "flops": cases[1].flops / cases[0].flops,
        }
        result["figure_of_merit"] = min(result["speedup"].values()) / result["limit"]["flops"]
        if self.options.versus_trl:
            from mtr.bench.peers import time_trl

            weight_sum = sum(float(view.weights.sum()) for group in views for view in group)
            own = {"seconds": result["cases"][0]["seconds"]["median"], "loss": timings[0].loss / weight_sum}
            result["trl"] = time_trl(self.model, self.recipe, views, self.device, self.repeats, own)
        return result

    def _fastest(self, strategy: str, layouts: list[Layout], candidates: Sequence[Backend]) -> Case:
        """By a single try of each candidate, after a first that compiles."""
        cases = [self._packed(strategy, layouts, backend) for backend in candidates]
        if len(cases) == 1:
            return cases[0]
        tried = [min(timing.seconds, default=float("inf")) for timing in self._time(cases, repeats=1)]
        return cases[tried.index(min(tried))]

    def _time(self, cases: Sequence[Case], repeats: int | None = None) -> list[Timing]:
        """The cases take turns. A warm-up of each, not timed, is where its memory is measured."""
        timings = [Timing([]) for _ in cases]
        for repeat in range((repeats or self.repeats) + 1):
            for case, timing in zip(cases, timings, strict=True):
                if timing.error:
                    continue
                (use_own_attention if case.strategy == "per_turn_padded" else use_tree_attention)(self.model)
                self.model.zero_grad(set_to_none=True)
                if repeat == 0:
                    reset_peak_memory(self.device)
                wait(self.device)
                began = time.perf_counter()
                try:
                    timing.loss = case.run()
                    wait(self.device)
                except torch.cuda.OutOfMemoryError as error:
                    timing.error = f"out of memory: {str(error).splitlines()[0]}"
                    continue
                if repeat == 0:
                    timing.memory = peak_memory(self.device)
                else:
                    timing.seconds.append(time.perf_counter() - began)
            if any(timing.error for timing in timings):
                torch.cuda.empty_cache()
        return timings

    def _result(self, views: list[list[View]], cases: Sequence[Case], timings: Sequence[Timing]) -> dict[str, Any]:
        weight_sum = sum(float(view.weights.sum()) for group in views for view in group)
        supervised = sum(len(view.completion_ids) for group in views for view in group)
        per_turn_tokens = sum(view.num_tokens for group in views for view in group)
        results = []
        for case, timing in zip(cases, timings, strict=True):
            result: dict[str, Any] = {"strategy": case.strategy, "attention": case.attention}
            result |= {"num_tokens": case.num_tokens, "flops": case.flops}
            if timing.error:
                results.append(result | {"error": timing.error})
                continue
            median = statistics.median(timing.seconds)
            results.append(
                result
                | {
                    "seconds": {"min": min(timing.seconds), "median": median, "max": max(timing.seconds)},
                    "conversations_per_second": len(views) / median,
                    "tokens_per_second": case.num_tokens / median,
                    "supervised_tokens_per_second": supervised / median,
                    "per_turn_equivalent_tokens_per_second": per_turn_tokens / median,
                    "flops_per_second": case.flops / median,
                    "mfu": case.flops / median / self.matrix["flops_per_second"],
                    "peak_memory_bytes": timing.memory,
                    "loss": timing.loss / weight_sum,
                }
            )
        losses = [result["loss"] for result in results if "loss" in result]
        one = results[0]["seconds"]["median"]
        baselines = {
            f"vs_{c['strategy']}": c["seconds"]["median"] / one
            for c in results[1 : 2 + self.options.padded]
            if "seconds" in c
        }
        return {
            "shape": {
                "conversations": len(views),
                "turns": sum(map(len, views)),
                "num_tokens": {case.strategy: case.num_tokens for case in cases[: 2 + self.options.padded]},
                "num_supervised_tokens": supervised,
            },
            "repeats": self.repeats,
            "cases": results,
            "speedup": baselines,
            "max_relative_loss_difference": (max(losses) - min(losses)) / abs(results[1]["loss"]),
        }

    def _packed(self, strategy: str, layouts: list[Layout], backend: Backend) -> Case:
        tree_model = TreeModel(self.model, backend)
        packs = build_packs(layouts, self.recipe.sequence.budget)[0]
        batches: list[Batch] = [build_batch(pack, pad_to_multiple_of([backend])).to(self.device) for pack in packs]

        def run() -> float:
            return total(loss for loss in (tree_model(batch) for batch in batches))

        tokens = sum(batch.input_ids.shape[1] for batch in batches)
        return Case(strategy, backend, tokens, self.counter.of_layouts(layouts), run)

    def _padded(self, views: list[View], per_turn: list[Layout], pad_id: int) -> Case:
        batches = [_pad(group, self.device, pad_id) for group in _rows(views, self.recipe.sequence.budget)]
        head = OutputHead(base_model(self.model))

        def loss(batch: _Padded) -> Tensor:
            hidden = decoder(self.model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            at = hidden.flatten(0, 1)[batch.predictor]
            return weighted_nll(at, head, head.trainable(), batch.target_id, batch.weight, head.chunk)

        def run() -> float:
            return total(loss(batch) for batch in batches)

        attention = "sdpa" if base_model(self.model)._supports_sdpa else "eager"
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return Case("per_turn_padded", attention, tokens, self.counter.of_layouts(per_turn), run)


def total(losses: Iterator[Tensor]) -> float:
    """Each loss backward as it comes; the device is asked for the sum once, at the end."""
    summed: Tensor | None = None
    for loss in losses:
        torch.autograd.backward(loss)
        summed = loss.detach() if summed is None else summed + loss.detach()
    return 0.0 if summed is None else float(summed)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Padded:
    """R rows padded to T tokens, N targets."""

    input_ids: Tensor
    """[R, T]"""
    attention_mask: Tensor
    """[R, T]"""
    predictor: Tensor
    """[N] into the flattened rows"""
    target_id: Tensor
    weight: Tensor


def _rows(views: list[View], budget: int) -> list[list[View]]:
    """Views in their order, as many in a batch as fit the budget when padded to the longest of them."""
    groups: list[list[View]] = []
    for view in views:
        longest = max([view.num_tokens, *(other.num_tokens for other in (groups[-1] if groups else []))])
        if not groups or longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(view)
    return groups


def _pad(views: list[View], device: torch.device, pad_id: int) -> _Padded:
    longest = max(view.num_tokens for view in views)
    ids = np.full((len(views), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    predictor = []
    for row, view in enumerate(views):
        ids[row, : view.num_tokens] = view.ids
        mask[row, : view.num_tokens] = 1
        first = row * longest + len(view.prompt_ids) - 1
        predictor.append(np.arange(first, first + len(view.completion_ids)))
    arrays = (
        ids,
        mask,
        np.concatenate(predictor),
        np.concatenate([view.completion_ids for view in views]),
        np.concatenate([view.weights for view in views]),
    )
    return _Padded(*(torch.from_numpy(array).to(device) for array in arrays))


def shapes_of(turns: Sequence[int], thinking: Sequence[int], user: int, response: int) -> list[Shape]:
    """Every number of turns with every length of thinking."""
    return [Shape(n, user, length, response) for length, n in itertools.product(thinking, turns)]
