"""Claims: the cost of a pack is predicted from two short ones, within what training keeps beside it; a pack that cannot
fit is refused; the probe decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from support.models import wide_model
from support.resident import RESIDENT, resident
from torch import nn

import mtr.model.memory
from mtr.attention.model_parts import outer_parameters
from mtr.errors import UserError
from mtr.model.memory import PackMemory, Probe
from mtr.model.training_state import training_state
from mtr.model.tree_model import TreeModel
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Backend, Checkpointing, TrainingSection
from mtr.training.loop import train
from mtr.training.optim import build_optimizer
from mtr.tree.mask import Tree

CPU = torch.device("cpu")
Recipes = Callable[..., Path]


@pytest.fixture
def one_run() -> Iterator[None]:
    """For a run in this process: accelerate keeps one precision for good."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def probe() -> Probe:
    model = TreeModel(wide_model(), "segment")
    return Probe(model, model, CPU)


@pytest.mark.parametrize("mode", RESIDENT)
def test_the_cost_of_a_pack_is_predicted(mode: Checkpointing) -> None:
    """From packs of 512 and 1,024 tokens to one of 2,048, within 15 %: the resident set is a rough measure."""
    found = resident()
    assert found.memory[mode].bytes(2048) == pytest.approx(found.peak[mode], rel=0.15)
    assert found.gradients == 0, "the probe leaves no gradient behind"


def test_checkpointing_takes_less_of_a_pack() -> None:
    assert resident().memory["full"].per_token < 0.5 * resident().memory["none"].per_token


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "muon", "adafactor", "sgd"])
def test_what_training_keeps_is_left_free(
    probe: Probe, write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    """To the byte what a first update leaves behind: a gradient for each trained weight, and the optimizer's state."""
    monkeypatch.setattr(mtr.model.memory, "available_memory", lambda _: 2**30)
    training = load_recipe(write_recipe(training={"optim": optim})).training
    probe = Probe(probe.tree_model, probe.call, CPU, optim)
    free = probe.measure(256).free

    optimizer = build_optimizer(probe.tree_model.model, training)
    torch.autograd.backward(probe.call(probe._batch(256)))
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in probe.call.parameters() if p.grad is not None)
    state = [x for kept in optimizer.state.values() for x in kept.values() if isinstance(x, torch.Tensor)]
    assert gradients == 4 * sum(p.numel() for p in probe.call.parameters() if p.requires_grad)
    assert 2**30 - free == gradients + sum(x.nbytes for x in state if x.dim())


def test_an_update_that_cannot_fit_is_refused(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    state = training_state(probe.call.parameters(), "adamw_torch", on_cuda=False)
    monkeypatch.setattr(mtr.model.memory, "available_memory", lambda _: state.kept + state.update - 1)
    with pytest.raises(UserError, match=r"training\.optim: gradients and the state of adamw_torch take .*fsdp2"):
        probe.free()


def test_adamw_takes_more_at_once_on_cuda() -> None:
    weights = [nn.Parameter(torch.zeros(100, 10)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(3), False)]
    assert training_state(weights, "adamw_torch", on_cuda=True).update == 4 * 1007
    assert training_state(weights, "adamw_torch", on_cuda=False).update == 3 * 4 * 1000
    assert training_state(weights, "adamw_torch_fused", on_cuda=True).update == 0


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "adamw_8bit"])
def test_what_other_optimizers_keep_is_known(optim: str) -> None:
    """As above, of an optimizer alone."""
    pytest.importorskip({"schedule_free_adamw": "schedulefree", "adamw_8bit": "bitsandbytes"}[optim])
    keys = {"output_dir": "x", "optim": optim, "lr_scheduler_type": "constant"}
    model = wide_model(layers=1)
    optimizer = build_optimizer(model, TrainingSection.model_validate(keys))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [x for state in optimizer.state.values() for key, x in state.items() if "qmap" not in key]
    taken = sum(x.nbytes for x in kept if isinstance(x, torch.Tensor) and x.dim())
    state = training_state(model.parameters(), optim, False, *outer_parameters(model))
    assert state.optimizer == taken


def test_the_largest_pack_fits_what_is_free() -> None:
    memory = PackMemory(fixed=1e9, per_token=1e6, free=20 * 10**9)
    assert memory.most_tokens == 17_400 // 128 * 128
    assert memory.bytes(memory.most_tokens) < 0.92 * memory.free < memory.bytes(memory.most_tokens + 128)
    assert PackMemory(1e9, 1e6, 10**8).most_tokens == 0
    assert PackMemory(0, 1, 10**12).most_tokens == 2**17


def test_a_pack_is_fitted() -> None:
    tokens, memory = resident().fitted
    assert tokens % 128 == 0
    assert tokens >= 256
    assert memory.bytes(tokens) <= memory.free


def test_a_turn_that_cannot_fit_is_refused(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "measure", lambda self, _: PackMemory(2**22, 100_000, self.free()))
    state = training_state(probe.call.parameters(), "adamw_torch", on_cuda=False)
    monkeypatch.setattr(mtr.model.memory, "available_memory", lambda _: state.kept + 60 * 2**20)
    with pytest.raises(UserError, match=r"sequence\.max_length: a turn of 4096 tokens takes .* GiB are free"):
        probe.fit_pack(4096)


def test_out_of_memory_in_the_probe_is_one_line(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Probe, "peak", full)
    with pytest.raises(UserError, match=r"a pack of 1024 tokens does not fit on cpu"):
        probe.measure(1024)


@pytest.mark.usefixtures("one_run")
def test_the_probe_runs_in_the_autocast_of_a_step(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of bfloat16 that are trained are float32 and computed with in bfloat16: from the probe on."""
    seen: list[bool] = []
    hidden = TreeModel.hidden

    def watched(self: TreeModel, batch: Any) -> Any:
        if self.model.training:
            seen.append(torch.is_autocast_enabled("cpu"))
        return hidden(self, batch)

    monkeypatch.setattr(TreeModel, "hidden", watched)
    recipe = write_recipe(
        model={"dtype": "bfloat16"}, lora=None, sequence={"max_length": 512, "max_tokens": "auto"}, training=ONE_STEP
    )
    train(load_recipe(recipe))
    assert len(seen) > 3
    assert all(seen)


@pytest.mark.usefixtures("one_run")
def test_attention_is_chosen_on_the_first_real_pack(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the single short sequence that the probe begins with."""
    asked: list[int] = []

    def first(candidates: Any, config: Any, tree: Tree, *_: Any) -> Backend:
        asked.append(int((tree.subtree_end[: len(tree.parent)] > 0).sum()))
        return "segment"

    monkeypatch.setattr("mtr.training.setup.choose_backends", lambda *_: ["segment", "varlen"])
    monkeypatch.setattr("mtr.training.setup.fastest", first)
    recipe = write_recipe(sequence={"max_length": 512, "max_tokens": "auto"}, training=ONE_STEP)
    train(load_recipe(recipe))
    assert len(asked) == 1
    assert asked[0] > 256


ONE_STEP = {"max_steps": 1, "gradient_checkpointing": False}
