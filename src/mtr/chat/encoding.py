"""Text to token ids, each piece encoded once.

The N prompts of a conversation repeat each other, so encoding each in full takes quadratic time. Added tokens
(`<|im_start|>`) split a text into pieces that a tokenizer encodes independently, and the ids of pieces are cached. For
some tokenizers this does not hold (a prefix space, added tokens that strip white space): they encode texts in full.
"""

from __future__ import annotations

import re
from typing import Any

_CHECKED_TEXTS = 16
_CACHED_PIECES = 20_000
_SAMPLE = 'A word, 3 digits: 123.\n\n  Two spaces; naïve café 你好 🙂\t{"key": [1.5, null]}\n'


class Encoder:
    """Encodes without special tokens; equal to the tokenizer's own encoding, as checked on the first texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self._added = added
        plain = not any(t.lstrip or t.rstrip or t.single_word for t in tokenizer.added_tokens_decoder.values())
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if plain and added else None
        self._pieces: dict[str, list[int]] = {}
        self._unchecked = _CHECKED_TEXTS
        self([_SAMPLE.join(["", *longest_first[:20], ""]), _SAMPLE.strip()])

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._cut is None:
            return self._in_full(texts)
        encoded = [self._by_piece(text) for text in texts]
        if self._unchecked > 0:
            self._unchecked -= len(texts)
            if encoded != (full := self._in_full(texts)):
                self._cut = None
                return full
        return encoded

    def _in_full(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _each(self, pieces: list[str]) -> list[list[int]]:
        """Ids alone, without offsets and masks: a quarter faster."""
        if self._backend is None:
            return self._in_full(pieces)
        return [encoded.ids for encoded in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    def _by_piece(self, text: str) -> list[int]:
        assert self._cut is not None
        pieces = self._cut.split(text)
        new = [p for p in dict.fromkeys(pieces) if p and p not in self._pieces and p not in self._added]
        if len(self._pieces) + len(new) > _CACHED_PIECES:
            self._pieces.clear()
            new = [p for p in dict.fromkeys(pieces) if p and p not in self._added]
        if new:
            self._pieces.update(zip(new, self._each(new), strict=True))
        ids: list[int] = []
        for piece in pieces:
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                ids.extend(self._pieces[piece])
        return ids
