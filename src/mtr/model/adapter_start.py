"""How an adapter starts, where it starts from the weights: PiSSA, OLoRA and LoftQ, computed by PEFT or as it does.

    PiSSA, OLoRA   W = R + s B0 A0    the adapter starts as a part of the weights, and training sees the rest R
    the result     W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]    a plain adapter of twice the rank, for W itself
    LoftQ          Q + s B0 A0 ~ W    the adapter starts as what the 4-bit weights Q have lost, and Q stays

A0 and B0 are in every checkpoint, so that a run which is resumed takes the same part out of W and not one computed
anew. R is rounded to the dtype of the weights: in 16 bits, the result differs from what was trained by that rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mtr.errors import UserError
from mtr.model.weights import Stored

PREFIX = "initial."
"""Of the names of A0 and B0 in a checkpoint."""
_CHECKPOINT = "training_state.safetensors"


@torch.no_grad()
def take_from_base(adapted: Any, how: str, checkpoint: Path | None) -> None:
    """Start each adapter as a part of its weights, which is taken out of them, in place.

    A0 and B0 are kept as `adapted.initial_adapter`, in host memory, by the names of their parameters.

    Args:
        how: `lora.init_lora_weights` of the recipe.
        checkpoint: that has A0 and B0; None: computed from the weights.

    Raises:
        UserError: a layer has no such part, or the checkpoint does not have it.
    """
    layers = _layers(adapted, how)
    saved = _saved(checkpoint, layers) if checkpoint else None
    initial: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.base_layer.weight.is_meta:
            continue  # another process has its values
        if saved is None:
            _compute(layer, how)
        for side in ("lora_A", "lora_B"):
            key, weight = f"{name}.{side}.default.weight", getattr(layer, side)["default"].weight
            if saved is not None:
                weight.copy_(saved[key])
            initial[key] = weight.detach().to("cpu", copy=True)
        _take_out(layer)
    adapted.initial_adapter = initial


def initial_adapter(model: Any) -> dict[str, Tensor]:
    """A0 and B0 of a model by the names of their parameters; empty where nothing was taken out of its weights."""
    found: dict[str, Tensor] = getattr(model, "initial_adapter", None) or {}
    return found


def as_plain_adapter(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[A; A0] and [B, -B0] in place of A and B, in host memory: twice the rank, for the original weights."""
    plain = dict(weights)
    for name, start in initial.items():
        now = weights[name].detach().cpu()
        plain[name] = torch.cat([now, start]) if ".lora_A." in name else torch.cat([now, -start], dim=1)
    return plain


@contextlib.contextmanager
def twice_the_rank(config: Any) -> Iterator[None]:
    """PEFT's config with twice the ranks and the same scale, while an adapter is saved that has them."""
    kept = {key: getattr(config, key) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    more = math.sqrt(2) if config.use_rslora else 2  # the scale is alpha / sqrt(r), or alpha / r
    config.r, config.lora_alpha = 2 * config.r, more * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(config, key, value)


@torch.no_grad()
def make_up_for_quantization(adapted: Any, stored: Mapping[str, Stored]) -> None:
    """LoftQ with one iteration: adapters start as the best of their rank for what the 4-bit weights have lost.

    Args:
        stored: the tensors of the weight files, not quantized.

    Raises:
        UserError: they do not have the weights of an adapted layer.
    """
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in _adapted(adapted).items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in stored:
            raise UserError(
                f"lora.init_lora_weights: loftq: the weight files have no tensor {key} to compare the 4-bit weights "
                "with; leave the adapted layer out of lora.target_modules, or use true"
            )
        quantized = dequantize_module_weight(layer.base_layer).float()
        with safe_open(str(stored[key].file), framework="pt") as file:
            lost = file.get_tensor(key).to(quantized) - quantized
        rank, scale = layer.r["default"], layer.scaling["default"]
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        roots = values[:rank].sqrt()
        layer.lora_A["default"].weight.copy_(roots[:, None] * right[:rank])
        layer.lora_B["default"].weight.copy_(left[:, :rank] * roots / scale)


def _compute(layer: Any, how: str) -> None:
    """A0 and B0 of a layer by PEFT, which takes float32 only and changes the weights as well; they are put back."""
    weight, whole = layer.base_layer.weight, layer.base_layer.weight.data
    kept = {side: getattr(layer, side)["default"].weight.dtype for side in ("lora_A", "lora_B")}
    weight.data = whole.to(torch.float32, copy=True)
    if how == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", how)
    weight.data = whole
    for side, dtype in kept.items():
        side_weight = getattr(layer, side)["default"].weight
        side_weight.data = side_weight.data.to(dtype).contiguous()


def _take_out(layer: Any) -> None:
    """R = W - s B0 A0, computed in float32 at least."""
    weight = layer.base_layer.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    a, b = (getattr(layer, side)["default"].weight.to(exact) for side in ("lora_A", "lora_B"))
    weight.data = (weight.to(exact) - layer.scaling["default"] * (b @ a)).to(weight.dtype)


def _adapted(model: Any) -> dict[str, Any]:
    """The layers with an adapter by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.r)}


def _layers(adapted: Any, how: str) -> dict[str, Any]:
    """
    Raises:
        UserError: an adapter is on something that is no linear layer of its own, or has a larger rank than it.
    """
    owners: dict[int, int] = {}
    for module in adapted.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = _adapted(adapted)
    for name, layer in layers.items():
        key = f"lora.init_lora_weights: {how}: {name.removeprefix('base_model.model.')}"
        if type(layer.base_layer) is not nn.Linear:
            raise UserError(f"{key} is no plain linear layer; leave it out of lora.target_modules, or use true")
        if owners[id(layer.base_layer.weight)] > 1:
            raise UserError(
                f"{key} shares its weights with another layer, which would lose that part, too; leave it out of "
                "lora.target_modules, or use true"
            )
        rank, most = layer.r["default"], min(layer.base_layer.weight.shape)
        if rank > most:
            raise UserError(
                f"{key} has rank {most} and its adapter {rank}; lower lora.r, or set it in lora.rank_pattern"
            )
    return layers


def _saved(checkpoint: Path, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    with safe_open(str(checkpoint / _CHECKPOINT), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118  (not a dict)
        saved = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    for name, layer in layers.items():
        for side in ("lora_A", "lora_B"):
            key, shape = f"{name}.{side}.default.weight", getattr(layer, side)["default"].weight.shape
            if key not in saved or saved[key].shape != shape:
                raise UserError(f"{checkpoint}: has no start of {key}; is it another recipe's?")
    return saved
