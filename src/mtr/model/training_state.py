"""Memory that training keeps beside weights and activations: gradients and the state of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def training_state(
    parameters: Iterable[nn.Parameter],
    optim: str,
    on_cuda: bool,
    embeddings: Iterable[nn.Parameter] = (),
    head: Iterable[nn.Parameter] = (),
) -> TrainingState:
    """
    Args:
        parameters: those that are trained count, of sharded ones the local shards.
        optim: `training.optim` of the recipe.
        on_cuda: there AdamW updates all weights at once, else one after the other.
        embeddings, head: those of the model's parameters, which some optimizers treat in another way.
    """
    embedded = {id(p) for p in embeddings}
    outer = embedded | {id(p) for p in head}
    trained = [p for p in parameters if p.requires_grad]
    own: list[Tensor] = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    gradients, largest = sum(map(_bytes, own)), max(map(_bytes, own), default=0)
    match optim:
        case "adamw_torch":
            return _of_adamw(own, gradients, on_cuda)
        case "adamw_torch_fused":
            return TrainingState(gradients, 2 * gradients, 0)
        case "schedule_free_adamw":  # an evaluation keeps a copy of the weights, when there are no gradients
            return TrainingState(gradients, 2 * gradients, gradients)
        case "muon":
            matrices = [p for p in own if p.dim() == 2 and id(p) not in outer]
            others = [p for p in own if p.dim() != 2 or id(p) in outer]
            of_others = _of_adamw(others, gradients, on_cuda)
            update = max(of_others.update, max(map(_orthogonalized, matrices), default=0))
            return TrainingState(gradients, sum(map(_bytes, matrices)) + of_others.optimizer, update)
        case "adamw_8bit" | "paged_adamw_8bit":  # pages may be in the host's memory, and need not
            kept = sum(2 * _bytes(p) if id(p) in embedded else _moments_in_8_bits(p) for p in own)
            return TrainingState(gradients, kept, 0 if on_cuda else 3 * largest)
        case "adafactor":
            return TrainingState(gradients, sum(map(_factors, own)), 2 * largest)
        case "sgd":
            return TrainingState(gradients, 0, 0)
    raise AssertionError(optim)


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _of_adamw(weights: Sequence[Tensor], gradients: int, on_cuda: bool) -> TrainingState:
    """Two moments; an update takes the roots of the second ones."""
    sizes = list(map(_bytes, weights))
    return TrainingState(gradients, 2 * sum(sizes), sum(sizes) if on_cuda else 3 * max(sizes, default=0))


def _orthogonalized(matrix: Tensor) -> int:
    """Bytes that Muon takes to orthogonalize an update: it and, in 16 bits, two copies of it and three squares."""
    return _bytes(matrix) + 2 * (2 * matrix.numel() + 3 * min(matrix.shape) ** 2)


def _moments_in_8_bits(weight: Tensor) -> int:
    """Bytes of two moments, with a float32 scale for each block of 256; in 32 bits where the tensor is small."""
    size = weight.numel()
    return 2 * (size + 4 * -(-size // 256)) if size >= 4096 else 8 * size


def _factors(weight: Tensor) -> int:
    """Bytes that Adafactor keeps: of a matrix a row and a column."""
    size = weight.numel()
    kept = size // weight.shape[-1] + size // weight.shape[-2] if weight.dim() > 1 else size
    return kept * weight.element_size()
