"""Tiny random checkpoints with a text decoder inside: of models for images and text, as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
_QWEN_VISION = {
    **_VISION,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_LAYERS = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}

IMAGE_TEXT: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLTextConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        {"tie_word_embeddings": True},
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        "Qwen3_5TextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        _QWEN_VISION,
        {},
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3TextConfig",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
        _LAYERS,
        {"mm_tokens_per_image": 4},
    ),
    "mistral3": (
        "Mistral3Config",
        "MistralConfig",
        {},
        {**_LAYERS, "model_type": "pixtral", "head_dim": 16},
        {"tie_word_embeddings": False},
    ),
}
"""Classes of the config and of its text part; options of the text part, of the tower for images, of the whole."""


def image_text_config(kind: str, **text: Any) -> Any:
    whole, inside, options, vision, others = IMAGE_TEXT[kind]
    config = getattr(transformers, inside)(**{**_TEXT, **options, **text})
    return getattr(transformers, whole)(text_config=config.to_dict(), vision_config=dict(vision), **others)


def save_image_text(kind: str, tokenizer: Path, folder: Path) -> None:
    """With the vocabulary and the end of a turn of a tokenizer, which is saved beside it."""
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": loaded.eos_token_id}
    config = image_text_config(kind, vocab_size=len(loaded), **ends)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(str(folder))
    loaded.save_pretrained(str(folder))
