"""Torch's CPU build made to believe in one GPU: enough for fake cuda tensors and for generating CUDA code.

    load()           compiles stub.cpp against the installed torch and loads it; call it before torch is imported
    pretend(arch)    what torch.cuda and Inductor are told of the device, an H100 (90) or a B200 (100)

Nothing is computed on the device: every tensor on it has to be fake.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BUILD = Path(__file__).parents[3] / "build" / "cuda-check"


class MissingError(Exception):
    """What this machine lacks, in a sentence with the mend."""


DEVICES = {
    90: {"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132, "total_memory": 80 * 2**30},
    100: {"name": "NVIDIA B200", "multi_processor_count": 148, "total_memory": 180 * 2**30},
}
MOST_SHARED_MEMORY = 232448
"""Bytes a block may take, on both."""


def load() -> None:
    """
    Raises:
        MissingError: no compiler, or a torch that the stub cannot be put into.
    """
    if "torch" in sys.modules:
        raise MissingError("the stub has to be loaded before torch is imported")
    if not sys.platform.startswith("linux"):
        raise MissingError(f"generating CUDA code needs Linux and this is {sys.platform}")
    if importlib.util.find_spec("torch") is None:
        raise MissingError("torch is not installed: pip install 'mtr[test,cuda-check]'")
    if _has_cuda():
        raise MissingError(
            f"torch {version('torch')} is built for CUDA, and the stub takes the place of what that build has; install "
            "the CPU build into an environment of its own and name its interpreter with PYTHON: pip install torch "
            "--index-url https://download.pytorch.org/whl/cpu"
        )
    load_library("stub.cpp")


def load_library(source: str) -> None:
    """Compile a source beside this module, the first time, and load it."""
    ctypes.CDLL(str(_compiled(Path(__file__).with_name(source))), ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _has_cuda() -> bool:
    return (_torch_folder() / "lib" / "libtorch_cuda.so").exists()


def _compiled(source: Path) -> Path:
    """The library for this source and the installed torch; it is kept in build/."""
    folder = _torch_folder()
    known = hashlib.sha256(source.read_bytes() + f"{folder}{version('torch')}".encode()).hexdigest()[:16]
    library = BUILD / f"{source.stem}-{known}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise MissingError("no C++ compiler: install g++ (Debian: apt-get install g++), or name one with CXX")
    BUILD.mkdir(parents=True, exist_ok=True)
    new = library.with_suffix(f".{os.getpid()}")
    flags = ["-O0", "-fPIC", "-shared", "-std=c++20", "-w", f"-I{folder / 'include'}"]
    link = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}"]
    done = subprocess.run(
        [*compiler.split(), *flags, str(source), "-o", str(new), *link], capture_output=True, text=True
    )
    if done.returncode:
        raise MissingError(
            f"{compiler} cannot compile {source.name} against torch {version('torch')}: {done.stderr[:600]}"
        )
    new.replace(library)
    return library


def pretend(arch: int = 90, generate: bool = False) -> None:
    """Tell torch.cuda of a device.

    Args:
        arch: a key of DEVICES.
        generate: tell Inductor and Triton, too; needs the package triton.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    properties = _properties(arch)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "get_device_properties": properties,
        "get_device_capability": divmod(arch, 10),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state_all": [],
        "set_rng_state_all": None,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.version.cuda = "13.0"
    for name in ("getDevice", "maybeExchangeDevice", "exchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", _always(0))
    torch._C._cuda_setDevice = _always(None)
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    if generate:
        _generate_code(properties, arch)


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


def _properties(arch: int) -> SimpleNamespace:
    major, minor = divmod(arch, 10)
    return SimpleNamespace(
        **DEVICES[arch],
        major=major,
        minor=minor,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=MOST_SHARED_MEMORY,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 * 2**20,
        is_integrated=0,
        gcnArchName="",
        memory_bus_width=5120,
        memory_clock_rate=2619000,
        clock_rate=1980000,
    )


def _generate_code(properties: SimpleNamespace, arch: int) -> None:
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface, register_interface_for_device
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    answers = {
        "is_available": True,
        "get_compute_capability": arch,
        "get_device_properties": properties,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(_always(answer)))
    CudaInterface.Worker.get_device_properties = staticmethod(_always(properties))  # type: ignore[method-assign]
    CudaInterface.Worker.current_device = staticmethod(_always(0))  # type: ignore[method-assign]
    for device in ("cuda", "cuda:0"):
        register_interface_for_device(device, CudaInterface)
    torch.utils._triton.has_triton = _always(True)
    # patterns are registered by tracing real tensors on the device
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = _always(None)

    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda _=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton.runtime.driver.set_active(driver)
