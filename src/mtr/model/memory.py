"""Memory that packs take, measured, and the largest one that fits.

The memory of a pack is a line, `fixed + per_token * tokens`: attention keeps no T x T matrix and the loss a chunk of
logits at a time. Two short packs, forward and backward, measure it. `mtr.model.estimate` predicts it without a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mtr.attention.model_parts import base_model, outer_parameters, text_config
from mtr.errors import UserError
from mtr.model.device import available_memory, peak_memory, reset_peak_memory
from mtr.model.training_state import SHARE, training_state
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Backend
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

_MOST_TOKENS = 2**17


@dataclass(frozen=True)
class PackMemory:
    """Bytes of a pack's forward and backward: fixed + per_token * tokens."""

    fixed: float
    per_token: float
    free: int
    """Bytes that a pack may take: what is free, minus gradients and optimizer state."""

    def bytes(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    @property
    def most_tokens(self) -> int:
        """The largest pack that fits, a multiple of 128."""
        tokens = int((SHARE * self.free - self.fixed) / self.per_token)
        return max(0, min(tokens, _MOST_TOKENS) // 128 * 128)


@dataclass(frozen=True)
class Probe:
    """A model as a training step calls it, for measurements: within its autocast, sharded or compiled as it is."""

    tree_model: TreeModel
    call: nn.Module
    """`tree_model` itself, or what wraps it for the processes of the run. A probe of it makes no collective call but
    those that gather shards."""
    device: torch.device
    optim: str = "adamw_torch"
    """`training.optim` of the recipe."""
    multiple: int = 1
    """The length of a pack is padded to one of it."""
    unsynchronized: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Within it, a backward does not average gradients over processes."""

    def free(self) -> int:
        """Bytes that activations may take, with gradients and optimizer state in place.

        Raises:
            UserError: an update does not fit.
        """
        reset_peak_memory(self.device)
        model, on_cuda = self.tree_model.model, self.device.type == "cuda"
        state = training_state(model.parameters(), self.optim, on_cuda, *outer_parameters(model))
        available = available_memory(self.device)
        if available < state.kept + state.update:
            raise UserError(
                f"training.optim: gradients and the state of {self.optim} take {state.kept / 2**30:.1f} GiB, an update "
                f"{state.update / 2**30:.1f} GiB more, and {available / 2**30:.1f} GiB are free on {self.device}; use "
                "adamw_torch_fused or adafactor, train with lora, or shard the model with training.parallel: fsdp2"
            )
        return available - state.kept

    def measure(self, tokens: int) -> PackMemory:
        """Memory of packs on this device, measured with two of them: `tokens`, and half as many.

        Each is one sequence in which every token is predicted, so a real pack of this size takes no more, except for
        the keys that varlen gathers. Which attention is fastest is left to the first real pack.

        Raises:
            UserError: not even the shorter one fits.
        """
        half = max(tokens // 2, 128)
        try:
            with _undecided(self.tree_model):
                self.peak(64)  # allocates gradients and workspaces
                small, large = self.peak(half), self.peak(2 * half)
        except torch.OutOfMemoryError:
            raise UserError(
                f"sequence.max_tokens: a pack of {2 * half} tokens does not fit on {self.device}; lower "
                "sequence.max_length, set training.gradient_checkpointing to full, or use a smaller model"
            ) from None
        finally:
            self.tree_model.zero_grad(set_to_none=True)
        per_token = max((large - small) / half, 1.0)
        return PackMemory(max(small - per_token * half, 0.0), per_token, self.free())

    def peak(self, tokens: int) -> int:
        """Peak bytes of one pack's forward and backward, above what was allocated before."""
        batch = self._batch(tokens).to(self.device)
        reset_peak_memory(self.device)
        before = peak_memory(self.device)
        with self.unsynchronized():
            torch.autograd.backward(self.call(batch))
        return peak_memory(self.device) - before

    def _batch(self, tokens: int) -> Batch:
        vocabulary = text_config(base_model(self.tree_model.model).config).vocab_size
        ids = np.random.default_rng(tokens).integers(0, vocabulary, tokens)
        layout = merge([View(ids[:1], ids[1:], np.ones(tokens - 1))])
        return build_batch(Pack((layout,)), self.multiple)

    def fit_pack(self, max_length: int) -> tuple[int, PackMemory]:
        """The largest `sequence.max_tokens` that fits, and the measurement it was estimated from.

        Raises:
            UserError: a turn of max_length would not fit.
        """
        memory = self.measure(min(max_length, 4096))
        if memory.most_tokens < max_length:
            raise UserError(
                f"sequence.max_length: a turn of {max_length} tokens takes {memory.bytes(max_length) / 2**30:.1f} GiB "
                f"and {memory.free / 2**30:.1f} GiB are free; lower it, or set training.gradient_checkpointing to full"
            )
        return memory.most_tokens, memory


def hungriest(backends: Sequence[Backend]) -> Backend:
    """Of several attention backends the one that takes the most memory: varlen, which gathers keys."""
    return "varlen" if "varlen" in backends else backends[0]


@contextlib.contextmanager
def _undecided(model: TreeModel) -> Iterator[None]:
    """One attention backend stands for all candidates, which stay."""
    candidates = model.backends
    model.backends = (hungriest(candidates),)
    try:
        yield
    finally:
        model.backends = candidates
