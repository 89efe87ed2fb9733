"""Claims: a short convolution over a tree is that of each path, in outputs and in the gradients of inputs, weights and
bias, for every width and any tree; history from across a branch is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import recurrences
from support.forests import chain_of_forks, forests
from support.recurrences import worst_difference
from torch import Tensor

from mtr.recurrence.convolution import convolution
from mtr.recurrence.segments import ConvolutionPlan, convolution_plan
from mtr.tree.mask import Tree

CHANNELS = 3


def inputs(tree: Tree, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(tree.parent))
    shapes = [(1, CHANNELS, len(tree.parent)), (CHANNELS, width), (CHANNELS,)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def difference(tree: Tree, plan: ConvolutionPlan, given_: list[Tensor]) -> float:
    used, total = plan.num_tokens, len(tree.parent)

    def over_tree(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def convolve(placed: Tensor) -> Tensor:
            width = weight.shape[1]
            return F.conv1d(placed, weight[:, None], bias, padding=width - 1, groups=CHANNELS)[..., : placed.shape[2]]

        return convolution(convolve, x, plan)

    def along_paths(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = recurrences.convolution(x, weight, bias, tree.parent)
        return torch.cat([out[..., :used], out.new_zeros(1, CHANNELS, total - used)], -1)

    return worst_difference(over_tree, along_paths, given_)


@settings(deadline=None, max_examples=30)
@given(st.one_of(forests(1), forests(4)), st.integers(1, 4))
def test_over_a_tree_it_is_the_convolution_of_each_path(tree: Tree, width: int) -> None:
    assert difference(tree, convolution_plan(tree, width), inputs(tree, width)) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    tree = chain_of_forks(4, 6)
    plan, (x, weight, bias) = convolution_plan(tree, 4), inputs(tree, 4, dtype)
    assert convolution(lambda placed: placed, x, plan).dtype == dtype
    assert difference(tree, plan, [x, weight, bias]) < tolerance


def row_before(plan: ConvolutionPlan, _: Tree) -> ConvolutionPlan:
    """What comes before in the row, wherever it belongs."""
    taken = torch.zeros_like(plan.gather, dtype=torch.bool)
    taken[plan.keep] = True
    gather = plan.gather.clone()
    for place in range(len(gather) - 2, -1, -1):
        if not taken[place]:
            before = gather[place + 1] - 1
            gather[place] = before if 0 <= before < plan.num_tokens - 1 else plan.num_tokens
    return replace(plan, gather=gather)


def nothing_above(plan: ConvolutionPlan, _: Tree) -> ConvolutionPlan:
    taken = torch.zeros_like(plan.gather, dtype=torch.bool)
    taken[plan.keep] = True
    return replace(plan, gather=torch.where(taken, plan.gather, plan.num_tokens))


FAULTS: dict[str, Callable[[ConvolutionPlan, Tree], ConvolutionPlan]] = {
    "what is before in the row": row_before,
    "nothing above a branch": nothing_above,
}


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_history_from_another_branch_is_noticed(fault: str, width: int) -> None:
    tree = chain_of_forks(4, 6)
    right, given_ = convolution_plan(tree, width), inputs(tree, width)
    assert difference(tree, right, given_) < 1e-10
    assert difference(tree, FAULTS[fault](right, tree), given_) > 1e-3
