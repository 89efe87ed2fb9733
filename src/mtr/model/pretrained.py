"""Pretrained weights, loaded so that none is made anew unasked: transformers' report of what it loaded is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from mtr.errors import UserError, described
from mtr.model.auto_class import auto_class
from mtr.model.weights import Stored, stored_tensors, unnamed_files, weight_files

log = logging.getLogger("mtr")

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3
_WRAPPERS = {
    "lora_": "they hold an adapter that was not merged; merge it (mtr merge, or PEFT's merge_and_unload), or name the "
    "base model and give the adapter as lora.init_from",
    "base_layer.": "they were saved from inside a PEFT model; save what merge_and_unload returns",
    "base_model.model.": "they were saved from inside a PEFT model; save what merge_and_unload returns",
    "_orig_mod.": "they were saved from a model under torch.compile; save the model inside it (its _orig_mod)",
    "_fsdp_wrapped_module.": "they were saved from a model under FSDP; save its full state dict without the wrapper",
    "_checkpoint_wrapped_module.": "they were saved from a model under activation checkpointing; save it without",
    "language_model.": "they are the text part of a larger model, under its names; save the text model by itself",
}
"""Parts of names that a wrapper adds, and where they come from."""
_QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|weight_scale\w*|absmax|quant_map|quant_state\..*|SCB)$")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Allowed:
    """Names, or patterns of names, that weights may lack or have too many of."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_pretrained(
    name: str, revision: str | None, config: Any, allowed: Allowed, seed: int = 0, **options: Any
) -> tuple[Any, list[str]]:
    """A model with its weights, of the class that its config names.

    Args:
        name: a folder or a Hub id.
        config: of the model.
        seed: of the random values of parameters that `allowed` lets be missing.
        options: of `from_pretrained`.

    Returns:
        The model, and the names of its parameters that start from random values, as `allowed`.

    Raises:
        UserError: begins with the name: the weights cannot be read, or are not the model's; names what differs.
    """
    stored = stored_tensors(weight_files(name, revision))
    torch.manual_seed(seed)
    try:
        _check_experts(stored, allowed.missing)
        model, report = auto_class(config).from_pretrained(
            name,
            config=config,
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with names
            **options,
        )
        if not stored:  # they have been downloaded now
            stored = stored_tensors(weight_files(name, revision))
            _check_experts(stored, allowed.missing)
        return model, check_report(report, model, stored, allowed)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # whatever a library raises on files that it did not expect
        raise UserError(f"{name}: {_odd_experts(stored) or described(error)}") from None


