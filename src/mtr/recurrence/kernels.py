"""CUDA kernels of other packages for recurrent layers, where they are installed and take what is needed.

    Gated DeltaNet, Kimi Delta Attention   flash-linear-attention (fla)
    Mamba-2                                mamba-ssm; else fla, which takes keys and queries for each head
    lightning attention                    fla; else mamba-ssm

Without them torch computes the same in chunks. Nothing is imported before a layer on a CUDA device asks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Function = Callable[..., Any]

# --- what is asked of a kernel ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """S runs of tokens, one after another in a row."""

    cu_seqlens: Tensor
    """[S + 1] int64, where each begins and the last one ends"""
    cu_seqlens_cpu: Tensor
    """The same on the host."""

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


class Scan(Protocol):
    """A gated delta rule over sequences of many lengths."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: [1, T, J, D]
            key: [1, T, J, D]
            value: [1, T, H, E]
            g: [1, T, H], or [1, T, H, D]
            beta: [1, T, H]
            initial: [S, H, D, E], zero where None

        Returns:
            [1, T, H, E] and the states after the last tokens, [S, H, D, E]
        """


class RowScan(Protocol):
    """A state space model over a batch of rows."""

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: [N, L, H, P]
            dt: [N, L, H] in float32 or float64, zero where there is no token
            A: [H], of the type of dt
            B: [N, L, G, n]
            C: [N, L, G, n]

        Returns:
            [N, L, H, P] from a zero state, and the states after the rows, [N, H, n, P]
        """


# --- what is installed ------------------------------------------------------------------------------------------------

MOST_KEYS = 256
"""Size of a key that fla's delta rules take."""


class Kernel(NamedTuple):
    """A function of a package, and what of it is used."""

    package: str
    least: tuple[int, ...]
    """Version."""
    module: str
    name: str
    parameters: tuple[str, ...]
    miscompiled: bool = False
    """Its gradients are wrong where Triton 3.4 to 3.7.0 compiles it for Hopper."""


_VARLEN = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens", "cu_seqlens_cpu")
_ROWS = ("scale", "output_final_state")
GATED_DELTA_RULE = Kernel("fla-core", (0, 6), "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _VARLEN, True)
KIMI = Kernel("fla-core", (0, 6), "fla.ops.kda", "chunk_kda", _VARLEN)
SIMPLE = Kernel("fla-core", (0, 6), "fla.ops.simple_gla", "chunk_simple_gla", _ROWS, True)
MAMBA = Kernel(
    "mamba-ssm",
    (2, 2, 2),
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_chunk_scan_combined",
    ("chunk_size", "return_final_states"),
)


@functools.cache
def find(kernel: Kernel) -> Function | str:
    """The function, or why it is not used."""
    try:
        installed = version(kernel.package)
    except PackageNotFoundError:
        return f"{kernel.package} is not installed"
    if _numbers(installed) < kernel.least:
        return f"{kernel.package} {installed} is older than {'.'.join(map(str, kernel.least))}"
    try:
        function: Function = getattr(importlib.import_module(kernel.module), kernel.name)
    except Exception as error:  # a package built for another torch or CUDA fails in its own ways
        return f"{kernel.package} {installed} cannot be imported: {type(error).__name__}: {error}"
    missing = set(kernel.parameters) - set(inspect.signature(function).parameters)
    if missing:
        return f"{kernel.name} of {kernel.package} {installed} takes no {', '.join(sorted(missing))}"
    return _miscompiled(kernel) or function


def _miscompiled(kernel: Kernel) -> str | None:
    """https://github.com/fla-org/flash-linear-attention/issues/640; fla itself stops in the first backward."""
    if not kernel.miscompiled or torch.cuda.get_device_capability()[0] != 9:
        return None
    triton = version("triton")
    if (3, 4) <= _numbers(triton) < (3, 7, 1):
        return f"{kernel.name} of {kernel.package} needs triton 3.7.1 on this GPU and this is {triton}"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


BY_KIND = {
    "Gated DeltaNet": (GATED_DELTA_RULE,),
    "Kimi Delta Attention": (KIMI,),
    "Mamba-2": (MAMBA, SIMPLE),
    "lightning attention": (SIMPLE, MAMBA),
}
"""The first that can be used is."""


def described(kinds: Iterable[str], device: torch.device) -> list[str]:
    """For the log: what computes each kind of recurrence on a device, and why a kernel is not used.

    Args:
        kinds: those that no kernel is known for are left out
    """
    if device.type != "cuda":
        return []
    return [f"{kind}: {_choice(BY_KIND[kind])}" for kind in kinds if kind in BY_KIND]


def _choice(kernels: Sequence[Kernel]) -> str:
    reasons: list[str] = []
    for kernel in kernels:
        found = find(kernel)
        if not isinstance(found, str):
            chosen = f"{kernel.package} {version(kernel.package)}"
            return f"{chosen} ({'; '.join(reasons)})" if reasons else chosen
        reasons.append(found)
    return f"torch ({'; '.join(reasons)}; pip install 'mtr[hybrid]')"


def _fits(*inputs: Tensor) -> bool:
    """Odd sizes are for torch: in 16 bits Triton reads past their ends."""
    return all(x.device.type == "cuda" and x.dtype != torch.float64 and x.shape[-1] % 2 == 0 for x in inputs)


# --- delta rules ------------------------------------------------------------------------------------------------------


def delta_rule_scan(key: Tensor, value: Tensor, g: Tensor, normalize: bool) -> Scan | None:
    """
    Args:
        key: [1, T, J, D]
        value: [1, T, H, E]
        g: [1, T, H], or [1, T, H, D] where each channel decays by itself

    Returns:
        None: torch has to do.
    """
    if not _fits(key, value) or key.shape[-1] > MOST_KEYS:
        return None
    by_channel = g.dim() == 4
    function = find(KIMI if by_channel else GATED_DELTA_RULE)
    if isinstance(function, str) or (by_channel and key.shape[2] != g.shape[2]):
        return None
    return varlen_scan(function, normalize)


def varlen_scan(function: Function, normalize: bool) -> Scan:
    def scan(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        out, state = function(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalize,
            cu_seqlens=sequences.cu_seqlens,
            cu_seqlens_cpu=sequences.cu_seqlens_cpu,
        )
        return out, state

    return scan


# --- state space models -----------------------------------------------------------------------------------------------


def state_space_scan(x: Tensor, B: Tensor) -> RowScan | None:  # noqa: N803
    """
    Args:
        x: [1, T, H, P]
        B: [1, T, G, n]

    Returns:
        None: torch has to do.
    """
    if not _fits(x, B):
        return None
    choices = [(MAMBA, by_mamba), (SIMPLE, by_simple)]
    for kernel, scan in choices if x.shape[2] != B.shape[2] else reversed(choices):
        function = find(kernel)
        if not isinstance(function, str):
            return scan(function)
    return None


def by_mamba(function: Function) -> RowScan:
    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
    ) -> tuple[Tensor, Tensor]:
        out, state = function(x, dt, A, B, C, x.shape[1], return_final_states=True)
        return out, state.mT

    return scan


def by_simple(function: Function) -> RowScan:
    """Linear attention with a decay: the value is dt x."""

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
    ) -> tuple[Tensor, Tensor]:
        query, key = (t.to(x.dtype).repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (C, B))
        value = (x * dt[..., None]).to(x.dtype)
        out, state = function(query, key, value, dt * A, scale=1.0, output_final_state=True)
        return out, state

    return scan
