"""Claims: tokens that share a character show the character once; bytes that are none, controls and added tokens are
written out.
"""

from __future__ import annotations

import numpy as np
from support.inspections import tokenizer

from mtr.pages.tokens import TokenTexts


def shown(text: str) -> list[str]:
    ids = np.array(tokenizer().encode(text, add_special_tokens=False))
    texts = TokenTexts(tokenizer())
    numbers = texts.numbers(ids)
    joined = texts.joined(ids, np.arange(-1, len(ids) - 1))
    return [joined.get(i, texts.texts[number]) for i, number in enumerate(numbers)]


def test_a_character_of_several_tokens_stands_at_the_first() -> None:
    found = shown("a 🎉 é!")
    assert [part for part in found if not part.startswith("…")] == ["a", " ", "🎉", " ", "é", "!"]
    assert found[found.index("🎉") + 1 :][:3] == ["…²", "…³", "…⁴"]


def test_a_part_without_its_character_is_written_as_bytes() -> None:
    ids = tokenizer().encode("🎉", add_special_tokens=False)[:2]
    texts = TokenTexts(tokenizer())
    assert [texts.texts[number] for number in texts.numbers(tuple(ids))] == ["<F0>", "<9F>"]
    assert texts.joined(np.array(ids), np.array([-1, 0])) == {}


def test_parts_on_different_branches_are_not_joined() -> None:
    ids = np.array(tokenizer().encode("é", add_special_tokens=False))
    assert len(ids) == 2
    texts = TokenTexts(tokenizer())
    texts.numbers(ids)
    assert texts.joined(ids, np.array([-1, 0])) == {0: "é", 1: "…²"}
    assert texts.joined(ids, np.array([-1, -1])) == {}


def test_controls_and_marks_of_direction_are_written_out() -> None:
    assert "".join(shown("a\x1b\u202eb")) == r"a\x1b\u202e…²…³b"


def test_added_tokens_are_told_apart() -> None:
    texts = TokenTexts(tokenizer())
    texts.numbers(tuple(tokenizer().encode("<|im_start|>user", add_special_tokens=False)))
    assert [texts.texts[number] for number in texts.special] == ["<|im_start|>"]
