"""Claims: hidden states and all gradients of a hybrid over a pack of trees are those of a plain forward for each path,
in every family, with LoRA as without; checkpointing and compiling change nothing. A plan with a fault in it, and a
model that follows no tree, are noticed.

Paths are longer than two chunks. Everything is in float64, where the modelling code asks for float32, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from support.forests import WRONG_STATES
from support.hybrids import HYBRIDS
from support.models import gradients, load, tiny_config
from support.trees import view
from torch import Tensor

import mtr.recurrence.kinds
from mtr.attention.interface import use_own_attention
from mtr.attention.model_parts import decoder
from mtr.model.checkpointing import MODES, checkpoint_activations
from mtr.model.compiled import compile_layers
from mtr.model.float64 import keep_float64
from mtr.model.lora import add_lora
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recipe.sections import Checkpointing, LoraSection
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.segments import convolution_plan, level_plan
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout, View, merge
from mtr.tree.packing import Pack, idle_pack

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracing
Models = Callable[..., Path]
QUICK = ["qwen3_5", "kimi_linear", "bamba", "lfm2", "minimax", "jamba", "recurrent_gemma"]
"""One of each kind."""
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in HYBRIDS]


def made(family: str) -> Any:
    """In float64, with weights large enough, and states kept long enough, for a leak to show."""
    torch.manual_seed(0)
    # buffers are made in this type, parameters of some stay in float32
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float64).double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.normal_(mean=-1.0, std=0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def two_trees() -> list[list[View]]:
    """Forks at and beside the borders of chunks, off branches too; branches of one token; a path of 150 tokens."""
    ids = iter(np.random.default_rng(0).integers(0, 64, 2000).tolist())

    def take(count: int) -> list[int]:
        return list(itertools.islice(ids, count))

    trunk = take(100)
    branch = [*trunk[:64], *take(40)]
    paths = [trunk, branch, [*branch[:80], *take(1)], [*branch[:96], *take(5)], [*trunk[:31], *take(3)]]
    paths += [[*trunk, *take(50)], [*trunk[:1], *take(2)]]
    other = take(9)
    groups = [paths, [[*other, *take(30)], [*other, *take(4)]]]
    return [[view(path[:1], path[1:], 1.0, turn) for turn, path in enumerate(group)] for group in groups]


class Row(NamedTuple):
    ids: Tensor
    """[1, n]"""
    tokens: Tensor
    """[n] of the pack"""
    first: Tensor
    """[n] whether no path before it has the token"""


class Case(NamedTuple):
    batch: Batch
    paths: list[Row]


@pytest.fixture(scope="module")
def case() -> Case:
    found = case_of(two_trees())
    assert found.batch.input_ids.shape[1] > found.batch.num_tokens, "padding"
    return found


def case_of(groups: list[list[View]]) -> Case:
    layouts = [merge(views) for views in groups]
    batch = build_batch(Pack(tuple(layouts)), 64)
    paths, seen, offset = [], set[int](), 0
    for layout, views in zip(layouts, groups, strict=True):
        for one in views:
            tokens = [offset + token for token in path_of(layout, one)]
            first = [token not in seen for token in tokens]
            seen |= set(tokens)
            paths.append(Row(torch.from_numpy(one.ids)[None], torch.tensor(tokens), torch.tensor(first)))
        offset += layout.num_tokens
    assert len(seen) == batch.num_tokens
    return Case(batch, paths)


def path_of(layout: Layout, one: View) -> list[int]:
    """The tokens of a view: of the children of each, the one with the next id."""
    children: dict[tuple[int, int], int] = {}
    for token, (above, name) in enumerate(zip(layout.parent.tolist(), layout.input_ids.tolist(), strict=True)):
        children[above, name] = token
    found, above = [], -1
    for name in one.ids.tolist():
        above = children[above, name]
        found.append(above)
    return found


Found = tuple[Tensor, dict[str, Tensor]]


def over_tree(model: Any, case: Case, weight: Tensor, autocast: bool = False) -> Found:
    use_tree(model)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = TreeModel(model, "segment").hidden(case.batch)[: case.batch.num_tokens]
    torch.autograd.backward((hidden * weight).sum())
    return hidden.detach(), grads_of(model)


def path_by_path(model: Any, case: Case, weight: Tensor, autocast: bool = False) -> Found:
    use_own_attention(model)
    model.zero_grad(set_to_none=True)
    found = torch.zeros_like(weight)
    for one in case.paths:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = decoder(model)(input_ids=one.ids, use_cache=False).last_hidden_state[0]
        new = one.tokens[one.first]
        found[new] = hidden[one.first].detach().to(found.dtype)
        torch.autograd.backward((hidden[one.first] * weight[new]).sum())
    return found, grads_of(model)


def grads_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(model: Any, case: Case) -> float:
    """The worst of all tensors, relative to its largest entry."""
    width = decoder(model).config.hidden_size
    weight = torch.randn(case.batch.num_tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with keep_float64():
        hidden, grads = over_tree(model, case, weight)
        exact, wanted = path_by_path(model, case, weight)
    assert hidden.dtype == torch.float64
    assert grads.keys() == wanted.keys()
    pairs = [(hidden, exact), *((grads[name], wanted[name]) for name in wanted)]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_exact(family: str, case: Case) -> None:
    assert difference(made(family), case) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", QUICK)
def test_random_packs_are_exact(family: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert difference(made(family), case_of([random_tree(rng) for _ in range(int(rng.integers(1, 4)))])) < 1e-9


def random_tree(rng: np.random.Generator) -> list[View]:
    """Paths that go on from a random token of another one, a quarter of them by one token."""
    paths = [rng.integers(0, 64, int(rng.integers(2, 150)))]
    for _ in range(int(rng.integers(0, 6))):
        above = paths[int(rng.integers(len(paths)))]
        fresh = 1 if rng.random() < 0.25 else int(rng.integers(1, 100))
        paths.append(np.concatenate([above[: int(rng.integers(1, len(above) + 1))], rng.integers(0, 64, fresh)]))
    return [view(path[:1].tolist(), path[1:].tolist(), 1.0, turn) for turn, path in enumerate(paths)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_exact_with_lora(family: str, case: Case) -> None:
    """On all linear layers; what has a gradient has one that is not zero."""
    model = with_lora(made(family))
    assert difference(model, case) < 1e-9
    found = grads_of(model)
    unused = {name for name, p in model.named_parameters() if p.requires_grad} - found.keys()
    assert found
    assert all("_adapter_list." in name for name in unused), "of Zamba2, which has some for layers that have none"
    assert not [name for name, grad in found.items() if not grad.abs().max() > 0]


def with_lora(model: Any) -> Any:
    adapted = add_lora(model, LoraSection(r=2), 0).double().eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


@pytest.mark.parametrize("autocast", [pytest.param(True, marks=pytest.mark.slow), False], ids=["autocast", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_loses_as_much_as_path_by_path(family: str, autocast: bool, case: Case) -> None:
    """In the hidden states, root mean square, from those in float64."""
    model = made(family).bfloat16()
    if autocast:
        model.float()
    weight = torch.randn(case.batch.num_tokens, decoder(model).config.hidden_size)
    found, grads = over_tree(model, case, weight, autocast)
    plain, wanted = path_by_path(model, case, weight, autocast)
    assert grads.keys() == wanted.keys()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    exact, _ = over_tree(model.double(), case, weight)
    assert rms(found - exact) < 1.5 * rms(plain - exact)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_one_token_reaches_every_layer(family: str) -> None:
    """What a process runs that has no pack of its own."""
    model = made(family)
    use_tree(model)
    loss = TreeModel(model, "segment")(build_batch(idle_pack(), 8), touch=True)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# --- a fault is noticed -----------------------------------------------------------------------------------------------


def swapped_levels(tree: Any) -> Any:
    plan = level_plan(tree)
    levels = tuple(
        tuple(rows if rows.above is None else rows._replace(above=rows.above.flip(0) * 0) for rows in level)
        for level in plan.levels
    )
    return plan.__class__(plan.gather, plan.back, levels, plan.num_tokens)


def row_history(tree: Any, width: int) -> Any:
    """Of a convolution that takes the row for one sequence."""
    plan = convolution_plan(tree, width)
    total = plan.num_tokens
    gather = torch.cat([torch.full((width - 1,), total), torch.arange(total)])
    return plan.__class__(gather, torch.arange(total) + width - 1, total)


@pytest.mark.parametrize(
    ("family", "name", "fault"),
    [
        *(("qwen3_5", "chunk_plan", fault) for fault in WRONG_STATES),
        *((name, "chunk_plan", "end of the chunk above") for name in ("kimi_linear", "bamba", "minimax")),
        ("jamba", "level_plan", "first segment"),
        ("lfm2", "convolution_plan", "history of the row"),
        ("bamba", "convolution_plan", "history of the row"),
    ],
)
def test_a_plan_with_a_fault_is_noticed(
    family: str, name: str, fault: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"first segment": swapped_levels, "history of the row": row_history}
    wrong = plans.get(fault) or (lambda tree, *size: WRONG_STATES[fault](chunk_plan(tree, *size)))
    monkeypatch.setattr(mtr.recurrence.kinds, name, wrong)
    assert difference(made(family), case) > 1e-3


@pytest.mark.usefixtures("unswitched")
@pytest.mark.parametrize("family", QUICK)
def test_a_model_that_follows_no_tree_is_noticed(family: str, case: Case) -> None:
    """Its recurrent layers take the row for one sequence."""
    model = made(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtr.model.tree_model.follow_tree", lambda _: None)
        assert difference(model, case) > 1e-3


# --- what is kept and compiled ----------------------------------------------------------------------------------------

FAMILIES_KEPT = [pytest.param(name, marks=[] if name in QUICK[::2] else pytest.mark.slow) for name in HYBRIDS]


@pytest.mark.parametrize("family", FAMILIES_KEPT)
def test_checkpointing_changes_nothing(models: Models, family: str) -> None:
    """In every mode that a CPU has, of one model."""
    model = load(models(family))
    plain, kept = gradients(model)
    for mode in MODES[1:4]:
        checkpoint_activations(model, mode)
        recomputed, kept_now = gradients(model)
        assert plain.keys() == recomputed.keys()
        assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-10, atol=1e-12) for name in plain), mode
    assert kept_now < 0.6 * kept


COMPILED = [
    *itertools.product(["qwen3_5", "bamba", "lfm2", "jamba", "recurrent_gemma"], MODES[:4]),
    *itertools.product(["kimi_linear", "minimax"], ["none", "full"]),  # experts in float64 cannot be compiled whole
]


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("family", "mode"),
    [pytest.param(*one, marks=[] if one == ("lfm2", "full") else pytest.mark.slow) for one in COMPILED],
)
def test_compiling_changes_nothing(models: Models, family: str, mode: Checkpointing) -> None:
    plain, _ = gradients(load(models(family)))
    model = load(models(family))
    compile_layers(model, backend="aot_eager")
    checkpoint_activations(model, mode)
    compiled, _ = gradients(model)
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-9, atol=1e-12) for name in plain)
    assert mode not in ("none", "full") or graphs() > 0


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_layers_are_compiled_once_for_packs_of_all_shapes() -> None:
    """In pieces; those of another depth, length and number of trees make no new graphs."""
    model = made("qwen3_5").train()
    use_tree(model)
    tree_model = TreeModel(model, "segment")
    compile_layers(model, backend="eager")
    first, second = two_trees()
    found = []
    for groups in [[first], [second], [first, second], [second, first[:3]], [first[:2]]]:
        torch.autograd.backward(tree_model(build_batch(Pack(tuple(merge(views) for views in groups)), 64)))
        found.append(graphs())
    assert found[1] == found[-1]
