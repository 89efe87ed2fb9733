"""Claims: each optimizer makes the update of its paper, with one learning rate for the schedule to scale; the groups of
LoRA+ are PEFT's; every schedule is transformers'; a package that is missing is named with the way to get it.
"""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import pytest
import torch
from support.models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_scheduler

from mtr.errors import UserError
from mtr.model.lora import add_lora
from mtr.recipe.schedules import KWARGS
from mtr.recipe.sections import LoraSection, TrainingSection
from mtr.recipe.training_section import Optimizer
from mtr.training.averaging import averaged_weights
from mtr.training.optim import build_optimizer, build_schedule, describe_optimizer, parameter_groups

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def training(**keys: Any) -> TrainingSection:
    if keys.get("optim") == "schedule_free_adamw":
        keys = {"lr_scheduler_type": "constant", **keys}
    return TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1e-2, **keys})


def model(lora: LoraSection | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config("qwen3", **config))
    return add_lora(made, lora, 0) if lora else made


def with_gradients(trained: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Made-up ones; returns them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            found[name] = parameter.grad.clone()
    return found


def values(trained: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


def test_the_groups_of_lora_plus_are_those_of_peft() -> None:
    from peft.optimizers import create_loraplus_optimizer

    adapted = model(LoraSection(r=2))
    theirs = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = parameter_groups(adapted, training(loraplus_lr_ratio=16))
    assert {id(p): group["lr"] for group in ours for p in group["params"]} == rates
    assert [group["lr"] for group in ours] == [1e-2, 0.16], "the first one is the logged rate"


def test_lora_plus_moves_b_by_its_ratio_and_the_schedule_scales_both() -> None:
    """SGD moves by rate x gradient, so one step shows the rates."""
    adapted = model(LoraSection(r=2))
    section = training(loraplus_lr_ratio=16, optim="sgd", lr_scheduler_type="linear", warmup_steps=0)
    optimizer = build_optimizer(adapted, section)
    schedule = build_schedule(optimizer, section, num_steps=4)
    for step in range(2):
        before, gradients = values(adapted), with_gradients(adapted)
        optimizer.step()
        schedule.step()
        for name, now in values(adapted).items():
            rate = 1e-2 * (16 if ".lora_B." in name else 1) * (1 - step / 4)
            torch.testing.assert_close(now, before[name] - rate * gradients[name])
    assert describe_optimizer(optimizer, section) == [
        "LoRA+: B of the adapters learns at 16 times the logged rate, 0.16 at most"
    ]


def test_without_a_ratio_all_learn_alike_and_vectors_are_not_decayed() -> None:
    groups = parameter_groups(model(LoraSection(r=2, modules_to_save=["norm"])), training(weight_decay=0.1))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.1), (1e-2, 0.0)]
    assert {p.dim() for p in groups[1]["params"]} == {1}


@pytest.mark.parametrize("lora", [None, LoraSection(r=2, modules_to_save=["lm_head", "norm"], use_dora=True)])
@pytest.mark.parametrize("optim", [name for name in get_args(Optimizer) if HAS_BITSANDBYTES or "8bit" not in name])
def test_every_optimizer_decays_matrices_alone_and_trains_each_weight_once(
    optim: str, lora: LoraSection | None
) -> None:
    trained = model(lora)
    optimizer = build_optimizer(trained, training(optim=optim, weight_decay=0.1))
    found = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p): 0.1 if p.dim() > 1 else 0.0 for p in trained.parameters() if p.requires_grad}
    assert len(found) == len(wanted)
    assert dict(found) == wanted
    assert set(wanted.values()) == {0.0, 0.1}


# --- muon -------------------------------------------------------------------------------------------------------------


