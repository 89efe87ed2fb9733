"""Which attention backend a run uses: those that can run this model here, and the fastest of them, measured.

    asked: auto  ->  usable_backends(config, device, dtype)  ->  one: that one
                                                             ->  several: forward and backward of the first pack, timed

Backends differ in speed and rounding only, so the choice may differ between machines.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mtr.attention.flex import FLEX_BLOCK
from mtr.attention.interface import attend
from mtr.attention.layers import head_shapes, score_scale
from mtr.attention.masks import TreeAttention
from mtr.attention.varlen import MAX_HEAD_SIZE
from mtr.console import labelled
from mtr.errors import UserError, one_line
from mtr.recipe.sections import Backend
from mtr.tree.mask import Span, Tree

log = logging.getLogger("mtr")

_HALF = (torch.bfloat16, torch.float16)
_REPEATS = 3


def usable_backends(config: Any, device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """Backends that compute the visible pairs and no others, for this model on this device.

    The dense ones (sdpa, eager) do T x T work: they are returned only where nothing else runs.
    """
    if device.type != "cuda":
        return ["segment"]
    if dtype == torch.float64:  # flex's and FlashAttention's kernels have none
        return ["eager" if _beyond_sdpa(config) else "sdpa"]
    return ["flex"] if _beyond_varlen(config, dtype) else ["flex", "varlen"]


def choose_backends(asked: str, config: Any, device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """The backend for `model.attention`, or the candidates among which a measurement decides.

    Raises:
        UserError: the backend cannot run this model or on this device.
    """
    if asked == "auto":
        return usable_backends(config, device, dtype)
    if asked == "flex" and device.type != "cuda":
        raise UserError(f"model.attention: flex trains on CUDA only and this is {device.type}; use attention: auto")
    if asked == "segment" and device.type != "cpu":
        raise UserError("model.attention: segment runs on the CPU only; use attention: auto")
    if asked == "sdpa" and (special := _beyond_sdpa(config)):
        raise UserError(f"model.attention: sdpa has no {special}, which this model needs; use attention: auto or eager")
    if asked == "varlen" and (special := _beyond_varlen(config, dtype if device.type == "cuda" else torch.bfloat16)):
        raise UserError(f"model.attention: varlen has no {special}, which this model needs; use attention: auto")
    backend: Backend = asked  # type: ignore[assignment]
    return [backend]


def pad_to_multiple_of(backends: Sequence[Backend]) -> int:
    """What the length of a pack must be a multiple of."""
    return FLEX_BLOCK if "flex" in backends else 1


def _beyond_sdpa(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "soft cap"
    return "attention sinks" if config.model_type == "gpt_oss" else None


def _beyond_varlen(config: Any, dtype: torch.dtype) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "soft cap"
    if dtype not in _HALF:
        return f"{str(dtype).removeprefix('torch.')} (bfloat16 and float16 only)"
    shapes = head_shapes(config)
    if max(shapes.key_size, shapes.value_size) > MAX_HEAD_SIZE:
        return f"head size above {MAX_HEAD_SIZE}"
    return None


def fastest(
    candidates: Sequence[Backend], config: Any, tree: Tree, spans: Sequence[Span], dtype: torch.dtype
) -> Backend:
    """The candidate that is fastest on this tree, forward and backward, summed over all layers.

    A candidate that does not compile or run here is left out with a note.

    Raises:
        UserError: none of them runs.
        torch.OutOfMemoryError: of the device.
    """
    if len(candidates) == 1:
        return candidates[0]
    if "varlen" in candidates:
        activate_flash_attention()
    device = tree.subtree_end.device
    seconds: dict[Backend, float] = {}
    failed: dict[Backend, str] = {}
    for backend in candidates:
        try:
            seconds[backend] = sum(
                layers * _seconds(backend, tree, span, config, dtype, device) for span, layers in Counter(spans).items()
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, a kernel's or a driver's: the others may do without
            failed[backend] = f"{type(error).__name__}: {one_line(error, 300)}"
    if not seconds:
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in failed.items())
        raise UserError(f"model.attention: no backend runs here ({reasons}); attention: sdpa or eager may, slowly")
    for backend, reason in failed.items():
        log.warning(labelled("note", f"attention: {backend} is left out, it does not run here ({reason})"))
    best = min(seconds, key=lambda backend: seconds[backend])
    measured = ", ".join(f"{backend} {1e3 * value:.1f} ms" for backend, value in seconds.items())
    text = f"{best}: the fastest on the first pack of {len(tree.parent):,} tokens ({measured})"
    log.info(labelled("attention", text))
    return best


def _seconds(backend: Backend, tree: Tree, span: Span, config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one layer's attention: the minimum of several calls, the first of which compiles.

    With the scale, soft cap and sinks of the model, so that flex compiles what the model itself runs.
    """
    made, shapes = TreeAttention(tree, [span], backend), head_shapes(config)
    scale, softcap = score_scale(config), getattr(config, "attn_logit_softcapping", None)
    sinks = torch.zeros(shapes.heads, device=device) if config.model_type == "gpt_oss" else None
    length = len(tree.parent)
    sizes = [
        (shapes.heads, shapes.key_size),
        (shapes.key_heads, shapes.key_size),
        (shapes.key_heads, shapes.value_size),
    ]
    query, key, value = (torch.randn(1, n, length, d, device=device, dtype=dtype, requires_grad=True) for n, d in sizes)

    @torch.enable_grad()
    def run() -> None:
        out = attend(made, span, query, key, value, scale, softcap, sinks)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    return min(_timed(run, device) for _ in range(_REPEATS + 1))


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def activate_flash_attention() -> None:
    """Let torch use FlashAttention 3 or 4 where GPU and installed packages allow it; else it stays at 2."""
    wanted = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}
    if not torch.cuda.is_available() or (major := torch.cuda.get_device_capability()[0]) not in wanted:
        return
    name, module = wanted[major]
    attention = torch.nn.attention
    if attention.current_flash_attention_impl() == name or importlib.util.find_spec(module.split(".")[0]) is None:
        return
    try:
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        log.info(labelled("note", f"{name} is installed and cannot be used: {one_line(error, 200)}"))
