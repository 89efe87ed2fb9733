"""Is one pass faster than N? The same conversations forward and backward in several ways, timed in turn.

`bench` takes the user's conversations, `sweep` synthetic ones of several shapes. Both `set_up` the model and `measure`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mtr.attention.choice import activate_flash_attention, choose_backends, fastest, usable_backends
from mtr.attention.model_parts import base_model, text_config
from mtr.bench.cases import packed_case, padded_case
from mtr.bench.results import Work, describe
from mtr.bench.setup import Options, Setup
from mtr.bench.synthetic import Shape, make_views
from mtr.bench.timing import Case, Timing, take_turns
from mtr.bench.trl import check_trl, time_trl
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.sample import first_views, without_dropout
from mtr.errors import UserError
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.config import check_reach, vocabulary_size
from mtr.model.device import pick_device
from mtr.model.flops import FlopCounter, device_matrix_rate
from mtr.model.kernels import speed_up_layers
from mtr.model.loading import load_config, load_model
from mtr.model.memory import Probe
from mtr.model.strategy import decide
from mtr.model.tree_model import TreeModel, use_tree
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Backend, Checkpointing, Recipe
from mtr.training.environment import environment
from mtr.training.fitting import estimator_of, least_checkpointing, modes_on
from mtr.tree.layout import Layout, View
from mtr.tree.packing import merge_conversations

log = logging.getLogger("mtr")


def bench(recipe: Recipe, conversations: int = 8, repeats: int = 5, options: Options | None = None) -> dict[str, Any]:
    """Time the cases on the first conversations of `data.train`.

    Returns:
        What `mtr bench --json` prints.

    Raises:
        UserError: there is no turn to train, model or data cannot be loaded, or a first case runs out of memory.
    """
    recipe = without_dropout(recipe)
    options = options or Options()
    tokenizer = load_tokenizer(recipe)
    config = load_config(recipe, options.random_weights)
    warnings = check_reach(config, tokenizer, recipe.sequence.max_length)
    renderer = load_renderer(recipe, tokenizer)
    builder = Builder(recipe, renderer, vocabulary=vocabulary_size(config))
    views = first_views(recipe, builder.turns, conversations)
    setup = set_up(recipe, options)
    for warning in warnings:
        log.warning(warning)
    return {**setup.about, **measure(setup, views, min(renderer.pad_id, setup.vocabulary - 1), repeats)}


def sweep(
    recipe: Recipe,
    shapes: Sequence[Shape],
    conversations: int = 1,
    repeats: int = 5,
    options: Options | None = None,
) -> dict[str, Any]:
    """Time the cases on synthetic conversations of each shape, with the recipe's model.

    Args:
        conversations: how many of each shape.

    Returns:
        What `mtr bench --sweep --json` prints: as `bench`, with `points` for the shapes.

    Raises:
        UserError: the model cannot be loaded, or a first case runs out of memory.
    """
    longest = max(shape.longest for shape in shapes)
    longest = max(longest, recipe.sequence.max_length)
    recipe = without_dropout(recipe).replace(
        sequence={"max_length": longest, "max_tokens": max(longest, recipe.sequence.budget)}
    )
    setup = set_up(recipe, options or Options())
    points = []
    for number, shape in enumerate(shapes):
        print(f"shape {number + 1} of {len(shapes)}: {shape.in_words}", file=sys.stderr)
        measured = measure(setup, make_views(shape, conversations, setup.vocabulary), pad_id=0, repeats=repeats)
        points.append({**vars(shape), **measured})
    return {**setup.about, "points": points}


def set_up(recipe: Recipe, options: Options) -> Setup:
    """Load the recipe's model for forward and backward with tree attention.

    Raises:
        UserError: the model cannot be loaded, TRL is missing, or the recipe asks for something that cannot run here.
    """
    device = pick_device()
    if options.versus_trl:
        check_trl()
    config = load_config(recipe, options.random_weights)
    if reason := decide(recipe.replace(sequence={"strategy": "auto"}), config).reason:
        name = recipe.model.name_or_path
        raise UserError(f"model.name_or_path: {name} is trained per turn, so one pass cannot be timed: {reason}")
    model = load_model(recipe, device, random_weights=options.random_weights)
    speed_up_layers(model, recipe, device)
    use_tree(model)
    model.train()
    config = text_config(base_model(model).config)
    usable = usable_backends(config, device, model.dtype)
    names = options.attention or (recipe.model.attention,)
    asked = [choose_backends(name, config, device, model.dtype) for name in names]
    if "varlen" in usable:
        activate_flash_attention()
    kept = _checkpoint(model, recipe, asked[0], device)
    counter = FlopCounter(model)
    rate = device_matrix_rate(device, model.dtype)
    about = _about(model, recipe, options, device, kept, rate)
    return Setup(recipe, options, device, model, int(config.vocab_size), usable, asked, counter, rate, about)


def _checkpoint(model: Any, recipe: Recipe, candidates: list[Backend], device: torch.device) -> Checkpointing:
    """Turn gradient checkpointing on as the recipe says, and return its mode."""
    mode = recipe.training.checkpointing
    if mode == "auto":
        tree_model = TreeModel(model, *candidates, choose=fastest)
        probe = Probe(tree_model, tree_model, device, recipe.training.optim)
        estimator = estimator_of(recipe, base_model(model).config, model.dtype, candidates, device)
        mode = least_checkpointing(estimator, recipe.sequence.budget, probe.free(), modes_on(device, model)).mode
    checkpoint_activations(model, mode)
    return mode


def _about(
    model: Any, recipe: Recipe, options: Options, device: torch.device, kept: Checkpointing, rate: dict[str, Any]
) -> dict[str, Any]:
    described = environment(recipe.training.seed, device, 1, recipe.date or "")
    return {
        "device": described["device"],
        "model": {
            "name_or_path": recipe.model.name_or_path,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "random_weights": options.random_weights,
        },
        "gradient_checkpointing": kept,
        "torch_compile": recipe.training.torch_compile,
        "use_liger_kernel": recipe.training.use_liger_kernel,
        "matrix_rate": rate,
        "environment": described,
    }


def measure(setup: Setup, views: list[list[View]], pad_id: int, repeats: int) -> dict[str, Any]:
    """Time all cases on the same conversations.

    Args:
        views: the turns of each conversation.

    Returns:
        What `bench` returns, without the part about model and device.

    Raises:
        UserError: the single pass or the packed baseline runs out of memory.
    """
    merge, budget = setup.recipe.sequence.merge, setup.recipe.sequence.budget
    single = merge_conversations(views, "single_pass", merge, budget)
    per_turn = merge_conversations(views, "per_turn", merge, budget)
    cases = [
        _fastest(setup, "single_pass", single, setup.asked[0]),
        _fastest(setup, "per_turn_packed", per_turn, setup.usable),
    ]
    if setup.options.padded:
        cases.append(padded_case(setup, [view for turns in views for view in turns], per_turn, pad_id))
    num_baselines = len(cases) - 1
    for strategy, layouts, first in (("single_pass", single, cases[0]), ("per_turn_packed", per_turn, cases[1])):
        cases += [packed_case(setup, strategy, layouts, name) for name in _further(setup) if name != first.attention]
    timings = take_turns(setup.model, setup.device, cases, repeats)
    _check_memory(cases[:2], timings[:2])
    work = Work.of(views)
    result = describe(work, cases, timings, num_baselines, setup.matrix_rate["flops_per_second"])
    result["shape"] |= {"trees": len(single), "merge": merge}
    work_of = {"single_pass": single, "per_turn": per_turn}
    result["limit"]["by_part"] = {name: vars(setup.counter.by_part(trees)) for name, trees in work_of.items()}
    if setup.options.versus_trl:
        single_pass = {"seconds": result["cases"][0]["seconds"]["median"], "loss": result["cases"][0]["loss"]}
        result["trl"] = time_trl(setup.model, setup.recipe, views, setup.device, repeats, single_pass)
    return result


def _fastest(setup: Setup, strategy: str, layouts: list[Layout], candidates: Sequence[Backend]) -> Case:
    """The case with the fastest of these backends, by one run of each after a warm-up."""
    cases = [packed_case(setup, strategy, layouts, backend) for backend in candidates]
    if len(cases) == 1:
        return cases[0]
    tried = [
        min(timing.seconds, default=float("inf")) for timing in take_turns(setup.model, setup.device, cases, repeats=1)
    ]
    return cases[tried.index(min(tried))]


def _further(setup: Setup) -> list[Backend]:
    """Backends to time besides the first one, each once."""
    asked = (name for names in setup.asked[1:] for name in names)
    return list(dict.fromkeys([*asked, *(setup.usable if setup.options.all_backends else [])]))


def _check_memory(cases: Sequence[Case], timings: Sequence[Timing]) -> None:
    for case, timing in zip(cases, timings, strict=True):
        if timing.error:
            raise UserError(
                f"{case.strategy} ({case.attention}): {timing.error}; lower sequence.max_tokens, or turn on "
                "training.gradient_checkpointing"
            )
