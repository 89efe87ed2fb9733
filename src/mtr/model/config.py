"""What a model's config promises: numbers that fit each other, a size that its weights have, the ids that it knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from mtr.attention.layers import common_value
from mtr.attention.model_parts import text_config
from mtr.errors import UserError, described
from mtr.model.auto_class import auto_class
from mtr.model.weights import Stored

_POSITIVE = (
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def check_config(config: Any) -> None:
    """Numbers of a text model's config that cannot be, or do not fit each other; the probe meets what else there is.

    Raises:
        ValueError: names the key.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it is an encoder-decoder; only decoder-only models have turns that share a prefix")
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError("use_bidirectional_attention: tokens see those after them, so none is predicted")
    for key in _POSITIVE:
        value = common_value(config, key)
        if isinstance(value, (str, float)):
            raise ValueError(f"{key} is {value!r}, and has to be an integer")
        if isinstance(value, int) and value <= 0:
            raise ValueError(f"{key} is {value}, and has to be above 0")
    heads, keys, hidden = (_integer(config, key) for key in _POSITIVE[:3])
    if heads and keys and heads % keys:
        raise ValueError(f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({keys})")
    if heads and hidden and hidden % heads and not _integer(config, "head_dim"):
        raise ValueError(f"hidden_size ({hidden}) is no multiple of num_attention_heads ({heads})")
    types, layers = getattr(config, "layer_types", None), _integer(config, "num_hidden_layers")
    if isinstance(types, list) and layers and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")


def _integer(config: Any, key: str) -> int | None:
    """None where there is none, or a list of one for each layer."""
    value = common_value(config, key)
    return value if isinstance(value, int) else None


def check_size(
    config: Any, trust_remote_code: bool, stored: Mapping[str, Stored], itemsize: float, may_miss: bool
) -> None:
    """Refuse a config that describes a far larger model than its weights are, before memory is taken for it.

    Args:
        stored: the tensors of the weight files; none where there are no files, or they are not here yet.
        itemsize: bytes of a parameter in memory; what fits neither RAM nor a GPU is refused where no files tell.
        may_miss: weights may be missing on purpose, so the files do not tell.

    Raises:
        UserError: with both sizes.
    """
    try:
        parameters = _count_parameters(config, trust_remote_code)
    except Exception as error:  # whatever a library raises on numbers that it did not expect
        raise UserError(f"describes no model that can be built: {described(error)}") from None
    if stored and not may_miss:
        packed = bool(getattr(config, "quantization_config", None))  # 8 parameters in a byte at most
        held = sum(tensor.size * 8 if packed else tensor.size for tensor in stored.values())
        if parameters > 2 * held:  # tied weights are counted once or twice
            raise UserError(
                f"describes a model of {parameters:,} parameters, and the weights hold {held:,}: "
                "it belongs to another model"
            )
    elif parameters * itemsize > (memory := _memory()):
        raise UserError(
            f"describes a model of {parameters:,} parameters, which cannot fit in the "
            f"{memory / 2**30:,.0f} GiB of memory of this machine"
        )


def _count_parameters(config: Any, trust_remote_code: bool) -> int:
    """Of the model on the meta device, which takes no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _memory() -> int:
    """Bytes of RAM or of the largest GPU, whichever is more."""
    gpus = range(torch.cuda.device_count())
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in gpus]
    return max([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *sizes])


def check_reach(config: Any, tokenizer: Any, max_length: int) -> tuple[str, ...]:
    """Warnings of `check_vocabulary` and `check_length`.

    Raises:
        UserError: as they do.
    """
    found = (check_vocabulary(config, tokenizer), check_length(config, max_length))
    return tuple(text for text in found if text)


def check_vocabulary(config: Any, tokenizer: Any) -> str | None:
    """Whether the model has an embedding for every id that the tokenizer makes of text.

    Added tokens without one are refused only where the chat template or the end of a turn would use them: tokenizers
    of text models are published with tokens for images, and with a token for padding, that never occur.

    Returns:
        A warning that names the added tokens without an embedding; `prepare.views.check_ids` refuses rows with them.

    Raises:
        UserError: names the token with the largest id.
    """
    size = vocabulary_size(config)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if size is not None and i >= size}
    if not beyond:
        return None
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    template = tokenizer.chat_template or ""
    texts = [template] if isinstance(template, str) else list(template.values())
    texts += [str(tokenizer.bos_token), str(tokenizer.eos_token)]
    needed = {token: i for token, i in beyond.items() if token not in added or any(token in text for text in texts)}
    if needed:
        token = max(needed, key=lambda token: needed[token])
        raise UserError(
            f"the tokenizer's token {token!r} has id {needed[token]}, and the model has embeddings for {size} ids "
            "(vocab_size in config.json): use the model's own tokenizer, or resize its embeddings and save it again"
        )
    names = ", ".join(map(repr, sorted(beyond, key=lambda token: beyond[token])[:3]))
    return f"the model has no embedding for {len(beyond)} of the tokenizer's tokens ({names}): rows must not hold them"


def vocabulary_size(config: Any) -> int | None:
    """Rows of the embedding, by the config."""
    return _integer(text_config(config), "vocab_size")


def check_length(config: Any, max_length: int) -> str | None:
    """A warning if sequence.max_length goes beyond the positions that the model was made for.

    Raises:
        UserError: positions are learned, one by one, so there are none beyond.
    """
    text = text_config(config)
    limit = positions(text)
    if limit is None or max_length <= limit:
        return None
    if not _has_rope(text):
        raise UserError(
            f"sequence.max_length: {max_length} is more than the {limit} positions that the model has; lower it"
        )
    return (
        f"sequence.max_length ({max_length}) is beyond the {limit} positions of the model (max_position_embeddings, "
        "with RoPE scaling): longer turns are trained, but the model has not been made for them"
    )


def _has_rope(config: Any) -> bool:
    return any(getattr(config, key, None) is not None for key in ("rope_parameters", "rope_scaling", "rope_theta"))


def positions(config: Any) -> int | None:
    """How many positions the model was made for: max_position_embeddings, or more by the scaling of its RoPE."""
    limit = _integer(config, "max_position_embeddings")
    if limit is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = [limit]
    for one in [rope, *rope.values()]:
        factor = one.get("factor") if isinstance(one, Mapping) else None
        if isinstance(factor, (int, float)) and one.get("rope_type") != "default":
            original = one.get("original_max_position_embeddings") or limit
            scaled.append(int(original * factor))
    return max(scaled)
