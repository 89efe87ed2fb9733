"""How long a GPU takes for a number of FLOPs: always a range, from a share of its peak rate that is assumed.

    seconds = FLOPs, recomputed ones included / (peak rate * share * GPUs)      or, for small models, by kernel launches

Nothing of mtr has been timed on a GPU yet. The share is what others have published: LoRA on an 8B model on an H100
reaches 41 % (NeMo Automodel's performance summary) and about 32 % (a trainer based on TRL) of the data sheet's peak, in
needed FLOPs; see docs/performance.md. Evaluation, generation, checkpoints, compiling and the start are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtr.model.flops import Flops
from mtr.plan.gpus import Gpu
from mtr.recipe.sections import Checkpointing

DENSE = (0.25, 0.45)
"""Share of the peak that training reaches, lowest and highest."""
ROUTED = (0.10, 0.35)
"""With experts, each of which gets few of the tokens."""
_IN_4_BITS = (0.7, 0.9)
"""Of that, where every product unpacks its weights first."""
_SEVERAL = (0.8, 0.95)
"""Of that, on several GPUs: gradients are exchanged, and the busiest one is waited for."""
_LAUNCHES = (100 * 4e-6, 310 * 10e-6)
"""Seconds of a layer's kernel launches, forward and backward, below which no pack gets: 93 to 138 kernels compiled, 224
to 312 otherwise (benchmarks/results/step-cost.json), at 4 to 10 microseconds each, which is assumed."""

RECOMPUTED: Mapping[Checkpointing, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "products": (0.0, 0.0),
    "selective": (0.5, 0.0),
    "full": (1.0, 1.0),
    "offload": (1.0, 1.0),
}
"""Of the forward's products with weights, and of its attention and recurrences, the share that the backward repeats.
selective: the products that widen, which are half of a decoder layer."""


@dataclass(frozen=True)
class Setting:
    """What the share depends on."""

    checkpointing: Checkpointing
    trained_whole: bool
    """Full fine-tuning: the forward is a third of the products' FLOPs, with frozen weights it is half."""
    routed: bool = False
    in_4_bits: bool = False


@dataclass(frozen=True)
class Duration:
    share: tuple[float, float]
    """Of the peak rate that is assumed, recomputation counted."""
    seconds: tuple[float, float]
    """From the shortest to the longest."""


_PER_TOKEN = 0.25
"""What norms, rotary embeddings, activations and the bytes of adapters take of a token, as a share of its products with
weights: 17 % by a roofline of compiled layers (benchmarks/results/step-cost.json), more where they are not compiled."""


def expected_speedup(single_pass: Flops, per_turn: Flops) -> float:
    """How much faster one pass is than one pass per turn: with the work for each token that FLOPs leave out."""

    def taken(flops: Flops) -> float:
        return flops.total + _PER_TOKEN * flops.linear

    return taken(per_turn) / taken(single_pass)


def with_recomputation(flops: Flops, setting: Setting) -> float:
    """FLOPs that a device computes, where `flops` are those that are needed."""
    products, attention = RECOMPUTED[setting.checkpointing]
    forward = 1 / 3 if setting.trained_whole else 1 / 2
    linear = flops.linear * (1 + products * forward)
    return linear + (flops.attention + flops.recurrence) * (1 + attention / 3) + flops.head


def duration(flops: Flops, packs: float, layers: int, setting: Setting, gpu: Gpu, num_gpus: int = 1) -> Duration:
    """
    Args:
        flops: that are needed.
        packs: in which they are computed, over all GPUs.
        layers: of the model.
    """
    low, high = ROUTED if setting.routed else DENSE
    for applies, (worse, better) in ((setting.in_4_bits, _IN_4_BITS), (num_gpus > 1, _SEVERAL)):
        low, high = (low * worse, high * better) if applies else (low, high)
    work = with_recomputation(flops, setting) / (gpu.flops_per_second * num_gpus)
    least, most = (packs / num_gpus * layers * launches for launches in _LAUNCHES)
    return Duration((low, high), (max(work / high, least), max(work / low, most)))
