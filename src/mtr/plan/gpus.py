"""GPUs by name: how fast they multiply and how much they hold, from the vendor's data sheets.

Rates are of dense 16-bit matmuls that accumulate in float32, which is what training does. Data sheets often print twice
as much, for matrices half of whose entries are zero, and GeForce cards twice as much again for sums in 16 bits.
Where they print that rate only, the half of it is here (H100, H200, L4, B200). Of several boards with one name the
fastest counts: V100 SXM2 (PCIe: 112), RTX PRO 6000 Workstation Edition (the Server Edition and Max-Q run slower).

Memory is what PyTorch finds, `torch.cuda.get_device_properties(0).total_memory`: less than the gigabytes of the data
sheet, as the driver keeps a part and GDDR6 with error correction holds a sixteenth less. It depends on the driver; the
smallest that was found in the messages of PyTorch that people have published is here, rounded down.

Checked: rates against published copies and quotations of these sources, whose addresses were found there and were not
opened. Not quoted anywhere: the RTX 3090's 71 (328 tensor cores * 1.695 GHz * 128 FLOPs are 71.2) and the RTX PRO
6000's 503.8 (188 multiprocessors * 2.617 GHz * 1,024, which others find, too). Messages with 21.95 to 22.2 GiB come
from L4 and A10G, those with 44.3 to 44.5 from L40S and A40, and do not say which; the others name their board.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mtr.console import shorten
from mtr.errors import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    """As PyTorch finds it, in GiB of 2**30 bytes."""
    bf16_tflops: float
    """Dense peak of bfloat16 matmuls in 10**12 FLOPs a second; of float16 where there is no bfloat16."""
    source: str
    """Of the rate."""
    bf16: bool = True
    """Has units for bfloat16."""

    @property
    def flops_per_second(self) -> float:
        return self.bf16_tflops * 1e12

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * 2**30)


_H100 = "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"

GPUS: tuple[Gpu, ...] = (
    Gpu("B200", 178.3, 2250.0, "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet"),
    Gpu("H200", 139.7, 989.4, "https://resources.nvidia.com/en-us-gpu-resources/hpc-datasheet-sc23"),
    Gpu("H100 SXM", 79.1, 989.4, _H100),
    Gpu("H100 NVL", 93.0, 835.5, _H100),
    Gpu("H100 PCIe", 79.1, 756.5, _H100),
    Gpu("A100 80GB", 79.1, 312.0, _A100),
    Gpu("A100 40GB", 39.3, 312.0, _A100),
    Gpu("L40S", 44.3, 362.0, "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
    Gpu("L4", 21.9, 121.0, "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"),
    Gpu(
        "A10G",
        21.9,
        70.0,
        "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    Gpu(
        "RTX PRO 6000",
        94.9,
        503.8,
        "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
        "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
    ),
    Gpu(
        "RTX 6000 Ada",
        47.3,
        364.2,
        "https://images.nvidia.com/aem-dam/en-zz/Solutions/technologies/NVIDIA-ADA-GPU-PROVIZ-Architecture-Whitepaper_1.1.pdf",
    ),
    Gpu(
        "RTX 5090",
        31.3,
        209.5,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
    Gpu("RTX 4090", 23.5, 165.2, _ADA),
    Gpu("RTX 3090", 23.5, 71.0, _AMPERE),
    Gpu(
        "V100 32GB",
        31.7,
        125.0,
        "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
        bf16=False,
    ),
    Gpu(
        "T4",
        14.5,
        65.0,
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
        bf16=False,
    ),
)
"""Within each family from the fastest down."""
USUAL = ("H100 SXM", "A100 80GB", "L40S", "RTX 4090")
"""Those that are looked at unless others are named."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in any spelling that fits one only: `h100-sxm`, `NVIDIA A100-SXM4-80GB`, `rtx4090`, `4090`.

    An H100 without further words is the SXM module, which is what most clouds rent out.

    Raises:
        UserError: there is none or more than one; names those that are near.
    """
    keys = {"".join(_words(gpu.name)): gpu for gpu in GPUS}
    words = _words(name)
    if "".join(words) in ("h100", "h10080gb"):  # as PyTorch names it: NVIDIA H100 80GB HBM3
        words = ["h100", "sxm"]
    if (gpu := keys.get("".join(words))) is not None:
        return gpu
    within = [gpu for gpu in GPUS if words and set(words) <= set(_words(gpu.name))]
    if len(within) == 1:
        return within[0]
    near = within or [keys[key] for key in difflib.get_close_matches("".join(words), keys, 3, 0.5)]
    said = f"{shorten(name, 60)!r} is {'more than one GPU' if within else 'no GPU that mtr knows'}"
    names = " or ".join(gpu.name for gpu in near) if near else f"one of {', '.join(gpu.name for gpu in GPUS)}"
    raise UserError(f"--gpu: {said}; use {names}")


_SAID_BY_NUMBER = ("nvidia", "geforce", "tesla", "rtx", "generation", "blackwell", "workstation", "server", "edition")


_ONE_RATE = ("a100", "v100")
"""Their modules and cards are one GPU here."""


def _words(name: str) -> list[str]:
    """The words that tell GPUs apart."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"^rtx(?=\d)", "", name.lower()))
    words = [re.sub(r"^sxm\d$", "sxm", word) for word in words if word not in _SAID_BY_NUMBER and word[:3] != "hbm"]
    any_board = bool(set(words) & set(_ONE_RATE))
    return [word for word in words if not (any_board and word in ("sxm", "pcie"))]
