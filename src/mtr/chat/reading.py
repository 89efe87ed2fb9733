"""A completion as inference reads it, complete or still arriving: thinking, then the response.

    "<think>\\nHm, 4.\\n</think>\\n\\nFour.<|im_end|>"   ->   "Hm, 4.", "Four."

Text that may yet turn out to be part of a tag is held back, so what was shown of an unfinished completion stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtr.chat.findings import Findings

_REPLACED = "�"
"""What a tokenizer decodes the first bytes of a character to."""
_LONGEST = 4
"""Bytes of a character in UTF-8, so tokens at most; more of them are no character."""


def as_message(thinking: str, response: str) -> dict[str, Any]:
    """A generated turn as the history holds it; what of it the next prompt keeps, the template decides."""
    return {"role": "assistant", "content": response} | ({"reasoning_content": thinking} if thinking else {})


class Reader:
    """Reads completions of one template."""

    def __init__(self, findings: Findings, special_texts: Sequence[str]) -> None:
        """
        Args:
            special_texts: special tokens and stops, which belong to neither thinking nor response.
        """
        self._tags = findings.tags
        self._opened = findings.prompt_ends == "opens thinking"
        self._openings = (findings.response_opening.strip(), findings.answer_opening.strip())
        self._special_texts = tuple(special_texts)

    def split(self, text: str) -> tuple[str, str]:
        """Thinking and response of a complete text. Thinking that is never closed is read as the response."""
        thinking, close, response = text.partition(self._tags[1]) if self._tags else ("", "", text)
        if not close:
            thinking, response = "", text
        return self._without_opening(thinking).strip(), self._response(response)

    def so_far(self, text: str) -> tuple[str, str]:
        """What of thinking and response is certain while more may come; each only grows at its end."""
        if self._tags is None:
            return "", self._arriving(text)
        opened, close = self._tags
        if close in text:
            thinking, _, response = text.partition(close)
            return self._without_opening(thinking).strip(), self._arriving(response)
        begun = text.lstrip()
        if self.is_thinking(text):
            inside = _certain(begun.removeprefix(opened), (opened, close))
            return self._without_specials(inside).strip(), ""
        return ("", "") if opened.startswith(begun) else ("", self._arriving(text))

    def is_thinking(self, text: str) -> bool:
        """Whether a text ends within its thinking."""
        if self._tags is None or self._tags[1] in text:
            return False
        return self._opened or text.lstrip().startswith(self._tags[0])

    def _arriving(self, text: str) -> str:
        response = text.strip()
        if any(opening.startswith(response) for opening in self._openings):
            return ""  # or the beginning of what is no part of it
        return self._response(_certain(response, (*self._openings, *(self._tags or ()))))

    def _response(self, text: str) -> str:
        response = text.strip()
        for opening in self._openings:
            response = response.removeprefix(opening)
        return self._without_specials(response).strip()

    def _without_opening(self, thinking: str) -> str:
        return self._without_specials(thinking.replace(self._tags[0], "") if self._tags else thinking)

    def _without_specials(self, text: str) -> str:
        for special in self._special_texts:
            text = text.replace(special, "")
        return text


def _certain(text: str, markers: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        lengths = range(min(len(marker) - 1, len(text)), longest, -1)
        longest = next((length for length in lengths if text.endswith(marker[:length])), longest)
    return text[: len(text) - longest]


class Decoding:
    """The text of token ids that arrive one by one, without a character whose bytes are not all there yet."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._end = 0
        self.text = ""

    def add(self, id_: int) -> None:
        """Each token is decoded with those before it: a tokenizer may treat the first one of a text in its own way."""
        self._ids.append(id_)
        before = self._decode(self._ids[self._start : self._end])
        now = self._decode(self._ids[self._start :])
        waits = now.endswith(_REPLACED) and len(self._ids) - self._end < _LONGEST
        if len(now) > len(before) and not waits:
            self.text += now[len(before) :]
            self._start, self._end = self._end, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
