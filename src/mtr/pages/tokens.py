"""Token ids as texts that people can read, one by one.

A token of a byte-level tokenizer may hold a part of a character: the whole character stands at its first token, and the
others say which part they are. Bytes that make no character are written in hexadecimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from mtr.console import printable
from mtr.tree.layout import Ints

_REPLACEMENT = "\ufffd"
_MOST_PARTS = 8
"""Tokens that a character, or a few that share a token, may have at most."""


class TokenTexts:
    """The tokens that a page shows, numbered in the order in which they were first met."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
        self._number: dict[int, int] = {}
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.special: list[int] = []
        """Numbers of the tokens that the tokenizer has beside its vocabulary, such as <|im_end|>."""
        self._partial: set[int] = set()

    def number(self, token: int) -> int:
        """The number of a token id."""
        if token not in self._number:
            number = self._number[token] = len(self.ids)
            self.ids.append(token)
            self.texts.append(printable(self._text(token)))
            if token in self._added:
                self.special.append(number)
        return self._number[token]

    def numbers(self, tokens: Ints | tuple[int, ...]) -> list[int]:
        return [self.number(int(token)) for token in tokens]

    def text(self, tokens: Sequence[int]) -> str:
        """What they say together."""
        return printable(self._decode(list(tokens)))

    def joined(self, tokens: Ints, parent: Ints) -> dict[int, str]:
        """What to show at tokens that hold parts of characters, by their index in a layout.

        `\u2026\u00b2` at a part after the first; parts that make no character together are left to their own text.
        """
        shown: dict[int, str] = {}
        index = 0
        while index < len(tokens):
            end = self._end_of_character(tokens, parent, index) if int(tokens[index]) in self._partial else index
            if end > index:
                shown[index] = printable(self._decode(tokens[index:end].tolist()))
                shown |= {part: f"\u2026{_raised(part - index + 1)}" for part in range(index + 1, end)}
            index = max(end, index + 1)
        return shown

    def _end_of_character(self, tokens: Ints, parent: Ints, start: int) -> int:
        """Where the characters end that begin with this token; the start itself if they never do."""
        for end in range(start + 2, min(start + _MOST_PARTS, len(tokens)) + 1):
            if parent[end - 1] != end - 2:
                break
            if _REPLACEMENT not in self._decode(tokens[start:end].tolist()):
                return end
        return start

    def _text(self, token: int) -> str:
        written = self._tokenizer.convert_ids_to_tokens(token)
        text = self._decode([token])
        if written is None:
            return f"<{token}>"
        if _REPLACEMENT in text and token not in self._added:
            self._partial.add(token)
            return _bytes_of(written) or text
        if written.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops a leading space in decode
            return f" {text}"
        return text or written

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _raised(number: int) -> str:
    return str(number).translate(
        str.maketrans("0123456789", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )


def _bytes_of(written: str) -> str | None:
    """`<E2 80>` for a token of a byte-level vocabulary as it is written there; None for one of another kind."""
    values = [_byte_alphabet().get(character) for character in written]
    if written.startswith("<0x") and written.endswith(">"):  # byte fallback of SentencePiece
        values = [int(written[3:-1], 16)]
    known = [value for value in values if value is not None]
    return f"<{' '.join(f'{value:02X}' for value in known)}>" if len(known) == len(values) else None


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character stands for in byte-level BPE, as GPT-2 defined it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: value for value, character in bytes_to_unicode().items()}
