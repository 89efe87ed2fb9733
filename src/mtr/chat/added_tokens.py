"""A tokenizer's added tokens, such as `<|im_start|>`, as they occur in rendered text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


class AddedTokens:
    """The texts and ids of the added tokens."""

    def __init__(self, tokenizer: Any) -> None:
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self.ids = {str(token): i for i, token in added.items()}
        self.special = {str(token) for token in added.values() if token.special}
        self.pattern = any_of(self.ids)

    def common_prefix(self, one: str, other: str) -> int:
        """Length of the common beginning of two texts; it ends before an added token of `one` that it would cut."""
        pairs = zip(one, other, strict=False)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
        for match in self.pattern.finditer(one):
            if match.start() < length < match.end():
                return match.start()
        return length


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first; of no texts, one that never matches."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
