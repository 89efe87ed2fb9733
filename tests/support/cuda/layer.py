"""One layer's attention on fake cuda tensors, and flex attention's kernels as the graphs they are compiled from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import mtr.attention.flex
from mtr.attention import flex_kernels
from mtr.attention.flex import FLEX_BLOCK, flex_mask
from mtr.attention.flex_kernels import Kind
from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.recipe.sections import Backend
from mtr.tree.mask import Span, Tree
from support.attention import Case
from support.cuda.watch import Watch, watched

CUDA = torch.device("cuda", 0)


def attend(backend: Backend, case: Case, dtype: torch.dtype, tree: Tree, span: Span, watch: Watch) -> None:
    """Forward and backward of tree attention; the soft cap and the sinks are those of the case.

    Args:
        tree: on the host.
        watch: is told of each operator.
    """
    length, scale = len(tree.parent), case.key_size**-0.5
    with watched(FakeTensorMode(allow_non_fake_inputs=True), watch):
        there = Tree(tree.subtree_end.to(CUDA), tree.position_ids.to(CUDA), tree.parent)
        handle = TreeHandle(TreeAttention(there, [span], backend)).tensor
        counts = [(case.heads, case.key_size), (case.key_heads, case.key_size), (case.key_heads, case.value_size)]
        inputs = [torch.randn(1, length, n, size, dtype=dtype, device=CUDA).transpose(1, 2) for n, size in counts]
        sinks = torch.randn(case.heads, device=CUDA) if case.sinks else None
        out, lse = torch.ops.mtr.tree_attention(*inputs, handle, 0, scale, case.softcap, sinks)
        given = (torch.randn_like(out), *inputs, out, lse)
        torch.ops.mtr.tree_attention_backward(*given, handle, 0, scale, case.softcap)


@contextlib.contextmanager
def flex_by_graph() -> Iterator[list[tuple[Kind, bool]]]:
    """Flex attention runs its graphs operator by operator, on fake tensors.

    Yields:
        The kernels that are asked for: what each one is compiled for, and whether it is the backward.
    """
    asked: list[tuple[Kind, bool]] = []

    def kernel(kind: Kind, backward: bool, mask: Any) -> Any:
        asked.append((kind, backward))
        with unset_fake_temporarily():
            return _graph(kind, backward)

    with mock.patch.object(mtr.attention.flex, "kernel", kernel):
        yield asked


@functools.cache
def _graph(kind: Kind, backward: bool) -> Any:
    return flex_kernels._trace(kind, backward, mask_parts(kind.span))[0]


def mask_parts(span: Span) -> Any:
    """What `kernel` takes of a pack, on the host: the kernel does not depend on it."""
    index = torch.arange(FLEX_BLOCK)
    return flex_mask(Tree(index + 1, index, index.numpy() - 1), span).parts
