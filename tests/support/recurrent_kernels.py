"""What the CUDA kernels of recurrent layers compute, token by token in torch, and inputs for them.

As the kernels do, they compute in float32 and return the dtype of the values; in float64 where they are given that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The signature of flash-linear-attention's function of this name, and of its `chunk_kda` (g for each channel).

    Each batch row is a sequence, or, with `cu_seqlens`, the one row is cut there.
    """
    dtype = v.dtype
    q, k, v, g, beta = _wide(q, k, v, g, beta)
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q * scale, k))
    rows = [(x, x + 1, 0, q.shape[1]) for x in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1
        assert cu_seqlens_cpu is not None
        assert cu_seqlens_cpu.tolist() == cu_seqlens.tolist()
        rows = [(0, 1, s, e) for s, e in itertools.pairwise(cu_seqlens.tolist())]
        assert rows[-1][-1] == q.shape[1]
    assert initial_state is None or len(initial_state) == len(rows)
    outs, states = [], []
    for number, (first, last, start, end) in enumerate(rows):
        given = [x[first:last, start:end] for x in (q, k, v, g, beta)]
        out, state = _one(given, None if initial_state is None else initial_state[number : number + 1])
        outs.append(out)
        states.append(state)
    out = torch.cat(outs, 0 if cu_seqlens is None else 1).to(dtype)
    return out, torch.cat(states) if output_final_state else None


def _wide(*given: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in given]


def _one(given: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence: [1, T, H, D] and its like."""
    q, k, v, g, beta = given
    if state is None:
        state = v.new_zeros(1, v.shape[2], k.shape[3], v.shape[3])
    decay = g.exp() if g.dim() == 4 else g.exp()[..., None]
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, ..., None]
        wrong = v[:, t] - (k[:, t, :, None] @ state)[:, :, 0]
        state = state + k[:, t, ..., None] * (wrong * beta[:, t, :, None])[:, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(out, 1), state


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor] | Tensor:
    """The part that is used of the signature of mamba-ssm's function of this name."""
    dtype = x.dtype
    x, B, C = _wide(x, *(t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C)))
    state = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
    out = []
    for t in range(x.shape[1]):
        added = (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t, :, None]
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        out.append((state @ C[:, t, ..., None])[..., 0])
    y = torch.stack(out, 1).to(dtype)
    return (y, state) if return_final_states else y


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The part that is used of the signature of flash-linear-attention's function of this name."""
    dtype = v.dtype
    q, k, v = _wide(q, k, v)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    state = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None] + k[:, t, ..., None] * v[:, t, :, None]
        out.append((scale * q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(out, 1).to(dtype), state if output_final_state else None


# --- inputs -----------------------------------------------------------------------------------------------------------


def delta_rule_inputs(total: int, heads: tuple[int, int], sizes: tuple[int, int], by_channel: bool) -> list[Tensor]:
    """Query, key, value, g and beta in float64; decays of about 0.1 to 0.9 a token, so that states matter.

    Args:
        heads: of key and of value
        sizes: of key and of value
    """
    normal = _normal(total)
    keys, values = heads
    query, key = (F.normalize(normal(1, total, keys, sizes[0]), dim=-1) for _ in "qk")
    g = -F.softplus(normal(1, total, values, *([sizes[0]] if by_channel else [])) - 0.5)
    return [query, key, normal(1, total, values, sizes[1]), g, normal(1, total, values).sigmoid()]


def state_space_inputs(total: int, heads: tuple[int, int], sizes: tuple[int, int]) -> list[Tensor]:
    """x, dt, A, B, C and D in float64.

    Args:
        heads: and groups
        sizes: of a head and of a state
    """
    normal = _normal(total)
    key, query = (normal(1, total, heads[1], sizes[1]) for _ in "BC")
    dt, x = F.softplus(normal(1, total, heads[0])), normal(1, total, heads[0], sizes[0])
    return [x, dt, -normal(heads[0]).exp(), key, query, normal(heads[0])]


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
