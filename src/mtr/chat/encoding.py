"""Text to token ids, each piece encoded once.

The N prompts of a conversation repeat each other, so encoding each in full takes quadratic time. Added tokens
(`<|im_start|>`) split a text into pieces that a tokenizer encodes independently, and the ids of pieces are cached. For
some tokenizers this does not hold (a prefix space, added tokens that strip white space): they encode texts in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from mtr.chat.token_bound import longest_token
from mtr.console import printable
from mtr.errors import UserError, is_failure, one_line

_CHECKED_TEXTS = 16
_CACHED_PIECES = 20_000
_CACHED_CHARACTERS = 8_000_000
_USUAL = 16
"""Characters per token that a text may well have, so that its tokens are always counted."""
_SAMPLE = 'A word, 3 digits: 123.\n\n  Two spaces; naïve café 你好 🙂\t{"key": [1.5, null]}\n'


class EncodingError(UserError):
    """The tokenizer fails on a text."""


class Encoder:
    """Encodes without special tokens; equal to the tokenizer's own encoding, as checked on the first texts.

    Everything that encodes raises EncodingError where the tokenizer fails.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self._added = added
        plain = not any(t.lstrip or t.rstrip or t.single_word for t in tokenizer.added_tokens_decoder.values())
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if plain and added else None
        self._pieces: dict[str, list[int]] = {}
        self._cached = 0
        """Characters of the cached pieces."""
        self._unchecked = _CHECKED_TEXTS
        self([_SAMPLE.join(["", *longest_first[:20], ""]), _SAMPLE.strip()])

    @cached_property
    def _longest(self) -> int | None:
        """Most characters that one token can stand for; None if that is not known."""
        return longest_token(self._tokenizer)

    def most_characters(self, tokens: int) -> float:
        """Most characters that a text of so many tokens can have; infinite if that is not known."""
        return math.inf if self._longest is None else tokens * self._longest

    def surely_more(self, characters: int, tokens: int) -> bool:
        """Whether a text of so many characters has more than so many tokens, whatever it says."""
        return characters > _USUAL * tokens and characters > self.most_characters(tokens)

    def beginning(self, text: str, tokens: int) -> list[int]:
        """The first ids of a text: so many, or all if it has fewer. Little more of the text is encoded.

        Of a text with more characters than so many tokens can have, the rest is not looked at.
        """
        if self.surely_more(len(text), tokens):
            text = text[: int(self.most_characters(tokens))]
        if self._cut is None or self._unchecked > 0:
            return self([text])[0][:tokens]
        ids: list[int] = []
        at = 0
        for match in self._cut.finditer(text):
            ids += [*self._of(text[at : match.start()]), self._added[match.group()]]
            at = match.end()
            if len(ids) >= tokens:
                return ids[:tokens]
        return [*ids, *self._of(text[at:])][:tokens]

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
        with self._failing():
            ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _each(self, pieces: list[str]) -> list[list[int]]:
        """Ids alone, without offsets and masks: a quarter faster."""
        if self._backend is None:
            return self._in_full(pieces)
        with self._failing():
            return [encoded.ids for encoded in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not is_failure(error):
                raise
            problem = f"{type(error).__name__}: {printable(one_line(error))}"
            raise EncodingError(f"{self._tokenizer.name_or_path}: the tokenizer fails to encode: {problem}") from None

    def _by_piece(self, text: str) -> list[int]:
        assert self._cut is not None
        pieces = self._cut.split(text)
        self._learn(pieces)
        ids: list[int] = []
        for piece in pieces:
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                ids.extend(self._pieces[piece])
        return ids

    def _learn(self, pieces: list[str]) -> None:
        """Encode and cache those pieces that are new; all of them where the cache is full."""
        pieces = [piece for piece in dict.fromkeys(pieces) if piece and piece not in self._added]
        new = [piece for piece in pieces if piece not in self._pieces]
        size = sum(map(len, new))
        if len(self._pieces) + len(new) > _CACHED_PIECES or self._cached + size > _CACHED_CHARACTERS:
            self._pieces.clear()
            self._cached, new, size = 0, pieces, sum(map(len, pieces))
        if new:
            self._pieces.update(zip(new, self._each(new), strict=True))
            self._cached += size

    def _of(self, piece: str) -> list[int]:
        """Ids of a text without added tokens."""
        if piece not in self._pieces:
            self._learn([piece])
        return self._pieces[piece] if piece else []
