"""Flex attention of trees, forward and backward, as Inductor emits it for CUDA, against dense attention in float64.

The project's operator is called on CUDA tensors as a model calls it; autograd, Inductor and its launching code are the
real ones. Small heads and float32 get the block sizes that training has where a case does not say otherwise: its
kernels at a precision that shows a wrong term.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import mtr.attention.interface  # noqa: F401  (registers the operator)
from mtr.attention import flex_kernels
from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.tree.mask import FULL, Span, Tree, dense_mask
from support.attention import Case, dense_attention, inputs
from support.cuda.host_memory import CUDA
from support.cuda.numerics import Result
from support.masks import tree_of
from support.trees import view

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


class Numbers(NamedTuple):
    name: str
    case: Case
    span: Span = FULL
    dtype: torch.dtype = torch.float32
    tokens: Sequence[int] = (200,)
    """Of packs one after another, before padding to a multiple of 128; one kernel serves all of them."""
    own_blocks: bool = False
    """Those that Inductor chooses for the case, 16 x 16 in the backward."""
    quick: bool = False


_PLAIN = Case(key_size=16, value_size=16)
_BFLOAT16 = torch.bfloat16
CASES = [
    Numbers("4:2 heads", _PLAIN, tokens=(200, 300), quick=True),
    Numbers("window of 24", _PLAIN, Span("sliding", 24)),
    Numbers("window of 150", _PLAIN, Span("sliding", 150), tokens=(500,)),
    Numbers("chunks of 32", _PLAIN, Span("chunked", 32), tokens=(200, 300)),
    Numbers("sinks", _PLAIN._replace(sinks=True), tokens=(200, 300)),
    Numbers("soft cap", _PLAIN._replace(softcap=1.5)),
    Numbers("sinks, soft cap, window", _PLAIN._replace(sinks=True, softcap=2.0), Span("sliding", 24), quick=True),
    Numbers("7:1 heads", Case(7, 1, 16, 16), tokens=(100,), quick=True),
    Numbers("14:2 heads", Case(14, 2, 16, 16), tokens=(100, 200)),
    Numbers("one head each", Case(2, 2, 16, 16)),
    Numbers("head size 8, widened", Case(2, 1, 8, 8)),
    Numbers("head sizes 24 and 16", Case(4, 2, 24, 16), tokens=(100, 200)),
    Numbers("head size 64, sinks", Case(2, 1, 64, 64, sinks=True)),
    Numbers("head size 128", Case(2, 1, 128, 128), quick=True),
    Numbers("head sizes 192 and 128", Case(1, 1, 192, 128)),
    Numbers("head size 256, soft cap", Case(2, 1, 256, 256, softcap=2.0)),
    Numbers("blocks seen whole", Case(2, 1, 16, 16), tokens=(640,)),
    Numbers("blocks of 16", Case(2, 1, 16, 16), own_blocks=True),
    Numbers("bfloat16, blocks of 16", Case(2, 1, 16, 16), dtype=_BFLOAT16, own_blocks=True),
    Numbers("bfloat16", _PLAIN, dtype=_BFLOAT16, tokens=(200, 300)),
    Numbers("bfloat16, 7:1 heads, sinks", Case(7, 1, 16, 16, sinks=True), dtype=_BFLOAT16),
    Numbers("bfloat16, soft cap, chunks of 32", _PLAIN._replace(softcap=1.5), Span("chunked", 32), _BFLOAT16),
    Numbers("bfloat16, head size 128, window", Case(2, 1, 128, 128), Span("sliding", 24), _BFLOAT16, quick=True),
]


def compare(quick: bool) -> Iterator[Result]:
    """Each result as soon as it is known."""
    for numbers in CASES:
        if numbers.quick or not quick:
            yield from _results(numbers)
    yield from _controls()


def _results(numbers: Numbers) -> Iterator[Result]:
    flex_kernels._kernels.clear()
    compiled = Compiled()
    for tokens in numbers.tokens:
        tree, began = forest(tokens, seed=tokens), time.perf_counter()
        with compiled.watched(), _blocks(numbers.own_blocks):
            found = differences(tree, numbers)
        name = f"{numbers.name}, {tokens} tokens"
        tolerance, seconds = TOLERANCE[numbers.dtype], time.perf_counter() - began
        yield Result(name, found, tolerance, seconds, kernels=compiled.attention_kernels)
    assert len(flex_kernels._kernels) == 2, "a forward and a backward for packs of all lengths"


def forest(tokens: int, seed: int) -> Tree:
    """Conversations whose views leave each other anywhere, branches off branches among them; padded as packs are."""
    rng = np.random.default_rng(seed)
    groups, left = [], tokens
    while left > 1:
        path, views, size = [int(rng.integers(0, 99))], [], 1
        while size < min(left, 120):
            new = rng.integers(0, 10**6, min(int(rng.integers(1, 40)), left - size)).tolist()
            path = path[: rng.integers(1, len(path) + 1)] + new
            views.append(view(path[:1], path[1:]))
            size += len(new)
        groups.append(views)
        left -= size
    return tree_of(*groups, padding_to=128)


def differences(tree: Tree, numbers: Numbers, on_device: Tree | None = None) -> dict[str, float]:
    """Of the output, its log-sum-exp and the gradients to the reference, relative to its largest element.

    Args:
        on_device: what the kernels are given in place of the tree.
    """
    case, scale = numbers.case, 1.7 * numbers.case.key_size**-0.5
    given, mask = inputs(case, len(tree.parent), numbers.dtype), dense_mask(tree, numbers.span)
    there = on_device or tree
    there = Tree(there.subtree_end.to(CUDA), there.position_ids.to(CUDA), there.parent)
    handle = TreeHandle(TreeAttention(there, [numbers.span], "flex")).tensor

    def ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.mtr.tree_attention(q, k, v, handle, 0, scale, case.softcap, s)
        return out.transpose(1, 2), lse

    def dense(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        out = dense_attention(q, k, v, mask, scale, case.softcap, s)
        return out, _log_sum_exp(q, k, mask, scale, case.softcap, s)

    found, wanted = _outcome(ours, [x.to(CUDA) for x in given]), _outcome(dense, [x.double() for x in given])
    assert found.keys() == wanted.keys()
    return {name: float((found[name].cpu() - x).abs().max() / x.abs().max()) for name, x in wanted.items()}


def _log_sum_exp(
    query: Tensor, key: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[1, H, T]"""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.view(1, -1, 1))


