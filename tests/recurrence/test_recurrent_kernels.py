"""Claims: a kernel of another package is used on CUDA only, in a dtype and of a size that it takes; one that is
missing, too old, broken or of another signature is left alone, and the log says which and why. On a CPU, transformers'
own functions are called even where a package is installed.

What the packages' own kernels compute: `scripts/cuda_check --only recurrent`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from support import recurrent_kernels
from support.models import tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtr.recurrence import kernels
from mtr.recurrence.kernels import GATED_DELTA_RULE, KIMI, MAMBA, SIMPLE, Kernel
from mtr.recurrence.kinds import KINDS, kernels_of
from mtr.recurrence.seams import on_any_device

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NEWEST = {"fla-core": "0.6.0", "mamba-ssm": "2.3.2.post1"}
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(KIMI, version="0.5.2", function=...)` makes a package with one kernel, and no other."""
    installed: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    def make(kernel: Kernel, version: str | None = None, function: Any = None) -> None:
        installed[kernel.package] = version or NEWEST[kernel.package]
        module = ModuleType(kernel.module)
        reference = recurrent_kernels.chunk_gated_delta_rule
        vars(module)[kernel.name] = function or getattr(recurrent_kernels, kernel.name, reference)
        monkeypatch.setitem(sys.modules, kernel.module, module)
        for name in (kernel.module.rpartition(".")[0], kernel.module.partition(".")[0]):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        kernels.find.cache_clear()

    monkeypatch.setattr(kernels, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    kernels.find.cache_clear()
    yield make
    kernels.find.cache_clear()


def fake(*shape: int, device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype)


def test_kinds_with_kernels_are_those_of_the_table() -> None:
    assert set(kernels.BY_KIND) < {kind.name for kind in KINDS}


def test_a_model_is_told_of_its_own_kinds(install: Install) -> None:
    install(SIMPLE)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("bamba"))
    assert kernels_of(model, CUDA) == ["Mamba-2: fla-core 0.6.0 (mamba-ssm is not installed)"]
    assert kernels_of(model, CPU) == []


def delta(key: Tensor, g: Tensor) -> kernels.Scan | None:
    return kernels.delta_rule_scan(key, fake(1, 8, g.shape[2], 16, device=key.device), g, True)


def test_without_packages_torch_does_all(install: Install) -> None:
    assert delta(fake(1, 8, 2, 16), fake(1, 8, 2)) is None
    assert kernels.state_space_scan(fake(1, 8, 4, 16), fake(1, 8, 2, 16)) is None
    said = kernels.described(kernels.BY_KIND, CUDA)
    assert [line.partition(":")[0] for line in said] == list(kernels.BY_KIND)
    assert all("torch (" in line and "mtr[hybrid]" in line for line in said)
    assert "fla-core is not installed" in said[0]
    assert "mamba-ssm is not installed" in said[2]
    assert kernels.described(kernels.BY_KIND, CPU) == []


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({}, True),
        ({"device": CPU}, False),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float64}, False),
        ({"size": 256}, True),
        ({"size": 258}, False),
        ({"size": 15}, False),
    ],
)
@pytest.mark.parametrize("kernel", [GATED_DELTA_RULE, KIMI], ids=lambda one: one.name)
def test_where_a_delta_rule_is_used(kernel: Kernel, change: dict[str, Any], used: bool, install: Install) -> None:
    install(kernel)
    options = {name: value for name, value in change.items() if name != "size"}
    size = change.get("size", 16)
    key = fake(1, 8, 2, size, **options)
    g = fake(1, 8, 2, *([size] if kernel is KIMI else []), **options)
    assert (delta(key, g) is not None) == used


def test_kimi_with_fewer_keys_than_values_is_for_torch(install: Install) -> None:
    install(KIMI)
    assert delta(fake(1, 8, 2, 16), fake(1, 8, 4, 16)) is None


