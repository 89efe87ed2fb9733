"""Memory that training keeps beside weights and activations: gradients and the state of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHARE = 0.92
"""Of the free memory that may be planned with; the rest is left to fragmentation."""


@dataclass(frozen=True)
class TrainingState:
    """Bytes on one device, beyond weights and activations, once the first update is made."""

    gradients: int
    optimizer: int
    """State that it keeps: moments in the dtype of the trained weights."""
    update: int
    """Taken for the length of an update, when no activations are alive."""

    @property
    def kept(self) -> int:
        return self.gradients + self.optimizer


def training_state(parameters: Iterable[nn.Parameter], optim: str, on_cuda: bool) -> TrainingState:
    """
    Args:
        parameters: those that are trained count, of sharded ones the local shards.
        optim: `training.optim` of the recipe.
        on_cuda: there AdamW updates all weights at once, else one after the other.
    """
    own: list[Tensor] = [p.to_local() if isinstance(p, DTensor) else p for p in parameters if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in own]
    gradients, largest = sum(sizes), max(sizes, default=0)
    match optim:
        case "adamw_torch":  # with the roots of the second moments
            return TrainingState(gradients, 2 * gradients, gradients if on_cuda else 3 * largest)
        case "adamw_torch_fused":
            return TrainingState(gradients, 2 * gradients, 0)
        case "adafactor":
            return TrainingState(gradients, sum(map(_factors, own)), 2 * largest)
        case "sgd":
            return TrainingState(gradients, 0, 0)
    raise AssertionError(optim)


def _factors(weight: Tensor) -> int:
    """Bytes that Adafactor keeps: of a matrix a row and a column."""
    size = weight.numel()
    kept = size // weight.shape[-1] + size // weight.shape[-2] if weight.dim() > 1 else size
    return kept * weight.element_size()
