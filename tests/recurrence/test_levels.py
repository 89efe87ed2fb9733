"""Claims: any scan over a tree, linear or not, is that of each path, in outputs and in gradients; rows that are filled
up leave the state of a shorter one alone; a state from another segment, and padding that moves it, are noticed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forests import WRONG_LEVELS, chain_of_forks, forests, forked_branches
from support.recurrences import along_paths, worst_difference
from torch import Tensor

from mtr.recurrence.levels import scan_levels
from mtr.recurrence.segments import LevelPlan, level_plan
from mtr.tree.mask import Tree

WIDTH = 3


def inputs(tree: Tree) -> list[Tensor]:
    """x, gate, and the matrix of the state."""
    generator = torch.Generator().manual_seed(len(tree.parent))
    shapes = [(1, len(tree.parent), WIDTH), (1, len(tree.parent), 1), (WIDTH, WIDTH)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def step(x: Tensor, gate: Tensor, matrix: Tensor, state: Tensor) -> Tensor:
    """A recurrence that is not linear; a gate of zero leaves the state alone."""
    return state + gate * torch.tanh(x + state @ matrix)


def difference(tree: Tree, plan: LevelPlan) -> float:
    def over_tree(x: Tensor, gate: Tensor, matrix: Tensor) -> Tensor:
        def scan(rows: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
            x, gate = rows
            state = x.new_zeros(len(x), WIDTH) if state is None else state
            outs = []
            for t in range(x.shape[1]):
                state = step(x[:, t], gate[:, t], matrix, state)
                outs.append(state * 2)
            return torch.stack(outs, 1), state

        return scan_levels(scan, [x, gate], plan)

    def by_token(x: Tensor, gate: Tensor, matrix: Tensor) -> Tensor:
        def one(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
            state = step(x[0, t], gate[0, t], matrix, state)
            return state * 2, state

        return along_paths(one, x.new_zeros(WIDTH), tree.parent)

    return worst_difference(over_tree, by_token, inputs(tree))


@settings(deadline=None, max_examples=20)
@given(st.one_of(forests(1), forests(4), forests(16)))
def test_over_a_tree_it_is_the_scan_of_each_path(tree: Tree) -> None:
    assert difference(tree, level_plan(tree)) < 1e-10


@pytest.mark.parametrize("fault", WRONG_LEVELS)
def test_another_state_is_noticed(fault: str) -> None:
    """Branches that fork again, of 3 to 5 tokens."""
    tree = forked_branches()
    assert difference(tree, level_plan(tree)) < 1e-10
    assert difference(tree, WRONG_LEVELS[fault](level_plan(tree))) > 1e-3


def test_a_deep_tree() -> None:
    tree = chain_of_forks(12, 2)
    assert difference(tree, level_plan(tree)) < 1e-10