def _outcome(attend: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor]) -> dict[str, Tensor]:
    query, key, value, grad_out, *sinks = given
    leaves = [x.detach().requires_grad_() for x in (query, key, value, *sinks)]
    out, lse = attend(*leaves[:3], leaves[3] if sinks else None)
    grads = torch.autograd.grad(out, leaves, grad_out)
    names = ("out", "lse", "query", "key", "value", "sinks")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=False))


@contextlib.contextmanager
def _blocks(own: bool) -> Iterator[None]:
    """Those of training, bfloat16 and head size 128 or what is larger than 32, unless the case's own."""
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    def of_training(choose: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(heuristic: Any, size: int, dtype: torch.dtype) -> Any:
            return choose(heuristic, size, dtype) if own else choose(heuristic, size if size > 32 else 128, _BFLOAT16)

        return chosen

    names = ("get_flex_attn_fwd_configs", "get_flex_attn_bwd_configs")
    with contextlib.ExitStack() as patches:
        for name in names:
            new = of_training(getattr(CUDAConfigHeuristic, name))
            patches.enter_context(mock.patch.object(CUDAConfigHeuristic, name, new))
        yield


class Compiled:
    """The sources of Triton kernels as Inductor hands them over, and a change to them."""

    def __init__(self, change: Callable[[str], str] = str) -> None:
        self.change = change
        self.changed = self.others = 0
        """Sources that the change has changed; kernels beside attention's."""
        self._flex: set[bool] = set()

    @property
    def attention_kernels(self) -> int:
        """2 with a forward and a backward."""
        return len(self._flex)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        from torch._inductor.async_compile import AsyncCompile

        load = AsyncCompile.triton

        def triton(compiler: Any, name: str, source: str, *args: Any, **kwargs: Any) -> Any:
            new = self.change(source)
            self.changed += new != source
            if name.startswith("triton_tem_fused"):
                self._flex.add("flex_attention_backward" in name)
            else:
                self.others += 1
            return load(compiler, name, new, *args, **kwargs)

        with mock.patch.object(AsyncCompile, "triton", triton):
            yield


def _controls() -> Iterator[Result]:
    """What is wrong on purpose has to be found."""
    plain, tree = Numbers("", _PLAIN), forest(100, seed=1)
    index = torch.arange(len(tree.parent))
    ends_early, elsewhere = tree.subtree_end.clone(), tree.position_ids.clone()
    ends_early[int((tree.subtree_end - index).argmax())] -= 1
    elsewhere[50] += 20
    wrong = Tree(ends_early, tree.position_ids, tree.parent)
    yield _control("a subtree ends one token early", lambda: differences(tree, plain, wrong))
    moved, window = Tree(tree.subtree_end, elsewhere, tree.parent), plain._replace(span=Span("sliding", 24))
    yield _control("a token's position is another", lambda: differences(tree, window, moved))

    def without_a_term(source: str) -> str:
        return source.replace("dsT = pT * (dpT - Di[None, :])", "dsT = pT * dpT")

    yield _control("the kernel lacks a term", lambda: differences(tree, plain), without_a_term)


def _control(name: str, measure: Callable[[], dict[str, float]], change: Callable[[str], str] = str) -> Result:
    flex_kernels._kernels.clear()
    compiled, began = Compiled(change), time.perf_counter()
    with compiled.watched(), _blocks(own=False):
        found = measure()
    assert change is str or compiled.changed, "the kernel's source has no such line"
    seconds = time.perf_counter() - began
    return Result(f"control: {name}", found, TOLERANCE[torch.float32], seconds, True, compiled.attention_kernels)
