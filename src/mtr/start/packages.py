"""Which packages are installed, and whether mtr works with their versions. Reads metadata, imports none of them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from mtr.start.finding import Finding

_OPTIONAL = {
    "triton": "attention and compiled layers on CUDA; comes with torch for CUDA",
    "bitsandbytes": "model.load_in_4bit and 8-bit optimizers: pip install 'mtr[optim]'",
    "liger-kernel": "training.use_liger_kernel: pip install 'mtr[liger]'",
    "fla-core": "fast kernels of recurrent layers on CUDA: pip install 'mtr[hybrid]'",
    "mamba-ssm": "fast kernels of Mamba layers on CUDA",
    "schedulefree": "training.optim: schedule_free_adamw: pip install 'mtr[optim]'",
    "trl": "mtr bench --vs trl, and training with TRL: pip install 'mtr[trl]'",
    "flash-attn-4": "FlashAttention 4 on Blackwell; torch's own is used without it",
    "flash-attn-3": "FlashAttention 3 on Hopper; torch's own is used without it",
}
"""What each is good for, and how to get it."""


def check_packages() -> Iterator[Finding]:
    """A finding for each package that mtr needs, and one for those that it can do without."""
    for text in importlib.metadata.requires("mtr") or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield _check(requirement)
    for name, use in _OPTIONAL.items():
        version = installed(name)
        yield Finding("optional", name, "none" if version is None else "ok", f"not installed ({use})", version)


def _check(requirement: Requirement) -> Finding:
    version = installed(requirement.name)
    if version is None:
        return Finding("packages", requirement.name, "problem", f"missing: pip install '{requirement}'")
    if not requirement.specifier.contains(Version(version), prereleases=True):
        text = f"{version} is not tried, mtr needs {requirement.specifier}: pip install '{requirement}'"
        return Finding("packages", requirement.name, "problem", text, version)
    return Finding("packages", requirement.name, "ok", version, version)


def installed(name: str) -> str | None:
    """The version of a package; None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
