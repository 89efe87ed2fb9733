"""Is one pass faster than N? The same conversations forward and backward, three ways, in turn.

    single_pass      one tree a conversation
    per_turn_packed  one sequence a turn, packed without padding, plain causal attention per sequence: the fair baseline
    per_turn_padded  one sequence a turn, rows padded to the longest of their batch, the model's own attention

The bound is arithmetic: `limit.tokens` is the ratio of tokens, `limit.flops` that of all the work that is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtr.backend import choose_backends, pad_to_multiple_of
from mtr.batch import Batch, build_batch
from mtr.device import peak_memory, pick_device, reset_peak_memory
from mtr.flops import count_flops
from mtr.layout import Layout, View
from mtr.loss import weighted_nll
from mtr.memory import checkpoint_activations
from mtr.metrics import environment
from mtr.model import (
    OutputHead,
    TreeModel,
    base_model,
    decoder,
    load_model,
    load_renderer,
    load_tokenizer,
    text_config,
    use_own_attention,
    use_tree_attention,
)
from mtr.packing import build_packs, merge_conversations
from mtr.recipe import Recipe
from mtr.steps import Builder
from mtr.verify import first_views, without_dropout


@dataclass(frozen=True)
class Case:
    """One way to do the same work."""

    strategy: str
    attention: str
    num_tokens: int
    """Positions that the device computes, padding included."""
    run: Callable[[], float]
    """Forward and backward of everything; returns sum(weight * nll)."""


def bench(recipe: Recipe, conversations: int = 8, repeats: int = 5) -> dict[str, Any]:
    """Time the cases on the first conversations of `data.train`.

    Returns:
        What `mtr bench --json` prints.
    """
    device = pick_device()
    recipe = without_dropout(recipe)
    renderer = load_renderer(recipe, load_tokenizer(recipe))
    views = first_views(recipe, Builder(recipe, renderer), conversations)
    model = load_model(recipe, device)
    checkpoint_activations(model, recipe.training.checkpointing)
    model.train()
    budget = recipe.sequence.budget
    merge = recipe.sequence.merge
    single = merge_conversations(views, "single_pass", merge, budget)
    per_turn = merge_conversations(views, "per_turn", merge, budget)
    cases = [
        _packed_case("single_pass", model, recipe, single, device),
        _packed_case("per_turn_packed", model, recipe, per_turn, device),
        _padded_case(model, [view for group in views for view in group], budget, device, renderer.pad_id),
    ]
    measured = _measure(cases, model, repeats, device)
    weight_sum = sum(float(view.weights.sum()) for group in views for view in group)
    supervised = sum(len(view.completion_ids) for group in views for view in group)
    results: list[dict[str, Any]] = []
    for case, (seconds, memory, loss) in zip(cases, measured, strict=True):
        median = statistics.median(seconds)
        results.append(
            {
                "strategy": case.strategy,
                "attention": case.attention,
                "seconds": {"min": min(seconds), "median": median, "max": max(seconds)},
                "conversations_per_second": len(views) / median,
                "tokens_per_second": case.num_tokens / median,
                "supervised_tokens_per_second": supervised / median,
                "peak_memory_bytes": memory,
                "loss": loss / weight_sum,
            }
        )
    single_pass, packed, padded = (result["seconds"]["median"] for result in results)
    losses = [result["loss"] for result in results]
    described = environment(recipe.training.seed, device, 1, renderer.day.isoformat())
    return {
        "device": described["device"],
        "shape": {
            "conversations": len(views),
            "turns": sum(map(len, views)),
            "merge": merge,
            "num_tokens": {case.strategy: case.num_tokens for case in cases},
            "num_supervised_tokens": supervised,
        },
        "repeats": repeats,
        "cases": results,
        "speedup": {"vs_per_turn_packed": packed / single_pass, "vs_per_turn_padded": padded / single_pass},
        "limit": {
            "tokens": cases[1].num_tokens / cases[0].num_tokens,
            "flops": count_flops(model, per_turn) / count_flops(model, single),
        },
        "max_relative_loss_difference": (max(losses) - min(losses)) / abs(losses[1]),
        "environment": described,
    }


def _measure(
    cases: Sequence[Case], model: Any, repeats: int, device: torch.device
) -> list[tuple[list[float], int, float]]:
    """Seconds of each repeat, peak memory and loss of each case.

    The cases take turns. A warm-up of each, not timed, is where its memory is measured.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    memory, losses = [0] * len(cases), [0.0] * len(cases)
    for repeat in range(repeats + 1):
        for i, case in enumerate(cases):
            (use_own_attention if case.strategy == "per_turn_padded" else use_tree_attention)(model)
            model.zero_grad(set_to_none=True)
            if repeat == 0:
                reset_peak_memory(device)
            _wait(device)
            began = time.perf_counter()
            losses[i] = case.run()
            _wait(device)
            if repeat == 0:
                memory[i] = peak_memory(device)
            else:
                seconds[i].append(time.perf_counter() - began)
    return list(zip(seconds, memory, losses, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _packed_case(strategy: str, model: Any, recipe: Recipe, layouts: list[Layout], device: torch.device) -> Case:
    config = text_config(base_model(model).config)
    (backend, *_) = choose_backends(recipe.model.attention, config, device, model.dtype)
    tree_model = TreeModel(model, backend)
    packs = build_packs(layouts, recipe.sequence.budget)[0]
    batches: list[Batch] = [build_batch(pack, pad_to_multiple_of([backend])).to(device) for pack in packs]

    def run() -> float:
        return sum(_backward(tree_model(batch)) for batch in batches)

    return Case(strategy, backend, sum(batch.input_ids.shape[1] for batch in batches), run)


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


def _padded_case(model: Any, views: list[View], budget: int, device: torch.device, pad_id: int) -> Case:
    groups: list[list[View]] = []
    for view in views:
        longest = max([view.num_tokens, *(other.num_tokens for other in (groups[-1] if groups else []))])
        if not groups or longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(view)
    batches = [_pad(group, device, pad_id) for group in groups]
    head = OutputHead(base_model(model))

    def run() -> float:
        total = 0.0
        for batch in batches:
            hidden = decoder(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            at = hidden.flatten(0, 1)[batch.predictor]
            total += _backward(weighted_nll(at, head, head.trainable(), batch.target_id, batch.weight, head.chunk))
        return total

    attention = "sdpa" if base_model(model)._supports_sdpa else "eager"
    return Case("per_turn_padded", attention, sum(batch.input_ids.numel() for batch in batches), run)


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


def _backward(loss: Tensor) -> float:
    torch.autograd.backward(loss)
    return float(loss.detach())


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the median times, and the limit drawn in."""
    import matplotlib.figure as figure

    cases = result["cases"]
    packed = cases[1]["seconds"]["median"]
    bound = packed / result["limit"]["flops"]
    drawing = figure.Figure(figsize=(7, 3.2), layout="constrained")
    axes = drawing.add_subplot()
    names = [f"{case['strategy']}\n({case['attention']})" for case in cases]
    medians = [case["seconds"]["median"] for case in cases]
    spread = [
        [case["seconds"]["median"] - case["seconds"]["min"] for case in cases],
        [case["seconds"]["max"] - case["seconds"]["median"] for case in cases],
    ]
    axes.barh(names, medians, xerr=spread, color=["#2a6f97", "#a9b4c2", "#d3d8e0"], capsize=3)
    for i, median in enumerate(medians):
        axes.annotate(f" {packed / median:.2f}x", (0, i), va="center", color="white" if i == 0 else "black")
    label = f"limit: packed / {result['limit']['flops']:.2f}"
    axes.axvline(bound, color="#c1121f", linestyle="--", linewidth=1.2, label=label)
    axes.invert_yaxis()
    shape = result["shape"]
    axes.set_xlabel("seconds for forward and backward (median, min to max)")
    axes.set_title(f"{shape['conversations']} conversations, {shape['turns']} turns on {result['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