def check_report(report: Mapping[str, Any], model: Any, stored: Mapping[str, Stored], allowed: Allowed) -> list[str]:
    """Read transformers' loading report; tied parameters and what a model class says may differ are not in it.

    Returns:
        The missing parameters that are allowed; each is logged.

    Raises:
        UserError: something else is missing, unexpected or of another shape or kind, with the likely cause.
    """
    missing, fresh = _split(report["missing_keys"], allowed.missing)
    unexpected, unused = _split(report["unexpected_keys"], allowed.unexpected)
    mismatched = {name: (tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"]}
    problems = []
    if unexpected:
        problems.append(f"the model has no place for {_list(unexpected, 'tensor')}")
    if missing:
        problems.append(f"nothing is there for {_list(missing, 'parameter')} of the model")
    if mismatched:
        shapes = [f"{name} {list(there)}, not {list(here)}" for name, (there, here) in sorted(mismatched.items())]
        problems.append(f"the shape differs for {_list(shapes, 'tensor')}")
    if problems:
        cause = _cause(missing, unexpected, mismatched, stored, model)
        raise UserError(f"{'; '.join(problems)}: {cause}{_ways(missing, unexpected)}")
    _check_kinds(model, stored)
    if fresh:
        log.warning("model.allow_missing: not in the weights, so they start from random values: %s", ", ".join(fresh))
    if unused:
        log.warning("model.allow_unexpected: in the weights, and left out of the model: %s", ", ".join(unused))
    return fresh


def _split(names: Iterable[str], patterns: Collection[str]) -> tuple[list[str], list[str]]:
    """Names that no pattern matches, and those that one does."""
    asked = sorted(names)
    allowed = [name for name in asked if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in asked if name not in set(allowed)], allowed


def _list(items: list[str], kind: str) -> str:
    """How many there are, with the first few."""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind}{'s' if len(items) > 1 else ''} ({', '.join(items[:_SHOWN])}{more})"


def _ways(missing: list[str], unexpected: list[str]) -> str:
    """How to go on on purpose. There is no way to load another shape."""
    ways = []
    if missing:
        ways.append("what may start from random values goes into model.allow_missing")
    if unexpected:
        ways.append("what may be left out goes into model.allow_unexpected")
    return f". If that is meant: {', '.join(ways)}" if ways else ""


def _cause(
    missing: list[str], unexpected: list[str], mismatched: Collection[str], stored: Mapping[str, Stored], model: Any
) -> str:
    """The likeliest one, in words that end in the way out."""
    for part, cause in _WRAPPERS.items():
        if any(part in name for name in unexpected):
            return cause
    if (prefix := _prefix(missing, unexpected)) is not None:
        return f"names in the files begin with {prefix!r}, and those of the model do not; save it again without"
    if any(_QUANTIZED.search(name) for name in unexpected):
        return "they are quantized, and config.json has no quantization_config that says how; take it from the original"
    unread = unnamed_files([tensor.file for tensor in stored.values()])
    if missing and unread:
        return f"the index does not name {unread[0]}, which lies beside them; restore model.safetensors.index.json"
    if mismatched:
        return "config.json is that of a model of another size; take the one that belongs to the weights"
    if missing == ["lm_head.weight"]:
        return "without a head of its own a model has tie_word_embeddings: true in config.json"
    layers = {int(found[1]) for name in stored if (found := _LAYER.search(name))}
    wanted = {int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))}
    if layers and wanted and layers != wanted:
        return f"they have {len(layers)} layers, and config.json says {len(wanted)}"
    return "config.json may be that of another model, or the files are not complete"


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """What the files' names have before those of the model."""
    wanted = set(missing)
    for name in unexpected:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                return ".".join(parts[:cut]) + "."
    return None


def _check_experts(stored: Mapping[str, Stored], allowed: Collection[str]) -> None:
    """Matrices of experts are stacked in the order of their numbers: without one, the next would take its place.

    Raises:
        UserError: a number below the highest of its layer is missing.
    """
    experts = [found for name in stored if (found := _EXPERT.match(name))]
    counts = {found[1]: 0 for found in experts}
    for found in experts:
        counts[found[1]] = max(counts[found[1]], int(found[2]) + 1)
    kinds = {(found[1], found[3]) for found in experts}
    needed = {f"{layer}{number}{kind}" for layer, kind in kinds for number in range(counts[layer])}
    if absent := _split(needed - stored.keys(), allowed)[0]:
        raise UserError(f"{_list(absent, 'tensor')} of experts not in the files; copy or download them again")


def _odd_experts(stored: Mapping[str, Stored]) -> str | None:
    """Why transformers cannot stack the matrices of experts, which it does not tell."""
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for name, tensor in stored.items():
        if found := _EXPERT.match(name):
            shapes.setdefault((found[1], found[3]), set()).add(tensor.shape)
    odd = sorted(f"{layer}*{kind}" for (layer, kind), found in shapes.items() if len(found) > 1)
    return f"experts of one layer have different shapes ({', '.join(odd[:_SHOWN])})" if odd else None


def _check_kinds(model: Any, stored: Mapping[str, Stored]) -> None:
    """Integers in place of weights are quantized values without their scales."""
    if getattr(model.config, "quantization_config", None):
        return
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in stored.items():
        if tensor.dtype not in _FLOATS and (name in floating or name.endswith(".weight")):
            raise UserError(
                f"{name} is stored as {tensor.dtype}, which is no kind of number to train; save the model in bfloat16 "
                "or float32"
            )