def test_each_state_space_model_has_its_kernel(install: Install) -> None:
    def chosen(groups: int) -> str:
        scan = kernels.state_space_scan(fake(1, 8, 4, 16), fake(1, 8, groups, 16))
        assert scan is not None
        name: str = getattr(scan, "__qualname__", "")
        return name.partition(".")[0]

    install(SIMPLE)
    assert {chosen(2), chosen(4)} == {"by_simple"}
    assert "fla-core 0.6.0 (mamba-ssm is not installed)" in kernels.described(kernels.BY_KIND, CUDA)[2]
    install(MAMBA)
    assert (chosen(2), chosen(4)) == ("by_mamba", "by_simple")
    assert "Mamba-2: mamba-ssm 2.3.2.post1" in kernels.described(kernels.BY_KIND, CUDA)


def another(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Any, output_final_state: bool, use_qk_l2norm_in_kernel: bool
) -> None:
    raise AssertionError("it is not called")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": "0.5.2"}, "fla-core 0.5.2 is older than 0.6"),
        ({"version": "0.5.2.post1"}, "fla-core 0.5.2.post1 is older than 0.6"),
        ({"function": another}, "chunk_kda of fla-core 0.6.0 takes no cu_seqlens, cu_seqlens_cpu"),
    ],
)
def test_what_is_left_alone_is_named(options: dict[str, Any], reason: str, install: Install) -> None:
    install(KIMI, **options)
    assert delta(fake(1, 8, 2, 16), fake(1, 8, 2, 16)) is None
    assert reason in kernels.described(kernels.BY_KIND, CUDA)[1]


def test_a_package_that_cannot_be_imported_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(GATED_DELTA_RULE)
    monkeypatch.setitem(sys.modules, GATED_DELTA_RULE.module, None)
    kernels.find.cache_clear()
    assert "fla-core 0.6.0 cannot be imported: ModuleNotFoundError" in kernels.described(kernels.BY_KIND, CUDA)[0]


@pytest.mark.parametrize(
    ("triton", "capability", "used"),
    [("3.6.0", (9, 0), False), ("3.7.1", (9, 0), True), ("3.3.1", (9, 0), True), ("3.6.0", (8, 0), True)],
)
@pytest.mark.parametrize("kernel", [GATED_DELTA_RULE, SIMPLE, KIMI], ids=lambda one: one.name)
def test_what_triton_miscompiles_is_left_alone(
    kernel: Kernel, triton: str, capability: tuple[int, int], used: bool, install: Install, monkeypatch: Any
) -> None:
    install(kernel)
    installed = vars(kernels)["version"]
    monkeypatch.setattr(kernels, "version", lambda package: triton if package == "triton" else installed(package))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = kernels.find(kernel)
    assert isinstance(found, str) != (used or kernel is KIMI)
    if isinstance(found, str):
        assert found == f"{kernel.name} of fla-core needs triton 3.7.1 on this GPU and this is 3.6.0"


def test_nothing_is_imported_for_a_cpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> None:
        raise AssertionError(name)

    install(GATED_DELTA_RULE)
    monkeypatch.setattr(importlib, "import_module", imported)
    assert delta(fake(1, 8, 2, 16, device=CPU), fake(1, 8, 2, device=CPU)) is None
    assert kernels.state_space_scan(fake(1, 8, 4, 16, device=CPU), fake(1, 8, 2, 16, device=CPU)) is None


# --- transformers' functions ------------------------------------------------------------------------------------------


def test_on_a_cpu_a_packages_kernel_is_not_called() -> None:
    """As transformers wraps its function where fla is installed."""

    def plain(query: Tensor, key: Tensor | None = None) -> str:
        return "torch"

    @functools.wraps(plain)
    def kernel(*given: Any, **options: Any) -> str:
        return "kernel"

    chosen = on_any_device(kernel)
    assert chosen(torch.ones(1), key=torch.ones(1)) == "torch"
    assert chosen(query=fake(1)) == "kernel"
    assert chosen(torch.ones(1).to("meta"), key=None) == "kernel"


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "causal_conv1d_fn"])
def test_transformers_functions_are_written_in_torch_beneath(name: str) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    source = inspect.getsource(inspect.unwrap(getattr(modeling_qwen3_5, name)))
    assert f"def {name}(" in source
    assert "F.pad" in source or "F.conv1d" in source
