"""LoRA in the model's dtype: adapters are float32, as the optimizer wants them, and compute as the layer they adapt.

    y = x W' + (x A') (s B)'        A [rank, in] and s B [out, rank] are cast to x's dtype, x [T, in] never is

PEFT casts each layer's input, and its output with it, to the adapters' float32: for a model in 16 bits, several passes
over [T, in] and [T, out]. The scale s goes to B, which is small. Layers that read the same input (q, k and v; gate and
up) read it once for all their A: one product with A stacked, and one in the backward for the input's gradient.

All of it is plain operators: autograd, checkpointing, autocast and torch.compile see nothing special.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger("mtr")

_READS: tuple[str, ...] = (
    *("active_adapters", "disable_adapters", "merged", "base_layer"),
    *("r", "scaling", "lora_A", "lora_B", "lora_dropout", "lora_bias", "lora_variant"),
)
"""Attributes of PEFT's layer that the forward here relies on."""
_SHARING = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))
"""Names of layers of one module that read the same input."""


class LoraLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA on a linear layer, with another forward. What it does not cover (DoRA, merged adapters) is PEFT's."""

    shared: SharedInput | None = None
    """With the other layers that read the same input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]"""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or not all(map(self._is_plain, names)):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        result = self.base_layer(x)
        for name in names:
            inner = self._inner(name, x)
            outer = (self.lora_B[name].weight * self.scaling[name]).to(inner.dtype)
            result = result + functional.linear(inner, outer).to(result.dtype)
        return result

    def _inner(self, name: str, x: Tensor) -> Tensor:
        """x A' of an adapter, [..., rank]."""
        if self.shared is not None and self.shared.name == name:
            return self.shared.product(self, x)
        return functional.linear(self.lora_dropout[name](x), self.lora_A[name].weight.to(x.dtype))

    def _is_plain(self, name: str) -> bool:
        return name not in self.lora_variant and not self.lora_bias[name]


class SharedInput:
    """Layers of one module that read the same input: the first that is called computes x A' of all of them.

    An input is the same if it is the same object; a layer that is called with another one computes anew. Nothing is
    kept beyond the call of the module, however it ends: so compiled graphs begin and end without any of it, too.
    """

    def __init__(self, name: str, layers: Sequence[LoraLinear]) -> None:
        """
        Args:
            name: of the adapter.
        """
        self.name = name
        self._layers = tuple(layers)
        self._x: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        """The products that are not taken yet, by the number of the layer."""

    def product(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """x A' of one of the layers, [..., rank]."""
        number = self._layers.index(layer)
        if self._x is not x or number not in self._left:
            stacked = torch.cat([each.lora_A[self.name].weight for each in self._layers])
            ranks = [each.r[self.name] for each in self._layers]
            products = torch.split(functional.linear(x, stacked.to(x.dtype)), ranks, dim=-1)
            self._x, self._left = x, dict(enumerate(products))
        product = self._left.pop(number)
        if not self._left:
            self._x = None
        return product

    def forget(self) -> None:
        self._x, self._left = None, {}


class _Sharing:
    """Goes before the class of a module some of whose layers read the same input."""

    shared_inputs: tuple[SharedInput, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the module's own class
        finally:
            for shared in self.shared_inputs:
                shared.forget()


@functools.cache
def _sharing(cls: Any) -> Any:
    """One class for all modules of a class: hooks would differ from layer to layer, and so each would be compiled.

    It belongs to the model's own Python module, where eager attention is looked up.
    """
    return type(cls.__name__, (_Sharing, cls), {"__module__": cls.__module__})


def compute_in_model_dtype(model: nn.Module) -> int:
    """Give PEFT's LoRA layers the forward above, in place; returns how many.

    Names, values and dtypes of their parameters stay, and so do PEFT's merging, saving and switching off.
    """
    changed = 0
    for parent in model.modules():
        children = {}
        for name, child in parent.named_children():
            if type(child) is not Linear:
                continue
            if missing := [read for read in _READS if not hasattr(child, read)]:
                log.warning("this version of peft has no %s in LoRA layers; adapters compute in float32", missing[0])
                return 0
            child.__class__ = LoraLinear
            children[name] = child
        changed += len(children)
        _share(parent, children)
    return changed


def _share(parent: nn.Module, children: dict[str, Any]) -> None:
    """Tell those of a module's layers that read the same input of each other."""
    found = []
    for names in _SHARING:
        layers = [children[name] for name in names if name in children]
        if len(layers) < 2:
            continue
        (adapter, *others) = layers[0].lora_A
        plain = all(
            [*layer.lora_A] == [adapter]
            and layer._is_plain(adapter)
            and isinstance(layer.lora_dropout[adapter], nn.Identity)
            for layer in layers
        )
        if plain and not others and len({layer.in_features for layer in layers}) == 1:
            shared = SharedInput(adapter, layers)
            for layer in layers:
                layer.shared = shared
            found.append(shared)
    if found:
        parent.shared_inputs = tuple(found)  # type: ignore[assignment]  # not a module
        kind: Any = type(parent)
        parent.__class__ = _sharing(kind)
