"""The class that a checkpoint is loaded into: the one that its config.json names.

    Qwen3ForCausalLM                    AutoModelForCausalLM
    Qwen3_5ForConditionalGeneration     AutoModelForImageTextToText, although a causal LM could be cut out of it

So parameters have the names that they have wherever the checkpoint, or an adapter of it, is loaded later.
"""

from __future__ import annotations

from typing import Any

_KINDS = (("CausalLM", "CAUSAL_LM"), ("ImageTextToText", "IMAGE_TEXT_TO_TEXT"), ("MultimodalLM", "MULTIMODAL_LM"))


def auto_class(config: Any) -> Any:
    """The auto class of transformers for a config, with `from_config` and `from_pretrained`.

    Where the config names no class, the first one for all of it, and not only for its text part.
    """
    import transformers

    kinds = [(getattr(transformers, f"AutoModelFor{name}", None), name, mapping) for name, mapping in _KINDS]
    autos = [(auto, f"AutoModelFor{name}", _class(mapping, config)) for auto, name, mapping in kinds if auto]
    remote = getattr(config, "auto_map", None) or {}
    named = (getattr(config, "architectures", None) or [None])[0]
    ways = (
        [name in remote for _, name, _ in autos],
        [found is not None and found.__name__ == named for _, _, found in autos],
        [found is not None and found.config_class is type(config) for _, _, found in autos],
        [found is not None for _, _, found in autos],
    )
    return next((autos[fits.index(True)][0] for fits in ways if any(fits)), transformers.AutoModelForCausalLM)


def _class(mapping: str, config: Any) -> Any:
    """Of transformers, for configs of this type; None where there is none."""
    import transformers

    classes = getattr(transformers, f"MODEL_FOR_{mapping}_MAPPING", {})
    found = classes.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found
