"""Short causal convolutions over a tree: each chain after the last tokens of its path, all in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtr.recurrence.segments import ConvolutionPlan
from mtr.tree.plan import with_padding


def convolution(convolve: Callable[[Tensor], Tensor], x: Tensor, plan: ConvolutionPlan) -> Tensor:
    """
    Args:
        convolve: [1, channels, G] -> [1, channels, G], each place from the places before it
        x: [1, channels, T]

    Returns:
        [1, channels, T]
    """
    by_token = x[0].T  # mixers transpose what is stored token by token
    total = len(by_token)
    by_token = torch.cat([by_token[: plan.num_tokens], by_token.new_zeros(1, by_token.shape[1])])
    placed = by_token.index_select(0, plan.gather)
    out = convolve(placed.T[None])[0].T.index_select(0, plan.keep)
    return with_padding(out, total).mT
