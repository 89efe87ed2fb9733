"""Claims: the real-gated linear recurrent unit over a tree is the recurrence along each path, token by token, in its
outputs and the gradients of its inputs, level by level or in chunks; in float32 or better. The block around it, left as
it is, convolves and scans over the tree, and is as before without one; one that does neither any more is refused. The
state of another segment or chunk, and padding that moves a state, are noticed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forests import (
    CHUNKED,
    WRONG_LEVELS,
    WRONG_STATES,
    by_chunks,
    by_levels,
    chain_of_forks,
    forked_branches,
)
from support.recurrences import along_paths, worst_difference
from torch import Tensor
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.errors import UserError
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.kinds import KINDS
from mtr.recurrence.rg_lru import rg_lru
from mtr.recurrence.segments import level_plan
from mtr.tree.mask import FULL, Tree

WIDTH = 4


def inputs(tree: Tree, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x and a gate between 0 and 1."""
    generator = torch.Generator().manual_seed(len(tree.parent))
    x, gate = torch.randn(2, 1, len(tree.parent), WIDTH, generator=generator, dtype=torch.float64)
    return [x.to(dtype), gate.sigmoid().to(dtype)]


def recurrence(x: Tensor, gate: Tensor, parent: Any) -> Tensor:
    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = gate[0, t] * state + x[0, t]
        return state, state

    return along_paths(step, torch.zeros_like(x[0, 0]), parent)


def difference(tree: Tree, along: Any, given_: list[Tensor]) -> float:
    def over_tree(x: Tensor, gate: Tensor) -> Tensor:
        out = rg_lru(x, gate, along)
        assert out.dtype == torch.promote_types(x.dtype, torch.float32)
        return out

    return worst_difference(over_tree, lambda x, gate: recurrence(x, gate, tree.parent), given_)


@settings(deadline=None, max_examples=30)
@given(CHUNKED, st.booleans())
def test_over_a_tree_it_is_the_recurrence_of_each_path(case: tuple[Tree, int], chunked: bool) -> None:
    tree, size = case
    along = by_chunks(chunk_plan(tree, size)) if chunked else by_levels(level_plan(tree))
    assert difference(tree, along, inputs(tree)) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    tree = chain_of_forks(3, 18)
    for along in (by_levels(level_plan(tree)), by_chunks(chunk_plan(tree, 16))):
        assert difference(tree, along, inputs(tree, dtype)) < tolerance


@pytest.mark.parametrize("fault", WRONG_LEVELS)
def test_another_state_is_noticed(fault: str) -> None:
    tree = forked_branches()
    plan = level_plan(tree)
    assert difference(tree, by_levels(plan), inputs(tree)) < 1e-10
    assert difference(tree, by_levels(WRONG_LEVELS[fault](plan)), inputs(tree)) > 1e-3


@pytest.mark.parametrize("fault", WRONG_STATES)
def test_the_state_of_another_chunk_is_noticed(fault: str) -> None:
    tree = chain_of_forks(4, 6)
    plan = chunk_plan(tree, 4)
    assert difference(tree, by_chunks(plan), inputs(tree)) < 1e-10
    assert difference(tree, by_chunks(WRONG_STATES[fault](plan)), inputs(tree)) > 1e-3


# --- the block --------------------------------------------------------------------------------------------------------


def block() -> Any:
    config = transformers.RecurrentGemmaConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, lru_width=8, conv1d_width=3
    )
    torch.manual_seed(0)
    made = RecurrentGemmaRecurrentBlock(config, 0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def run(made: Any, x: Tensor, position_ids: Tensor, tree: TreeHandle | None = None) -> Tensor:
    around: Any = next(kind.around for kind in KINDS if kind.name == "RG-LRU")
    over_tree = around(RecurrentGemmaRecurrentBlock.forward)
    out: Tensor = over_tree(made, x, position_ids[None], None, use_cache=False, tree=tree)[0]
    return out


def handle(tree: Tree) -> TreeHandle:
    return TreeHandle(TreeAttention(tree, [FULL], "segment"))


def paths(parent: Any) -> list[list[int]]:
    found = []
    for leaf in set(range(len(parent))) - set(parent.tolist()):
        path = [leaf]
        while parent[path[0]] >= 0:
            path.insert(0, int(parent[path[0]]))
        found.append(path)
    return found


def test_a_block_follows_the_tree() -> None:
    """Against each path by itself, through the forward that the block has anyway, whose state is in float32."""
    tree, made = chain_of_forks(3, 5), block()
    x = torch.randn(1, len(tree.parent), 6, dtype=torch.float64)
    out = run(made, x, tree.position_ids, handle(tree))
    for path in paths(tree.parent):
        alone = run(made, x[:, path], tree.position_ids[path])
        torch.testing.assert_close(out[:, path], alone, rtol=0, atol=1e-5)


def test_a_block_that_scans_elsewhere_is_refused() -> None:
    """Its state would go along the row, unnoticed."""
    tree, made = chain_of_forks(3, 5), block()
    made.rg_lru.forward = lambda activations, position_ids: activations
    x = torch.randn(1, len(tree.parent), 6, dtype=torch.float64)
    with pytest.raises(UserError, match=r"RecurrentGemmaRecurrentBlock of transformers \d.* rg_lru._rnn_scan"):
        run(made, x, tree.position_ids, handle(tree))
