"""Claims: Mamba-1's scan over a tree is the recurrence along each path, token by token, in outputs and in the gradients
of all inputs, level by level or in chunks, in blocks of any size; along one path it is what transformers' own function
computes; in float32 or better, finite however fast it decays; its work grows with the tokens, as that of transformers'
own does not. The state of another segment or chunk, and padding that moves a state, are noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import recurrences
from support.forests import (
    CHUNKED,
    WRONG_LEVELS,
    WRONG_STATES,
    by_chunks,
    by_levels,
    chain_of_forks,
    forked_branches,
)
from support.masks import tree_of
from support.recurrences import worst_difference
from support.trees import view
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mtr.attention.masks import TreeAttention
from mtr.recurrence import kinds
from mtr.recurrence import selective_scan as scans
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.segments import level_plan
from mtr.recurrence.selective_scan import selective_scan, step_sizes
from mtr.tree.mask import FULL, Tree

E, S = 4, 3


def inputs(total: int, dtype: torch.dtype = torch.float64, channels: int = E) -> list[Tensor]:
    """Hidden states, dt, A, B, C and D; decays of about 0.1 to 0.9 a token, so that states matter."""
    generator = torch.Generator().manual_seed(total)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt, rate = F.softplus(normal(1, channels, total)), -normal(channels, S).exp()
    made = [normal(1, channels, total), dt, rate, normal(1, S, total), normal(1, S, total), normal(channels)]
    return [x.to(dtype) for x in made]


def difference(tree: Tree, along: Any, given_: list[Tensor]) -> float:
    def over_tree(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor) -> Tensor:
        out = selective_scan(x, dt, rate, write, read, skip, along)
        assert out.dtype == torch.promote_types(x.dtype, torch.float32)
        return out

    def along_paths(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor) -> Tensor:
        return recurrences.selective_scan(x, dt, rate, write, read, skip, tree.parent)

    return worst_difference(over_tree, along_paths, given_)


def tokens(tree: Tree) -> int:
    return len(tree.parent)


@settings(deadline=None, max_examples=30)
@given(CHUNKED, st.booleans(), st.sampled_from([1, 3]), st.sampled_from([1, 2**16]))
def test_over_a_tree_it_is_the_recurrence_of_each_path(
    case: tuple[Tree, int], chunked: bool, least: int, entries: int
) -> None:
    tree, size = case
    along = by_chunks(chunk_plan(tree, size)) if chunked else by_levels(level_plan(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "_BLOCK_TOKENS", least)
        patch.setitem(scans._BLOCK_ENTRIES, "cpu", entries)
        assert difference(tree, along, inputs(tokens(tree))) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Computed, and returned, in float32: what bfloat16 loses is what its gradients are rounded to."""
    tree = chain_of_forks(3, 18)
    for along in (by_levels(level_plan(tree)), by_chunks(chunk_plan(tree, 16))):
        assert difference(tree, along, inputs(tokens(tree), dtype)) < tolerance


@pytest.mark.parametrize("dt", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_of_any_strength(dt: float, dtype: torch.dtype) -> None:
    tree = chain_of_forks(3, 18)
    given_ = inputs(tokens(tree), dtype)
    given_[1][:, ::2] = dt
    for along in (by_levels(level_plan(tree)), by_chunks(chunk_plan(tree, 16))):
        assert difference(tree, along, given_) < (1e-10 if dtype == torch.float64 else 2e-5)


def one_path(length: int) -> Tree:
    return tree_of([view([0], list(range(1, length)))])


def test_along_one_path_it_is_the_function_of_transformers() -> None:
    """With the step sizes that it makes of dt: bias and softplus."""
    length = 17
    x, dt, rate, write, read, skip = inputs(length)
    dt, bias = dt - 1, torch.linspace(-2, 2, E, dtype=torch.float64)
    theirs = mamba_selective_scan(x, dt, rate, write, read, skip, delta_bias=bias, delta_softplus=True)
    steps = step_sizes(dt, bias, True)
    ours = selective_scan(x, steps, rate, write, read, skip, by_levels(level_plan(one_path(length))))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # theirs is partly in float32
    torch.testing.assert_close(step_sizes(dt, None, False), dt)
    assert step_sizes(dt.bfloat16(), bias, True).dtype == torch.float32


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entries of what operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not function.is_view:
            self.entries += out.numel()
        return out


def work(scan: Callable[..., Tensor], length: int) -> int:
    given_ = [x.requires_grad_() for x in inputs(length)]
    counted = _Work()
    with counted:
        torch.autograd.backward(scan(*given_).sum())
    return counted.entries


def test_its_work_grows_with_the_tokens() -> None:
    def ours(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor) -> Tensor:
        return selective_scan(x, dt, rate, write, read, skip, by_levels(level_plan(one_path(x.shape[2]))))

    assert work(ours, 128) < 2.1 * work(ours, 64)
    assert work(mamba_selective_scan, 128) > 3 * work(mamba_selective_scan, 64), "it is quadratic no longer"


@pytest.mark.parametrize(("device", "way"), [("cpu", "levels"), ("meta", "chunks")])
def test_the_way_along_a_tree_is_that_of_the_device(device: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few launches off the CPU; the scan of this test runs on it anyway."""
    tree, taken = chain_of_forks(3, 18), []
    for name in ("levels", "chunks"):
        function = getattr(kinds, f"scan_{name}")

        def noted(*arguments: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            taken.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(kinds, f"scan_{name}", noted)
    along = kinds._along(TreeAttention(tree, [FULL], "segment"), torch.empty(0, device=device))
    assert difference(tree, along, inputs(tokens(tree))) < 1e-10
    assert taken == [way]


@pytest.mark.parametrize("fault", WRONG_LEVELS)
def test_another_state_is_noticed(fault: str) -> None:
    tree = forked_branches()
    given_, plan = inputs(tokens(tree)), level_plan(tree)
    assert difference(tree, by_levels(plan), given_) < 1e-10
    assert difference(tree, by_levels(WRONG_LEVELS[fault](plan)), given_) > 1e-3


@pytest.mark.parametrize("fault", WRONG_STATES)
def test_the_state_of_another_chunk_is_noticed(fault: str) -> None:
    tree = chain_of_forks(4, 6)
    given_, plan = inputs(tokens(tree)), chunk_plan(tree, 4)
    assert difference(tree, by_chunks(plan), given_) < 1e-10
    assert difference(tree, by_chunks(WRONG_STATES[fault](plan)), given_) > 1e-3