def orthogonalized(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/, in 16 bits as there."""
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)  # rounded to 16 bits once
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


@pytest.mark.parametrize("lora", [None, LoraSection(r=4)])
def test_muon_orthogonalizes_hidden_matrices_and_leaves_the_rest_to_adamw(lora: LoraSection | None) -> None:
    trained, plain = model(lora), model(lora)
    section = training(optim="muon", weight_decay=0.1)
    optimizer, adamw = build_optimizer(trained, section), build_optimizer(plain, training(weight_decay=0.1))
    before, gradients = values(trained), with_gradients(trained)
    with_gradients(plain)
    optimizer.step()
    adamw.step()
    of_adamw, kinds = values(plain), set()
    for name, now in values(trained).items():
        is_matrix = now.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name
        kinds.add(is_matrix)
        if not is_matrix:
            assert torch.equal(now, of_adamw[name]), name
            continue
        momentum = 0.05 * gradients[name]
        update = orthogonalized(0.05 * gradients[name] + 0.95 * momentum)
        rate = 1e-2 * 0.2 * max(now.shape) ** 0.5
        moved = before[name] * (1 - 1e-2 * 0.1) - now
        assert (moved - rate * update).norm() < 0.01 * (rate * update).norm(), f"{name}: more than rounding in 16 bits"
        assert (now - of_adamw[name]).norm() > 0.1 * moved.norm(), name
    assert kinds == ({True} if lora else {True, False})


def test_one_schedule_scales_both_parts_of_muon() -> None:
    trained = model()
    section = training(optim="muon", lr_scheduler_type="linear", warmup_steps=0)
    optimizer = build_optimizer(trained, section)
    schedule = build_schedule(optimizer, section, num_steps=2)
    with_gradients(trained)
    optimizer.step()
    schedule.step()
    assert {group["lr"] for part in optimizer._parts for group in part.param_groups} == {5e-3}  # type: ignore[attr-defined]
    (note,) = describe_optimizer(optimizer, section)
    outer = sum(p.numel() for name, p in trained.named_parameters() if "embed" in name or "head" in name or p.dim() < 2)
    assert f"AdamW for {outer:,} others" in note


# --- schedule-free ----------------------------------------------------------------------------------------------------


def test_averages_are_schedulefrees_and_leave_no_trace() -> None:
    trained, theirs = model(LoraSection(r=2)), model(LoraSection(r=2))
    optimizer, reference = (build_optimizer(m, training(optim="schedule_free_adamw")) for m in (trained, theirs))
    with averaged_weights(optimizer) as are_others:
        assert not are_others, "nothing was trained yet"
    for seed in range(3):
        for each, stepped in ((trained, optimizer), (theirs, reference)):
            with_gradients(each, seed)
            stepped.step()
        before = values(trained)
        with averaged_weights(optimizer) as are_others:
            averages = values(trained)
            with averaged_weights(optimizer) as again:
                assert not again
        assert are_others
        assert all(torch.equal(before[name], now) for name, now in values(trained).items()), "not bit for bit"
    reference.eval()  # type: ignore[attr-defined]
    assert all(torch.equal(averages[name], now) for name, now in values(theirs).items())
    assert not all(torch.equal(before[name], now) for name, now in averages.items())


def test_other_optimizers_have_no_averages() -> None:
    trained = model(LoraSection(r=2))
    with averaged_weights(build_optimizer(trained, training())) as are_others:
        assert not are_others


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw_8bit", "bitsandbytes"), ("paged_adamw_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"training.optim: {name} needs {package}: pip install 'mtr\[optim\]'"):
        build_optimizer(model(LoraSection(r=2)), training(optim=name))


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_are_kept_in_8_bits_and_updates_are_near_adamws(name: str) -> None:
    trained, plain = model(hidden_size=128, intermediate_size=64), model(hidden_size=128, intermediate_size=64)
    optimizer, adamw = build_optimizer(trained, training(optim=name)), build_optimizer(plain, training())
    for seed in range(3):
        for each, stepped in ((trained, optimizer), (plain, adamw)):
            with_gradients(each, seed)
            stepped.step()
    kept = {parameter: state["state1"].dtype for parameter, state in optimizer.state.items()}
    named = dict(trained.named_parameters())
    assert kept[named["model.layers.0.mlp.up_proj.weight"]] == torch.uint8
    assert kept[named["model.embed_tokens.weight"]] == torch.float32, "embeddings are not kept in 8 bits"
    moved = torch.cat([(p - q).abs().flatten() for p, q in zip(trained.parameters(), plain.parameters(), strict=True)])
    assert 0 < moved.mean() < 2e-3, "three steps of at most 0.01 each"


# --- schedules --------------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, dict[str, Any]] = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize("kind", KWARGS)
def test_each_schedule_is_that_of_transformers(kind: Any) -> None:
    kwargs = EXAMPLES.get(kind, {})
    ours: list[float] = []
    theirs: list[float] = []
    for rates, build in ((ours, True), (theirs, False)):
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": 1e-2}], lr=1e-2)
        if build:
            section = training(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=3)
            schedule = build_schedule(optimizer, section, num_steps=12)
        else:
            schedule = get_scheduler(kind, optimizer, 3, 12, scheduler_specific_kwargs=kwargs)
        for _ in range(12):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert ours == theirs
    assert kind == "constant" or len(set(ours)) > 2


def test_a_share_of_steps_to_decay_is_counted() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-2)
    keys: dict[str, Any] = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    section = training(**keys, lr_scheduler_kwargs={"num_decay_steps": 0.25, "decay_type": "linear"})
    schedule, rates = build_schedule(optimizer, section, num_steps=20), []
    for _ in range(20):
        rates.append(round(schedule.get_last_lr()[0] / 1e-2, 6))
        optimizer.step()
        schedule.step()
    assert rates == [0, 0.5, *[1.0] * 14, 0.8, 0.6, 0.4, 0.2]
    section = training(**keys, lr_scheduler_kwargs={"num_decay_steps": 19})
    with pytest.raises(UserError, match="2 steps of warmup and 19 of decay are more than the run's 20"):
        build_schedule(optimizer, section, num_steps=20)
