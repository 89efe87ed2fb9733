"""Memory of a training step without the device, the weights or any arithmetic: storages of fake tensors, followed.

    a few layers of the model, as fake tensors  ->  forward and backward  ->  most bytes alive at a time
    one layer more of a kind is a line:  peak(few) + sum over kinds of (layers not among them) * (peak(one more) - peak)

The operators are those of a real step, checkpointing, LoRA and autocast included. Left out are what kernels take inside
(workspaces, the keys that varlen gathers, gathered dense masks) and what the allocator loses. Layers that torch.compile
has fused keep no more than this.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtr.attention.model_parts import idle_parts, outer_parameters, text_config
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.layer_kinds import kinds_of_layers
from mtr.model.shrink import keep_layers
from mtr.model.training_state import SHARE, TrainingState, training_state
from mtr.model.tree_model import RowModel, TreeModel
from mtr.recipe.sections import Backend, Checkpointing
from mtr.tree.batch import Batch

Layers = tuple[int, ...]
"""Numbers of layers of the whole model."""

_HALF = (torch.bfloat16, torch.float16)
_LINEAR = 2**14
"""Tokens from which on every chunk of the loss is full."""
_FORK = 128
"""Tokens after which a tree forks: recurrent layers fill up what is shorter than a chunk."""


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all tensors that operators make, real or fake, while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Count these as there before."""
        for tensor in tensors:
            self._alive[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            size = storage.nbytes()
            self._alive[storage._cdata] = size
            self.now += size
            weakref.finalize(storage, self._forget, storage._cdata, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.now -= size


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes of the experts' products in every dtype: torch's own fake ones know bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, offsets = args[:3]
        if right.dim() == 3:  # [S, in] and [experts, in, out]
            return left.new_empty(left.shape[0], right.shape[-1])
        return left.new_empty(len(offsets), left.shape[0], right.shape[-1])  # gradient of the weights


@dataclass(frozen=True, eq=False)
class Estimator:
    """Of one model."""

    config: Any
    build: Callable[[Any], Any]
    """Makes the model of a config as it is trained, with its attention and LoRA, from within the meta device."""
    half: torch.dtype
    """Of an autocast: there is one where 16-bit weights are trained."""
    autocast: bool
    """There is one anyway."""
    optim: str
    """`training.optim` of the recipe."""
    backend: Backend
    """Of attention; kernels count as their inputs and outputs, `eager` with its T x T scores."""
    multiple: int = 1
    """The length of a pack is padded to one of it."""
    on_cuda: bool = True
    unpacked: bool = False
    """A pack is one turn, with the model's own attention."""

    @property
    def share(self) -> float:
        """Of the free memory that estimates may fill. The rest is fragmentation: the heap of a CPU's process has been
        seen to hold 1.6 times what is alive, and exactly that where every tensor is mapped on its own."""
        return SHARE if self.on_cuda else 0.6

    @property
    def layers(self) -> int:
        number: int = text_config(self.config).num_hidden_layers
        return number

    @functools.lru_cache(maxsize=64)  # noqa: B019  one object a run
    def activations(self, mode: Checkpointing, tokens: int) -> int:
        """Most bytes beyond weights, gradients and optimizer state in the forward and backward of one pack.

        Args:
            tokens: of the pack, each of them a predictor.
        """
        if tokens > _LINEAR:  # from there on it is a line, but for the T x T scores of `eager`
            short, long = (self.activations(mode, n) for n in (_LINEAR // 2, _LINEAR))
            return long + (tokens - _LINEAR) * (long - short) // (_LINEAR // 2)
        if mode == "offload":  # two layers' inputs are on the device: the one in use, and the one on its way
            return self._peak(self._few, "full", tokens, alone=True)
        return self._of_all_layers(lambda kept: self._peak(kept, mode, tokens))

    def weights(self) -> int:
        """Bytes of all weights and buffers: those of 16 bits that are trained in float32, frozen ones as loaded."""
        return self._of_all_layers(lambda kept: sum(map(_size, _tensors(self._model(kept)[0]))))

    def training_state(self) -> TrainingState:
        def part(name: str) -> int:
            return self._of_all_layers(lambda kept: getattr(self._state(kept), name))

        return TrainingState(part("gradients"), part("optimizer"), part("update"))

    def _state(self, kept: Layers) -> TrainingState:
        model = self._model(kept)[0]
        return training_state(model.parameters(), self.optim, self.on_cuda, *outer_parameters(model))

    def gathered(self) -> int:
        """Bytes that fsdp2 gathers at a time: all that is outside of the layers and two layers, and their gradients."""
        model = self._model(self._few[-2:])[0]
        idle = {id(p) for part in idle_parts(model).values() for p in part.parameters()}
        return sum((1 + p.requires_grad) * _size(p) for p in model.parameters() if id(p) not in idle)

    # --- a small model of fake tensors ---

    @functools.cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode()

    @functools.cached_property
    def _kinds(self) -> list[Any]:
        """Of each layer; layers of a kind take the same."""
        return kinds_of_layers(text_config(self.config))

    @functools.cached_property
    def _few(self) -> Layers:
        """The first layer of each kind, and the last layer of all, which is where the backward begins."""
        return tuple(sorted({self._kinds.index(kind) for kind in self._kinds} | {self.layers - 1}))

    @functools.cached_property
    def _more(self) -> list[tuple[Layers, int]]:
        """These layers and one more of a kind, and how many more of it there are."""
        left = [layer for layer in range(self.layers) if layer not in self._few]
        kinds = dict.fromkeys(self._kinds[layer] for layer in left)
        by_kind = [[layer for layer in left if self._kinds[layer] == kind] for kind in kinds]
        return [(tuple(sorted((*self._few, layers[0]))), len(layers)) for layers in by_kind]

    def _of_all_layers(self, measure: Callable[[Layers], int]) -> int:
        few = measure(self._few)
        return few + sum(count * (measure(kept) - few) for kept, count in self._more)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _model(self, kept: Layers, alone: bool = False) -> tuple[Any, bool]:
        """Of these layers, with master weights; is there an autocast?

        Args:
            alone: a model of its own: layers that some models have been checkpointed with and others not keep
                different amounts afterwards, and are no longer comparable.
        """
        with torch.device("meta"), torch.random.fork_rng(devices=[]), _without_warnings():
            model = self.build(_with_layers(self.config, kept)).train()
        mixed = any(p.requires_grad and p.dtype in _HALF for p in model.parameters())
        _make_fake(model, self._mode)
        return model, mixed or self.autocast

    def _peak(self, kept: Layers, mode: Checkpointing, tokens: int, alone: bool = False) -> int:
        model, mixed = self._model(kept, alone)
        checkpoint_activations(model, mode)
        tree_model = RowModel(model) if self.unpacked else TreeModel(model, self.backend)
        with self._mode:
            batch = _batch(-(-tokens // self.multiple) * self.multiple, self.unpacked)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            storages = Storages()
            storages.ignore(_tensors(model))
            storages.ignore(p.grad for p in model.parameters() if p.grad is not None)
            with storages, _GroupedProducts():  # type: ignore[no-untyped-call]
                with torch.autocast("cpu", self.half, enabled=mixed):
                    loss = tree_model(batch)
                torch.autograd.backward(loss)
            del loss
        return storages.peak


def _with_layers(config: Any, kept: Layers) -> Any:
    """A config of these layers only."""
    small = copy.deepcopy(config)
    vars(small).pop("quantization_config", None)
    text = text_config(small)
    keep_layers(text, list(kept), text.num_hidden_layers)
    return small


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every tensor of a model on the meta device becomes a fake one on the CPU, trained ones as master weights."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                widened = torch.float32 if parameter.requires_grad and parameter.dtype in _HALF else parameter.dtype
                fake = _fake(parameter, widened, mode)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            module._buffers[name] = _fake(buffer, buffer.dtype, mode)


def _fake(tensor: Tensor, dtype: torch.dtype, mode: FakeTensorMode) -> FakeTensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, meta, torch.device("cpu"))


def _batch(tokens: int, unpacked: bool) -> Batch:
    """One path, or a trunk with a branch from time to time: attention does not look at it, recurrent layers do."""
    ids = torch.zeros(tokens, dtype=torch.int64)
    weight = torch.zeros(tokens, dtype=torch.float64)
    index = np.arange(tokens)
    leaves_branch = (index % (2 * _FORK) == 0) & (index > 0)
    parent = index - 1 - _FORK * leaves_branch * (not unpacked)
    return Batch(ids[None], ids[None], ids, parent, ids, ids, weight, tokens)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """What there is to say of a model is said when it is loaded."""
    log = logging.getLogger("mtr")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
