"""How few tokens a text can have, by its length alone: a text that is far too long need not be encoded to know it."""

from __future__ import annotations

import json
from typing import Any

_KEEPING_NORMALIZERS = {"NFC", "Prepend"}
_KEEPING_SPLITTERS = {"ByteLevel", "Metaspace", "Digits"}
_MOST_COMPOSED = 4
"""Most characters that NFC composes to one."""


def longest_token(tokenizer: Any) -> int | None:
    """Most characters of a text that one token can stand for; None if that cannot be shown.

    It can for BPE that knows every byte, after steps that leave no character out. Elsewhere one token may stand for
    any number of characters: unknown ones, or white space beside an added token.
    """
    backend, added = getattr(tokenizer, "backend_tokenizer", None), tokenizer.added_tokens_decoder.values()
    if backend is None or type(backend.model).__name__ != "BPE" or any(t.lstrip or t.rstrip for t in added):
        return None
    normalizers, splitters = _steps(backend.normalizer), _steps(backend.pre_tokenizer)
    if not (all(map(_normalizer_keeps_all, normalizers)) and all(map(_splitter_keeps_all, splitters))):
        return None
    vocabulary = tokenizer.get_vocab()
    if not _bytes(splitters, backend.model) <= vocabulary.keys():
        return None
    composed = _MOST_COMPOSED if any(step["type"] == "NFC" for step in normalizers) else 1
    return composed * max(map(len, (*vocabulary, *map(str, added))))


def _steps(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, those of a sequence one by one."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    listed = settings.get("normalizers", settings.get("pretokenizers"))
    return [settings] if listed is None else listed


def _normalizer_keeps_all(step: dict[str, Any]) -> bool:
    replaces_spaces = step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁")
    return step["type"] in _KEEPING_NORMALIZERS or replaces_spaces


def _splitter_keeps_all(step: dict[str, Any]) -> bool:
    return step["type"] in _KEEPING_SPLITTERS or (step["type"] == "Split" and step["behavior"] != "Removed")


def _bytes(splitters: list[dict[str, Any]], model: Any) -> set[str]:
    """The tokens of single bytes; what no vocabulary holds if the model has no such tokens."""
    if any(step["type"] == "ByteLevel" for step in splitters):
        from tokenizers.pre_tokenizers import ByteLevel

        return set(ByteLevel.alphabet())
    return {f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else {""}
