"""Floating-point operations of recurrent layers by the recurrence itself: what is needed, not what kernels do.

A head keeps a state S, a matrix of K x V numbers, which every token decays, adds to, and reads:

    S = a S + k v^T                              o = S^T q       2 products    Mamba, Mamba-2, lightning attention
    S = a S + k beta (v - (a S)^T k)^T           o = S^T q       3 products    Gated DeltaNet, Kimi Delta Attention

An outer product that is added to S, or a product of S and a vector, is K V multiplications and as many additions. Both
factors need their gradient, each by a product of the same size: forward and backward take 3 * 2 K V FLOPs for each of
these products. Decays and gates are elementwise and left out, as norms and softmaxes are, and so is a recurrence of
one number a channel (RG-LRU). Chunked kernels do more, as attention with a dense mask does more than the visible pairs.

Convolutions are products with a weight, which `mtr.model.flops` counts with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from mtr.recurrence.kinds import KINDS


class State(NamedTuple):
    products: int
    """For each token."""
    numbers: Callable[[Any], int]
    """Entries of the states of all heads, from a mixer."""


STATES: Mapping[str, State] = {
    "short convolution": State(0, lambda mixer: 0),
    "Gated DeltaNet": State(3, lambda mixer: mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim),
    "Kimi Delta Attention": State(3, lambda mixer: mixer.num_heads * mixer.head_dim**2),
    "Mamba-2": State(2, lambda mixer: mixer.intermediate_size * mixer.ssm_state_size),
    "selective scan": State(2, lambda mixer: mixer.intermediate_size * mixer.ssm_state_size),
    "RG-LRU": State(0, lambda mixer: 0),
    "lightning attention": State(2, lambda mixer: mixer.num_attention_heads * mixer.head_dim**2),
}
"""By `mtr.recurrence.seams.Kind.name`."""


def recurrence_flops(mixer: nn.Module) -> float | None:
    """FLOPs per token of a mixer's recurrence, forward and backward; NaN if its sizes are not known.

    Returns:
        None for a module that is no recurrent mixer.
    """
    kind = next((kind.name for kind in KINDS if kind.covers(type(mixer))), None)
    if kind is None:
        return None
    state = STATES.get(kind)
    try:
        return float("nan") if state is None else 3.0 * 2 * state.products * state.numbers(mixer)
    except AttributeError:  # a mixer of another release of transformers
        return float("nan")
