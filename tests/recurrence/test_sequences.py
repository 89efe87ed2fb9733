"""Claims: Gated DeltaNet and Kimi Delta Attention over a tree, in two calls of a kernel for sequences of many lengths,
are the recurrence along each path, in outputs and in the gradients of all inputs; one call where no path is shared; the
work beside the calls grows with the logarithm of the depth. A state of another segment, or a start that is not the
identity, is noticed.

The kernel is a reference in torch with the signature of flash-linear-attention's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import recurrences
from support.forests import chain_of_forks, forests, num_used
from support.masks import random_forest
from support.recurrences import worst_difference
from support.recurrent_kernels import chunk_gated_delta_rule, delta_rule_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtr.recurrence.kernels import Sequences, varlen_scan
from mtr.recurrence.sequences import SegmentPlan, delta_rule_by_segments, segment_plan
from mtr.tree.mask import Tree

KINDS = pytest.mark.parametrize("by_channel", [False, True], ids=["Gated DeltaNet", "Kimi"])
J, H, D, E = 2, 4, 5, 3
over: Any = delta_rule_by_segments


def inputs(tree: Tree, by_channel: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    heads = (H if by_channel else J, H)
    return [x.to(dtype) for x in delta_rule_inputs(len(tree.parent), heads, (D, E), by_channel)]


def difference(tree: Tree, given_: list[Tensor], plan: SegmentPlan | None = None, normalize: bool = True) -> float:
    scan = varlen_scan(chunk_gated_delta_rule, normalize)

    def over_tree(*given_: Tensor) -> Tensor:
        out = over(scan, *given_, plan or segment_plan(tree))
        return _without_padding(out, tree)

    def along_paths(*given_: Tensor) -> Tensor:
        query, key, value, g, beta = given_
        return _without_padding(recurrences.delta_rule(query, key, value, g, beta, tree.parent, normalize), tree)

    return worst_difference(over_tree, along_paths, given_)


def _without_padding(x: Tensor, tree: Tree) -> Tensor:
    return x[:, : num_used(tree)]


@KINDS
@settings(deadline=None, max_examples=10)
@given(forests(), st.booleans())
def test_over_a_tree_it_is_the_recurrence_of_each_path(by_channel: bool, tree: Tree, normalize: bool) -> None:
    assert difference(tree, inputs(tree, by_channel), normalize=normalize) < 1e-10


def test_a_deep_trunk_in_float32() -> None:
    tree = chain_of_forks(20, 3)
    assert difference(tree, inputs(tree, False, torch.float32)) < 1e-5


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _work(tree: Tree) -> tuple[list[int], int]:
    """Sequences of each call of the kernel, and operators beside them, forward and backward."""
    calls: list[int] = []

    def scan(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial: Any, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        calls.append(len(sequences))
        state = value.new_ones(len(sequences), value.shape[2], key.shape[3], value.shape[3])
        return value, state * value.sum() if initial is None else initial + value.sum()

    given_, plan = [x.requires_grad_() for x in inputs(tree, False)], segment_plan(tree)
    with _Counted() as counted:
        over(scan, *given_, plan).sum().backward()
    return calls, counted.calls


def test_two_calls_and_few_operators_however_deep() -> None:
    calls, few = _work(chain_of_forks(4, 2))
    assert calls == [3, 7]
    calls, many = _work(chain_of_forks(64, 2))
    assert calls == [63, 127]
    assert many < few + 4 * 30, "the depth doubles four times"


def test_one_call_where_nothing_is_shared() -> None:
    tree = chain_of_forks(1, 5)
    assert _work(tree)[0] == [1]
    assert segment_plan(tree).continued is None


def test_padding_is_a_sequence_of_its_own() -> None:
    tree = random_forest(3, 12, padding_to=64)
    plan = segment_plan(tree)
    assert plan.every.cu_seqlens_cpu[-2:].tolist() == [num_used(tree), len(tree.parent)]
    assert plan.continued is not None
    assert plan.before[-1] == len(plan.continued), "it begins with zeros"


def _another_start(plan: SegmentPlan) -> SegmentPlan:
    changed = replace(plan, _starts={})
    changed.start(H, D, E).mul_(0.9)
    return changed


WRONG: dict[str, Callable[[SegmentPlan], SegmentPlan]] = {
    "a sibling's state": lambda plan: replace(plan, before=plan.before.roll(1)),
    "the root's state": lambda plan: replace(plan, before=plan.before.where(plan.before == plan.before.max(), 0)),
    "another start": _another_start,
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_state_is_noticed(fault: str) -> None:
    tree = chain_of_forks(4, 3)
    given_ = inputs(tree, False)
    assert difference(tree, given_, segment_plan(tree)) < 1e-10
    assert difference(tree, given_, WRONG[fault](segment_plan(tree))) > 1e-3


def test_a_kernel_without_the_gradient_of_its_first_state_is_noticed() -> None:
    tree = chain_of_forks(4, 3)
    given_ = inputs(tree, False)
    scan: Any = varlen_scan(chunk_gated_delta_rule, False)

    def detached(*given_: Any) -> Any:
        *inputs_, initial, sequences = given_
        return scan(*inputs_, None if initial is None else initial.detach(), sequences)

    def over_tree(scan: Any) -> Callable[..., Tensor]:
        return lambda *given_: over(scan, *given_, segment_plan(tree))

    assert worst_difference(over_tree(scan), over_tree(scan), given_) == 0
    assert worst_difference(over_tree(detached), over_tree(scan), given_) > 1e-3


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whoever asks for one, or mixes them with others, fails."""
    meta, tree = torch.device("meta"), chain_of_forks(5, 3)
    there = Tree(tree.subtree_end.to(meta), tree.position_ids.to(meta), tree.parent)

    def scan(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial: Any, sequences: Any) -> Any:
        assert sequences.cu_seqlens.device == meta
        assert sequences.cu_seqlens_cpu.device.type == "cpu"
        state = value.new_empty(len(sequences), value.shape[2], key.shape[3], value.shape[3])
        return value, state if initial is None else initial + state

    given_ = [x.to(meta).requires_grad_() for x in inputs(tree, False)]
    out = over(scan, *given_, segment_plan(there))
    out.sum().backward()
    assert out.device == meta
