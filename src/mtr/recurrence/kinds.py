"""The table of recurrent mixers: for each kind its classes, what they call, and what follows the tree in its place.

A kind covers every model whose mixer calls the same functions; no model is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr.attention.autocast import without_autocast
from mtr.attention.masks import TreeAttention
from mtr.recurrence.carried import takes_tree
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.convolution import convolution
from mtr.recurrence.delta_rule import delta_rule
from mtr.recurrence.diagonal import scan_chunks
from mtr.recurrence.kernels import delta_rule_scan, described, state_space_scan
from mtr.recurrence.levels import scan_levels
from mtr.recurrence.rg_lru import block_over_tree, rg_lru
from mtr.recurrence.rows import row_plan, state_space_by_rows
from mtr.recurrence.seams import Arguments, Function, Kind, Seam, is_of
from mtr.recurrence.seams import follow_tree as _follow_tree
from mtr.recurrence.segments import convolution_plan, level_plan
from mtr.recurrence.selective_scan import selective_scan
from mtr.recurrence.selective_scan import step_sizes as selective_steps
from mtr.recurrence.sequences import delta_rule_by_segments, segment_plan
from mtr.recurrence.state_space import state_space, step_sizes


def follow_tree(model: nn.Module) -> None:
    """Let the recurrent layers of a model, of every kind below, follow the tree that the decoder is handed.

    Raises:
        UserError: this release of transformers has moved what a mixer calls.
    """
    _follow_tree(model, KINDS)


def kernels_of(model: nn.Module, device: torch.device) -> list[str]:
    """For the log: what computes each kind of recurrence of a model on a device, and why a kernel is not used."""
    mixers = {type(module) for module in model.modules()}
    return described([kind.name for kind in KINDS if any(is_of(mixer, kind) for mixer in mixers)], device)


def _convolution(original: Function, given: Arguments, pack: TreeAttention) -> Tensor:
    weight = given["weight"]

    def convolve(x: Tensor) -> Tensor:
        out: Tensor = original(x, weight, given["bias"], activation=given["activation"])
        return out

    return _convolved(pack, convolve, given["hidden_states"], weight.shape[-1])


def _convolved(pack: TreeAttention, convolve: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    return convolution(convolve, x, pack.make(convolution_plan, width))


def _delta_rule(original: Function, given: Arguments, pack: TreeAttention) -> tuple[Tensor, None]:
    query, key, value, g, beta = (given[name] for name in ("query", "key", "value", "g", "beta"))
    normalize = given["use_qk_l2norm_in_kernel"]
    scan = delta_rule_scan(key, value, g, normalize)
    if scan is not None:
        return delta_rule_by_segments(scan, query, key, value, g, beta, pack.make(segment_plan)), None
    return delta_rule(query, key, value, g, beta, pack.make(chunk_plan), normalize), None


def _state_space(original: Function, given: Arguments, pack: TreeAttention) -> Tensor:
    dt = step_sizes(given["dt"], given["dt_bias"], given["dt_softplus"], given["dt_limit"])
    x, decay, key, query, skip = (given[name] for name in ("hidden_states", "A", "B", "C", "D"))
    return _states(x, dt, decay, key, query, skip, pack)


def _states(
    x: Tensor, dt: Tensor, decay: Tensor, key: Tensor, query: Tensor, skip: Tensor | None, pack: TreeAttention
) -> Tensor:
    scan = state_space_scan(x, key)
    if scan is not None:
        return state_space_by_rows(scan, x, dt, decay, key, query, skip, pack.make(row_plan))
    return state_space(x, dt, decay, key, query, skip, pack.make(chunk_plan))


def _unfused(original: Function, given: Arguments, pack: TreeAttention) -> None:
    """None makes a mixer call its convolution and scan one after the other, and its output projection as a module."""


def _selective_scan(original: Function, given: Arguments, pack: TreeAttention) -> Tensor:
    assert not given["return_last_state"], "a state is asked for by a cache, and a pack has none"
    dt = selective_steps(given["dt"], given["delta_bias"], given["delta_softplus"])
    x, decay, write, read, skip = (given[name] for name in ("hidden_states", "A", "B", "C", "D"))
    out = selective_scan(x, dt, decay, write, read, skip, _along(pack, x))
    return out if given["z"] is None else out * F.silu(given["z"])


def _rg_lru(pack: TreeAttention, x: Tensor, gate: Tensor) -> Tensor:
    return rg_lru(x, gate, _along(pack, x))


def _along(pack: TreeAttention, like: Tensor) -> Callable[[Any, Any, Sequence[Tensor]], Tensor]:
    """The way along the tree that costs least on a device: least work on a CPU, few launches elsewhere."""
    if like.device.type != "cpu":
        return partial(scan_chunks, plan=pack.make(chunk_plan))
    return lambda scan, _, inputs: scan_levels(scan, inputs, pack.make(level_plan))


def _lightning(original: Function, given: Arguments, pack: TreeAttention) -> tuple[Tensor, None]:
    """The forward of a mixer that keeps its recurrence in line."""
    self, hidden = given["self"], given["hidden_states"]
    heads, size = self.num_attention_heads, self.head_dim
    products = torch.unflatten(self.act_fn(self.qkv_proj(hidden)), -1, (heads, -1))
    query, key, value = torch.split(products, size, -1)
    steps = torch.ones(value.shape[:3], dtype=value.dtype, device=value.device)
    with without_autocast(value):
        out = _states(value, steps, -self.slope_rate.flatten(), key, query, None, pack)
    normed = self.norm(out.to(hidden.dtype).flatten(-2))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden)) * normed), None


_CONVOLUTION = Seam("causal_conv1d_fn", _convolution, ("hidden_states", "weight", "bias", "activation"))
_DELTA = ("query", "key", "value", "g", "beta", "use_qk_l2norm_in_kernel")
_SSD = ("hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "dt_limit")
_SELECTIVE = (
    "hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"
)  # fmt: skip

KINDS = (
    Kind("short convolution", ("ShortConv", "ShortConvolution"), (_CONVOLUTION,)),
    Kind(
        "Gated DeltaNet", ("GatedDeltaNet",), (_CONVOLUTION, Seam("torch_chunk_gated_delta_rule", _delta_rule, _DELTA))
    ),
    Kind(
        "Kimi Delta Attention",
        ("DeltaAttention",),
        (_CONVOLUTION, Seam("chunk_kimi_delta_attention", _delta_rule, _DELTA)),
    ),
    Kind(
        "Mamba-2",
        ("MambaMixer", "Mamba2Mixer", "BambaMixer", "H1Mixer", "MambaLayer"),
        (
            _CONVOLUTION,
            Seam("mamba2_chunk_scan", _state_space, _SSD),
            Seam("mamba2_split_conv1d_scan_combined", _unfused),
        ),
    ),
    Kind(
        "selective scan",
        ("MambaMixer",),
        (
            _CONVOLUTION,
            Seam("mamba_selective_scan", _selective_scan, _SELECTIVE),
            Seam("mamba_inner_fn", _unfused, optional=True),
        ),
        around=takes_tree,
        carried=True,
    ),
    Kind("RG-LRU", ("RecurrentBlock",), (), around=partial(block_over_tree, convolve=_convolved, scan=_rg_lru)),
    Kind("lightning attention", ("LightningAttention",), (), _lightning),
)
