"""The parts of a transformers model, inside whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: Any) -> Any:
    """The causal LM without its head, or the text decoder inside a larger model; of itself, a decoder."""
    base = base_model(model)
    found = base.get_decoder()
    if found is base:
        return getattr(found, "model", found)
    if not hasattr(found, "config"):  # "decoder" may name the output embeddings
        return base.base_model
    return decoder(found) if output_embeddings(found) is not None else found


def output_embeddings(model: Any) -> Any:
    """The head, which may be that of a causal LM inside; None where there is none."""
    base = base_model(model)
    found = base.get_output_embeddings()
    inside = base.get_decoder() if found is None and hasattr(base, "get_decoder") else base
    return found if inside is base else getattr(inside, "get_output_embeddings", lambda: None)()


def outer_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of the embeddings and those of the head, with what adapters add to them."""
    head = output_embeddings(model)
    return list(base_model(model).get_input_embeddings().parameters()), list(
        head.parameters()
    ) if head is not None else []


def idle_parts(model: Any) -> dict[str, nn.Module]:
    """By name, the largest parts of a transformers model that text does not pass: towers for images and sound, what
    joins them to the decoder, and its layers that only look at images. Empty for a causal LM.
    """
    text = decoder(model)
    used = {id(module) for part in _text_parts(model) for module in part.modules()}
    for number in getattr(text_config(base_model(model).config), "cross_attention_layers", None) or []:
        used -= {id(module) for module in text.layers[number].modules()}
    return dict(_outermost(base_model(model), used, ""))


def freeze_idle(model: Any) -> None:
    """Let only what text passes be trained."""
    text = {id(parameter) for part in _text_parts(model) for parameter in part.parameters()}
    text -= {id(parameter) for part in idle_parts(model).values() for parameter in part.parameters()}
    for parameter in base_model(model).parameters():
        if id(parameter) not in text:
            parameter.requires_grad_(False)


def _text_parts(model: Any) -> list[Any]:
    head = output_embeddings(model)
    return [decoder(model)] + [head] * (head is not None)


def _outermost(module: nn.Module, used: set[int], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Of the modules inside, those that have parameters and in which nothing is used."""
    for name, child in module.named_children():
        inside = {id(part) for part in child.modules()}
        if inside <= used:
            continue
        if inside & used:
            yield from _outermost(child, used, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
