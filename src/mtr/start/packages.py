"""Which packages are installed, whether mtr works with their versions, and whether they can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from mtr.errors import described
from mtr.start.finding import Finding, shareable

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
_FIRST = ("numpy", "torch", "transformers")
"""What most of the others need, in the order in which they need each other."""
_MODULES = {"pyyaml": "yaml"}
"""What is imported, where its name is another."""


def check_packages() -> Iterator[Finding]:
    """A finding for each package that mtr needs, and one for those that it can do without. Reads metadata only."""
    for requirement in _required():
        yield _check(requirement)
    for name, use in _OPTIONAL.items():
        version = installed(name)
        yield Finding("optional", name, "none" if version is None else "ok", f"not installed ({use})", version)


def check_imports() -> Iterator[Finding]:
    """A finding for the first package that cannot be imported; others that need it could not, either."""
    for requirement in sorted(_required(), key=lambda one: _order(one.name)):
        try:
            importlib.import_module(_MODULES.get(requirement.name, requirement.name))
        except Exception as error:  # a library that is not found, a half-written file, another package that is too old
            text = f"installed, and cannot be imported: {shareable(described(error))}; install it again: "
            yield Finding(
                "imports", requirement.name, "problem", f"{text}pip install --force-reinstall '{requirement}'"
            )
            return


def _order(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _required() -> Iterator[Requirement]:
    try:
        texts = importlib.metadata.requires("mtr") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return
    yield from (requirement for requirement in map(Requirement, texts) if requirement.marker is None)


def _check(requirement: Requirement) -> Finding:
    version = installed(requirement.name)
    if version is None:
        return Finding("packages", requirement.name, "problem", f"missing: pip install '{requirement}'")
    try:
        tried = requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        tried = False
    if not tried:
        text = f"{version} is not tried, mtr needs {requirement.specifier}: pip install '{requirement}'"
        return Finding("packages", requirement.name, "problem", text, version)
    return Finding("packages", requirement.name, "ok", version, version)


def installed(name: str) -> str | None:
    """The version of a package; None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
