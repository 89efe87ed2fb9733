"""The whole training step on tensors without values: forward, loss, backward, clipping, update, gradients to zero.

    kind of model x attention x checkpointing x LoRA or whole x dtype, on "meta" and on "fake cuda"

The functions are the project's own: what surrounds them (a model from a config, an accelerator for its device) is made
here. On fake cuda tensors the attention's own code runs, kernels left out; on meta tensors the operator's shapes.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types

from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.attention.layers import refusal
from mtr.errors import UserError
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.lora import add_lora
from mtr.model.tree_model import TreeModel
from mtr.prepare.counts import Counts
from mtr.prepare.step import Step
from mtr.recipe.sections import LoraSection, TrainingSection
from mtr.training.faults import PackSplitter
from mtr.training.learner import Learner
from mtr.training.loop import train_step
from mtr.training.optim import build_optimizer, build_schedule
from mtr.training.parallel import build_accelerator, distribute
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import merge
from mtr.tree.packing import Pack
from support.cuda.layer import CUDA, flex_by_graph
from support.cuda.plant import FAULTS, planted
from support.cuda.waits import KNOWN, ON_PURPOSE
from support.cuda.watch import Watch, watched
from support.masks import random_chat
from support.models import ARCHITECTURES

META = torch.device("meta")
_VOCABULARY = 64


class Combination(NamedTuple):
    device: str
    """"meta" or "fake cuda"."""
    kind: str
    """Of ARCHITECTURES."""
    attention: str
    checkpointing: str
    training: str
    """"lora" or "whole"."""
    dtype: str

    def __str__(self) -> str:
        return ", ".join(self)


COMBINATIONS = [
    Combination(*values)
    for values in itertools.product(
        ("meta", "fake cuda"),
        ARCHITECTURES,
        ("flex", "varlen", "auto"),
        ("none", "selective", "full", "offload"),
        ("lora", "whole"),
        ("float32", "bfloat16"),
    )
]


def few(combinations: Sequence[Combination]) -> list[Combination]:
    """A part in which each kind of model meets each attention, checkpointing, training and dtype, refusals left out."""
    kept = []
    for _, group in itertools.groupby(combinations, lambda one: (one.device, one.kind)):
        options = [one for one in group if (one.attention, one.dtype) != ("varlen", "float32")]
        wanted = {(name, value) for one in options for name, value in _chosen(one)}
        while wanted:
            best = max(options, key=lambda one: len(wanted & _chosen(one)))
            kept.append(best)
            wanted -= _chosen(best)
    return kept


def _chosen(one: Combination) -> set[tuple[str, str]]:
    return {(name, value) for name, value in one._asdict().items() if name not in ("device", "kind")}


@dataclass
class Outcome:
    combination: Combination
    skipped: str | None = None
    """Why the project refuses it, too."""
    problem: str | None = None
    """What ended the step."""
    mixed: bool = False
    """It ended at tensors of two devices."""
    synchronizations: Counter[tuple[str, str]] = field(default_factory=Counter)
    operators: int = 0
    seconds: float = 0.0

    @property
    def unwanted(self) -> dict[tuple[str, str], int]:
        """Synchronizations that nobody has asked for."""
        found = self.synchronizations.items()
        return {(what, where): count for (what, where), count in found if where not in ON_PURPOSE and what not in KNOWN}

    @property
    def ok(self) -> bool:
        return self.problem is None and not self.unwanted


def run(device: str, quick: bool) -> list[Outcome | Planted]:
    chosen = [one for one in COMBINATIONS if one.device == device]
    return [*map(try_step, few(chosen) if quick else chosen), *try_planted(device)]


def try_step(one: Combination) -> Outcome:
    """One step of two packs."""
    began = time.perf_counter()
    outcome = Outcome(one)
    if reason := refusal(config_of(one), 1024):
        outcome.skipped = reason.split(";")[0]
        return outcome
    try:
        backends = choose_backends(one.attention, config_of(one), CUDA, getattr(torch, one.dtype))
    except UserError as error:
        outcome.skipped = str(error).split(";")[0]
        return outcome
    watch = Watch()
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder, _on(one.device) as fake:
            learner = build_learner(one, backends, folder, fake)
            with watched(fake, watch):
                run_step(learner, backends)
    except Exception as error:
        outcome.problem = f"{type(error).__name__}: {error}"[:400]
        outcome.mixed = "different devices" in str(error) or "same device" in str(error)
        outcome.mixed |= "not on the expected device" in str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # its device has no values; the next run's has
    if watch.mixes and outcome.problem is None:
        outcome.mixed, outcome.problem = True, f"tensors of two devices: {dict(watch.mixes)}"
    outcome.operators, outcome.synchronizations = watch.operators, watch.synchronizations
    outcome.seconds = time.perf_counter() - began
    return outcome


def config_of(one: Combination) -> Any:
    """Head sizes are multiples of 16, as flex wants them."""
    name, options = ARCHITECTURES[one.kind]
    sizes = {"head_dim": 16} if "head_dim" in options else {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    sizes |= {"v_head_dim": 16} if "v_head_dim" in options else {}
    config = getattr(transformers, name)(**{**options, **sizes, "vocab_size": _VOCABULARY})
    config.pad_token_id = None
    return config


@contextlib.contextmanager
def _on(device: str) -> Iterator[FakeTensorMode | None]:
    if device == "meta":
        with mock.patch.object(torch, "autocast", _autocast):
            yield None
        return
    foreach: list[Any] = _foreach_supported_types
    foreach.append(FakeTensor)  # so that the optimizer does for it what it does for a cuda tensor
    try:
        with flex_by_graph():
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        foreach.remove(FakeTensor)


class _autocast(torch.autocast):  # noqa: N801
    """There is none for meta tensors; PEFT switches it off for the device that its weights are on."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *arguments, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_learner(one: Combination, backends: Sequence[Any], folder: str, fake: FakeTensorMode | None) -> Learner:
    """As `mtr.training.setup` does it, with a model that has no values."""
    training = TrainingSection(output_dir=folder, gradient_checkpointing=one.checkpointing)  # type: ignore[arg-type]
    dtype = getattr(torch, one.dtype)
    AcceleratorState._reset_state(reset_partial_state=True)
    with META:
        model = transformers.AutoModelForCausalLM.from_config(config_of(one), dtype=dtype)
        if one.training == "lora":
            model = add_lora(model, LoraSection(r=4), 0)
        accelerator = build_accelerator(model, "ddp", (), folder)
    accelerator.device_placement = False  # the model is where it belongs
    if fake is not None:
        _to_fake(model, fake)
    use_tree_attention(model)
    model.train()
    tree_model = TreeModel(model, *backends, choose=fastest)
    checkpoint_activations(model, training.checkpointing)
    optimizer = build_optimizer(model, training)
    schedule = build_schedule(optimizer, training, 10)
    distributed = distribute(tree_model, accelerator, "ddp")
    prepared = accelerator.prepare_optimizer(optimizer)
    accelerator.state.device = PartialState().device = META if fake is None else CUDA
    return Learner(model, distributed, prepared, optimizer, schedule, accelerator, None)


