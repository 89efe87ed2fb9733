"""Claims: Mamba-2 and lightning attention over a tree, in one call of a kernel for rows of equal length, are the
recurrence along each path, in outputs and in the gradients of all inputs, wherever rows end, by either package's
kernel. A state of another row is noticed.

The kernels are references in torch with the signatures of mamba-ssm's and flash-linear-attention's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support import recurrences
from support.forests import CHUNKED, chain_of_forks
from support.recurrences import worst_difference
from support.recurrent_kernels import chunk_simple_gla, mamba_chunk_scan_combined, state_space_inputs
from torch import Tensor

from mtr.recurrence.kernels import RowScan, by_mamba, by_simple
from mtr.recurrence.rows import RowPlan, row_plan, state_space_by_rows
from mtr.recurrence.segments import segments
from mtr.tree.mask import Tree

SCANS = {"mamba-ssm": by_mamba(mamba_chunk_scan_combined), "fla": by_simple(chunk_simple_gla)}
over: Any = state_space_by_rows
PACKAGES = pytest.mark.parametrize("package", SCANS)


def inputs(tree: Tree, groups: int = 2) -> list[Tensor]:
    return state_space_inputs(len(tree.parent), (4, groups), (3, 5))


def difference(tree: Tree, plan: RowPlan, scan: RowScan, given_: list[Tensor]) -> float:
    def over_tree(*given_: Tensor) -> Tensor:
        out: Tensor = over(scan, *given_, plan)
        return out

    def along_paths(*given_: Tensor) -> Tensor:
        x, dt, rate, key, query, skip = given_
        return recurrences.state_space(x, dt, rate, key, query, skip, tree.parent)

    return worst_difference(over_tree, along_paths, given_)


@PACKAGES
@settings(deadline=None, max_examples=10)
@given(CHUNKED)
def test_over_a_tree_it_is_the_recurrence_of_each_path(package: str, case: tuple[Tree, int]) -> None:
    tree, length = case
    assert difference(tree, row_plan(tree, length), SCANS[package], inputs(tree)) < 1e-10


@PACKAGES
def test_a_head_of_its_own_for_every_key(package: str) -> None:
    tree = chain_of_forks(5, 7)
    assert difference(tree, row_plan(tree, 4), SCANS[package], inputs(tree, groups=4)) < 1e-10


@pytest.mark.parametrize("turns", [2, 12])
def test_one_call_however_deep(turns: int) -> None:
    """A trunk of one segment a turn, of two rows each; the end of the last is a leaf."""
    tree, calls = chain_of_forks(turns, 8), []

    def scan(*given_: Any) -> Any:
        calls.append(len(given_[0]))
        return SCANS["fla"](*given_)

    plan = row_plan(tree, 4)
    over(scan, *inputs(tree), plan)
    assert calls == [len(plan.valid)]
    assert len(plan.valid) == sum(-(-(e - s) // 4) for s, e in zip(*_segments(tree), strict=True))


def _segments(tree: Tree) -> tuple[list[int], list[int]]:
    found = segments(tree)
    return found.start.tolist(), found.end.tolist()


def test_no_row_is_continued_where_every_path_is_one() -> None:
    assert row_plan(chain_of_forks(1, 8), 16).continued is None


WRONG: dict[str, Callable[[RowPlan], RowPlan]] = {
    "a sibling's state": lambda plan: replace(plan, before=plan.before.roll(1)),
    "padding that moves a state": lambda plan: replace(plan, valid=torch.ones_like(plan.valid)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_state_is_noticed(fault: str) -> None:
    tree = chain_of_forks(4, 5)
    plan, given_ = row_plan(tree, 4), inputs(tree)
    assert difference(tree, plan, SCANS["fla"], given_) < 1e-10
    assert difference(tree, WRONG[fault](plan), SCANS["fla"], given_) > 1e-3


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whoever asks for one, or mixes them with others, fails."""
    meta, tree = torch.device("meta"), chain_of_forks(5, 3)
    there = Tree(tree.subtree_end.to(meta), tree.position_ids.to(meta), tree.parent)

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:  # noqa: N803
        state = x.new_empty(len(x), x.shape[2], B.shape[-1], x.shape[3]) * A[:, None, None]
        return x * dt[..., None], state

    given_ = [x.to(meta).requires_grad_() for x in inputs(tree)]
    out = over(scan, *given_, row_plan(there, 2))
    out.sum().backward()
    assert out.device == meta
