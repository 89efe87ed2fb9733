"""Claims: Gated DeltaNet and Kimi Delta Attention over a tree are the recurrence along each path, token by token, in
outputs and in the gradients of all inputs, wherever the paths fork and chunks end; in the dtype of the values; finite
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
from mtr.recurrence.delta_rule import delta_rule
from mtr.tree.mask import Tree

J, H, D, E = 2, 4, 5, 3
KINDS = pytest.mark.parametrize("by_channel", [False, True], ids=["Gated DeltaNet", "Kimi"])


def inputs(tree: Tree, by_channel: bool, dtype: torch.dtype = torch.float64, heads: int = J) -> list[Tensor]:
    """Decays of about 0.1 to 0.9 a token, so that states matter."""
    total = len(tree.parent)
    generator = torch.Generator().manual_seed(total)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, total, *shape, generator=generator, dtype=torch.float64)

    query, key, value = F.normalize(normal(heads, D), dim=-1), F.normalize(normal(heads, D), dim=-1), normal(H, E)
    g = -F.softplus(normal(*([H, D] if by_channel else [H])) - 0.5)
    return [x.to(dtype) for x in (query, key, value, g, normal(H).sigmoid())]


def difference(tree: Tree, plan: ChunkPlan, given_: list[Tensor], normalize: bool = False) -> float:
    def over_tree(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out = delta_rule(query, key, value, g, beta, plan, normalize)
        assert out.dtype == value.dtype
        return out

    def along_paths(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return recurrences.delta_rule(query, key, value, g, beta, tree.parent, normalize)

    return worst_difference(over_tree, along_paths, given_)


@KINDS
@settings(deadline=None, max_examples=12)
@given(CHUNKED, st.booleans())
def test_over_a_tree_it_is_the_recurrence_of_each_path(
    by_channel: bool, case: tuple[Tree, int], normalize: bool
) -> None:
    tree, size = case
    assert difference(tree, chunk_plan(tree, size), inputs(tree, by_channel), normalize) < 1e-10


@KINDS
def test_many_chunks_of_the_usual_size(by_channel: bool) -> None:
    """Gradients too, of 4 branches off a trunk of 3 chunks."""
    tree = chain_of_forks(4, 40)
    assert difference(tree, chunk_plan(tree), inputs(tree, by_channel, heads=H)) < 1e-10


DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 2**-6)]


@KINDS
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float32", "bfloat16"])
def test_other_dtypes(by_channel: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Computed in float32: what bfloat16 loses is what its own inputs, output and gradients are rounded to."""
    tree = chain_of_forks(3, 18)
    assert difference(tree, chunk_plan(tree, 16), inputs(tree, by_channel, dtype), normalize=True) < tolerance


@KINDS
def test_gates_in_float32_beside_values_in_bfloat16(by_channel: bool) -> None:
    """As mixers have them."""
    tree = chain_of_forks(3, 18)
    given_ = inputs(tree, by_channel, torch.bfloat16)
    given_[3] = inputs(tree, by_channel, torch.float32)[3]
    assert difference(tree, chunk_plan(tree, 16), given_, normalize=True) < 2**-6


@KINDS
@pytest.mark.parametrize("g", [0.0, -50.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_of_any_strength(by_channel: bool, g: float, dtype: torch.dtype) -> None:
    """Sums of -50 a token underflow within a chunk; some heads or channels decay so, and others do not."""
    tree = chain_of_forks(3, 18)
    given_ = inputs(tree, by_channel, dtype)
    given_[3][..., ::2] = g
    assert difference(tree, chunk_plan(tree, 16), given_) < (1e-10 if dtype == torch.float64 else 2e-5)


@KINDS
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_nothing_or_everything_is_corrected(by_channel: bool, beta: float) -> None:
    tree = chain_of_forks(4, 10)
    given_ = inputs(tree, by_channel)
    given_[4][:, ::2] = beta
    assert difference(tree, chunk_plan(tree, 4), given_) < 1e-10
    given_[4].fill_(beta)
    assert difference(tree, chunk_plan(tree, 4), given_) < 1e-10


@KINDS
@pytest.mark.parametrize("fault", WRONG_STATES)
def test_a_state_from_another_place_is_noticed(by_channel: bool, fault: str) -> None:
    tree = chain_of_forks(4, 6)
    right, given_ = chunk_plan(tree, 4), inputs(tree, by_channel)
    assert difference(tree, right, given_) < 1e-10
    assert difference(tree, WRONG_STATES[fault](right), given_) > 1e-3


@KINDS
def test_padding_that_moves_a_state_is_noticed(by_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of a chunk beyond the fork, and beyond its last token."""
    tree = chain_of_forks(4, 6)
    plan, given_ = chunk_plan(tree, 4), inputs(tree, by_channel)
    monkeypatch.setattr(ChunkPlan, "before_fork", torch.ones(len(plan.above), 4, dtype=torch.bool))
    assert difference(tree, plan, given_) > 1e-3
