"""Is all here that the parts need? Looks without importing torch, so it answers within a second, and lists all that is
missing at once. Needs nothing but the standard library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
COMPILERS = ("cc", "gcc", "clang")
GIB = 2**30
TEST_PACKAGES = {"pytest": ">=8.3", "hypothesis": ">=6.120"}
ROOM = {"smoke": 8, "qlora": 24}
"""GiB of temporary files that a part writes: weights of its models."""


class Found(NamedTuple):
    """What the machine has."""

    versions: dict[str, str | None]
    """By package; None where it is not installed."""
    cuda_build: str | None
    """The CUDA version that torch was built for; None for a build without CUDA."""
    compiler: str | None
    headers: bool
    """Python.h, which Triton's launchers are compiled with."""
    driver: str | None
    """The line of nvidia-smi."""
    room: float
    """GiB free for temporary files."""


def look() -> Found:
    compiler = os.environ.get("CC") or next((path for name in COMPILERS if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    named = [*requirements(), "triton", "liger-kernel", "bitsandbytes", "flash-attn-3", "flash-attn-4", "pytest"]
    versions = {name: _version(name) for name in named}
    room = shutil.disk_usage(tempfile.gettempdir()).free / GIB
    return Found(versions, _cuda_build(), compiler, headers, _driver(), room)


def requirements() -> dict[str, str]:
    """The packages that mtr needs, and which versions: `{"torch": ">=2.11,<2.14", ...}`."""
    named = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    split: list[re.Match[str]] = [found for text in named if (found := re.match(r"([\w-]+)(.*)", text))]
    return {found[1]: found[2] for found in split}


def problems(found: Found, part: str) -> list[str]:
    """What is missing, each with its mend; empty where the part can start."""
    lost = []
    for name, wanted in requirements().items():
        has = found.versions[name]
        if has is None:
            lost.append(f"{name} is not installed ({name}{wanted})")
        elif not fits(has, wanted):
            lost.append(f"{name} {has} is installed, and mtr needs {name}{wanted}")
    if found.versions["torch"] and found.cuda_build is None:
        lost.append(
            f"torch {found.versions['torch']} is a build without CUDA: install one from pytorch.org/get-started"
        )
    if found.versions["triton"] is None:
        lost.append("triton is not installed, and torch.compile needs it on CUDA: it comes with CUDA builds of torch")
    if found.compiler is None:
        lost.append(f"no C compiler ({', '.join(COMPILERS)}), which Triton needs: install gcc")
    if part in ("tests", "all") and found.versions["pytest"] is None:
        lost.append("pytest is not installed, which the part `tests` needs")
    needed = max(ROOM.values()) if part == "all" else ROOM.get(part, 1)
    if found.room < needed:
        lost.append(f"{found.room:.0f} GiB free in {tempfile.gettempdir()}, and {part} writes {needed}: set TMPDIR")
    return lost


def doubts(found: Found) -> list[str]:
    """What is probably missing."""
    doubtful = []
    if not found.headers:
        doubtful.append(f"no {sysconfig.get_path('include')}/Python.h, which Triton compiles with: install python3-dev")
    if found.driver is None:
        doubtful.append("nvidia-smi does not answer: no NVIDIA driver, or no device in this container")
    return doubtful


def fits(version: str, wanted: str) -> bool:
    """Whether `2.13.0+cu128` is in `>=2.11,<2.14`."""
    compare: dict[str, Callable[[Any, Any], bool]] = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    return all(
        compare[sign](_numbers(version)[: len(_numbers(limit))], _numbers(limit))
        for sign, limit in re.findall(r"(>=|<)([\d.]+)", wanted)
    )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", version)[0])]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_build() -> str | None:
    """From the file that says so: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)", text, re.MULTILINE)
    return found[1] if found else None


def _driver() -> str | None:
    """`NVIDIA H100 80GB HBM3, 570.86, 81559 MiB`"""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout.strip() else None


def main() -> int:
    """Exit code 2 if something is missing; in a rehearsal that is only said. The part `requirements` lists packages."""
    part, rehearse = sys.argv[1], "--rehearse" in sys.argv
    if part == "requirements":
        print("\n".join(name + wanted for name, wanted in {**requirements(), **TEST_PACKAGES}.items()))
        return 0
    found = look()
    lost = problems(found, part)
    for line in doubts(found):
        print(f"perhaps missing: {line}", file=sys.stderr)
    has = ", ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    print(f"device: {found.driver or 'none'}; torch's CUDA: {found.cuda_build}; python {sys.version.split()[0]}; {has}")
    for line in lost:
        print(f"{'not needed to rehearse' if rehearse else 'missing'}: {line}", file=sys.stderr)
    return 2 if lost and not rehearse else 0


if __name__ == "__main__":
    sys.exit(main())
