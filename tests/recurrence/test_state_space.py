"""Claims: Mamba-2 and lightning attention over a tree are the recurrence along each path, token by token, in outputs
and in the gradients of all inputs, wherever the paths fork and chunks end; computed in float32 or better; finite
however fast they decay. A state taken from another place than the fork is noticed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import recurrences
from support.forests import CHUNKED, WRONG_STATES, chain_of_forks
from support.recurrences import worst_difference
from torch import Tensor

from mtr.recurrence.chunks import ChunkPlan, chunk_plan
from mtr.recurrence.state_space import state_space, step_sizes
from mtr.tree.mask import Tree

H, P, N = 4, 3, 5


def inputs(tree: Tree, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, dt, A, B, C and D; decays of about 0.1 to 0.9 a token, so that states matter."""
    total = len(tree.parent)
    generator = torch.Generator().manual_seed(total)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt, rate = F.softplus(normal(1, total, H)), -normal(H).exp()
    x, key, query = normal(1, total, H, P), normal(1, total, groups, N), normal(1, total, groups, N)
    return [y.to(dtype) for y in (x, dt, rate, key, query, normal(H))]


def difference(tree: Tree, plan: ChunkPlan, given_: list[Tensor]) -> float:
    def over_tree(x: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, skip: Tensor) -> Tensor:
        out = state_space(x, dt, rate, key, query, skip, plan)
        assert out.dtype == torch.promote_types(x.dtype, torch.float32)
        return out

    def along_paths(x: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, skip: Tensor) -> Tensor:
        return recurrences.state_space(x, dt, rate, key, query, skip, tree.parent)

    return worst_difference(over_tree, along_paths, given_)


@settings(deadline=None, max_examples=15)
@given(CHUNKED, st.sampled_from([1, 2, 4]))
def test_over_a_tree_it_is_the_recurrence_of_each_path(case: tuple[Tree, int], groups: int) -> None:
    tree, size = case
    assert difference(tree, chunk_plan(tree, size), inputs(tree, groups)) < 1e-10


def test_many_chunks_of_the_usual_size() -> None:
    """Gradients too, of 4 branches off a trunk of 3 chunks."""
    tree = chain_of_forks(4, 40)
    assert difference(tree, chunk_plan(tree), inputs(tree)) < 1e-10


@settings(deadline=None, max_examples=10)
@given(CHUNKED)
def test_lightning_attention_is_a_state_space_of_equal_steps(case: tuple[Tree, int]) -> None:
    """Nothing is learned of its decay, so its gradients are those of query, key and value."""
    tree, size = case
    slope, plan = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64), chunk_plan(tree, size)
    value, _, _, key, query, _ = inputs(tree, H)

    def over_tree(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return state_space(value, torch.ones_like(value[..., 0]), -slope, key, query, None, plan)

    def along_paths(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return recurrences.lightning(query, key, value, slope, tree.parent)

    assert worst_difference(over_tree, along_paths, [query, key, value]) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Computed, and returned, in float32: what bfloat16 loses is what its gradients are rounded to."""
    tree = chain_of_forks(3, 18)
    assert difference(tree, chunk_plan(tree, 16), inputs(tree, dtype=dtype)) < tolerance


@pytest.mark.parametrize("dt", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_of_any_strength(dt: float, dtype: torch.dtype) -> None:
    """Sums of -50 a token underflow within a chunk; some heads decay so, and others do not."""
    tree = chain_of_forks(3, 18)
    given_ = inputs(tree, dtype=dtype)
    given_[1][..., ::2] = dt
    assert difference(tree, chunk_plan(tree, 16), given_) < (1e-10 if dtype == torch.float64 else 2e-5)


def test_step_sizes() -> None:
    """In the dtype that they are given in, as transformers has it."""
    dt, bias = torch.tensor([[[-1.0, 0.5, 30.0]]]), torch.tensor([0.5, 0.0, -1.0])
    exact = torch.log1p((dt + bias).exp())
    torch.testing.assert_close(step_sizes(dt, bias, True, (0.0, float("inf"))), exact)
    torch.testing.assert_close(step_sizes(dt, None, False, (-0.5, 1.0)), torch.tensor([[[-0.5, 0.5, 1.0]]]))
    for dtype in (torch.bfloat16, torch.float64):
        assert step_sizes(dt.to(dtype), bias, True, (0.0, 1.0)).dtype == dtype


@pytest.mark.parametrize("fault", WRONG_STATES)
def test_a_state_from_another_place_is_noticed(fault: str) -> None:
    tree = chain_of_forks(4, 6)
    right, given_ = chunk_plan(tree, 4), inputs(tree)
    assert difference(tree, right, given_) < 1e-10
    assert difference(tree, WRONG_STATES[fault](right), given_) > 1e-3


def test_padding_that_moves_a_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of a chunk beyond the fork, and beyond its last token."""
    tree = chain_of_forks(4, 6)
    plan, given_ = chunk_plan(tree, 4), inputs(tree)
    monkeypatch.setattr(ChunkPlan, "before_fork", torch.ones(len(plan.above), 4, dtype=torch.bool))
    assert difference(tree, plan, given_) > 1e-3
