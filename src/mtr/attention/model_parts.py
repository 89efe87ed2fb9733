"""The parts of a transformers model, inside whatever wraps it."""

from __future__ import annotations

from typing import Any


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: Any) -> Any:
    """The causal LM without its head."""
    base = base_model(model)
    found = base.get_decoder()
    return found.model if found is base else found


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
