"""Runs a function in a process that has done nothing else, where the resident set is what its tensors take.

In a process that has run other tests the allocator takes memory that it already holds, so less is measured, or more
where it cannot use what it holds.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from support.processes import FORKED

P = ParamSpec("P")
T = TypeVar("T")
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4  # of glibc's mallopt


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module returns in a new process; with glibc, its tensors have pages of their own."""
    with ProcessPoolExecutor(1, FORKED, initializer=_map_tensors) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _map_tensors() -> None:
    """Every tensor of 64 KiB and more is mapped, and unmapped when it is freed: the resident set is what is alive."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 65_536)
        libc.mallopt(_M_MMAP_THRESHOLD, 65_536)
