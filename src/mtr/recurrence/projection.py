"""Projections of attention that mix each token with the ones before it (ZAYA's CCA, arXiv 2510.04476) over a tree.

Query and key go through two short convolutions, half of each value comes from the token before. Each chain is projected
after the last tokens of its path; what these are projected to is dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.recurrence.carried import carried_tree

Convolve = Callable[[TreeAttention, Callable[[Tensor], Tensor], Tensor, int], Tensor]
"""(pack, function of a row, [1, C, T], in which a token reaches so far) -> [1, E, T]"""


def projection_over_tree(forward: Callable[..., Any], convolve: Convolve) -> Callable[..., Any]:
    """The forward of a projection of hidden states [1, T, C] to query, key and value, [1, T, heads, D] each."""

    @functools.wraps(forward)
    def call(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        tree = carried_tree()
        if tree is None:
            return forward(self, hidden_states, *arguments, **options)
        return follow(self, tree, hidden_states)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(self: Any, tree: TreeHandle, hidden_states: Tensor) -> tuple[Tensor, ...]:
        shapes: list[torch.Size] = []

        def project(x: Tensor) -> Tensor:
            parts: tuple[Tensor, ...] = forward(self, x.mT, None, None)
            shapes[:] = [part.shape[2:] for part in parts]
            return torch.cat([part.flatten(2) for part in parts], -1).mT

        reach = 1 + max(1, self.conv_kernel_size)
        out = convolve(tree.entered(), project, hidden_states.mT, reach).mT
        parts = out.split([shape.numel() for shape in shapes], -1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))

    return call