def _to_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """In place; tied parameters stay tied."""
    made: dict[int, Any] = {}

    def cuda(tensor: torch.Tensor) -> FakeTensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(fake, empty, CUDA)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(cuda(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = cuda(buffer)


def packs(backends: Sequence[Any], sizes: Sequence[int] = (20, 30)) -> tuple[Batch, ...]:
    """A conversation each, of segments of up to so many tokens."""
    rng = np.random.default_rng(0)
    multiple = pad_to_multiple_of(backends)
    return tuple(build_batch(Pack((merge(random_chat(rng, 3, size)),)), multiple) for size in sizes)


def run_step(learner: Learner, backends: Sequence[Any]) -> None:
    batches = packs(backends)
    weight = float(sum(batch.weight.sum() for batch in batches))
    step = Step(batches, weight, Counts(), 2, 1.0, rounds=len(batches))
    splitter = PackSplitter("error", lambda pack: build_batch(pack, pad_to_multiple_of(backends)))
    train_step(learner, step.pinned(learner.accelerator.device), 1.0, splitter)
    trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    missed = [name for name, parameter in trained.items() if parameter not in learner.raw_optimizer.state]
    assert not missed, f"no gradient has reached {missed[0]}, {len(missed)} of {len(trained)}"


@dataclass
class Planted:
    """A fault put into a step, and whether it was found."""

    fault: str
    device: str
    found: str | None
    """How; None if it was not."""

    @property
    def ok(self) -> bool:
        return self.found is not None


def try_planted(device: str) -> list[Planted]:
    outcomes = []
    for fault in FAULTS:
        with planted(fault):
            outcome = try_step(Combination(device, "qwen3", "varlen", "none", "lora", "bfloat16"))
        mixed = "tensors of two devices" if outcome.mixed else None
        wait = next(
            (f"{what} in {where}" for (what, where) in outcome.unwanted if where.startswith(planted.__module__)), None
        )
        outcomes.append(Planted(fault, device, mixed if fault == "a tensor on the host" else wait))
    return outcomes
