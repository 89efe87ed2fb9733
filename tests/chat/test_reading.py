"""Claims: a completion is read the same way whether it is complete or arrives token by token; what was certain of it
stays so; text that may be part of a tag is not shown before that is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rendering import behaving
from support.templates import BEHAVIOURS

from mtr.chat.loading import make_renderer
from mtr.chat.reading import Decoding, as_message
from mtr.chat.rendering import Renderer

COMPLETIONS = (
    "<think>\nHm, 4.\n</think>\n\nFour, <b>five</b>.",
    "<think>\n</think>\n\nFour.",
    "Four.",
    "<thin line>, he said.",
    "a < b and c </ d",
    "<think>\nNobody closes this.",
    "  <think>\nWith <tags> and </th in it.\n</think>Ünïcode, 漢字 and 🙂🙃.\n\nSecond paragraph. \n",
    "",
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    from transformers import AutoTokenizer

    return make_renderer(AutoTokenizer.from_pretrained(str(QUICKSTART / "base")))


def arriving(renderer: Renderer, ids: Sequence[int]) -> list[tuple[str, str]]:
    """Thinking and response after each token."""
    decoding, seen = Decoding(renderer.tokenizer), []
    for id_ in ids:
        decoding.add(id_)
        seen.append(renderer.reader.so_far(decoding.text))
    return seen


def check_arriving(renderer: Renderer, text: str) -> None:
    """Each part only grows at its end, and ends as the complete text is read."""
    ids: list[int] = renderer.tokenizer.encode(text, add_special_tokens=False)
    seen = arriving(renderer, ids)
    for before, after in itertools.pairwise(seen):
        assert after[0].startswith(before[0]), text
        assert after[1].startswith(before[1]), text
    thinking, response = renderer.split(list(ids))
    if seen and not renderer.reader.is_thinking(text):
        assert thinking.startswith(seen[-1][0])
        assert response.startswith(seen[-1][1])
        assert len(response) - len(seen[-1][1]) < len("</think>"), "all but what may begin a tag"


@pytest.mark.parametrize("text", COMPLETIONS)
def test_what_arrives_is_what_is_read_in_the_end(renderer: Renderer, text: str) -> None:
    check_arriving(renderer, text)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_so_it_is_with_every_template(name: str) -> None:
    made = behaving(name)
    for thinking in ["", "Hm, 4."][: 1 if made.tags is None else 2]:
        check_arriving(made, BEHAVIOURS[name].says(thinking, "Four <five>.\n\nSix.", ""))


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3", COMPLETIONS[0]),
        ("qwen3", COMPLETIONS[6]),
        ("r1-distill-qwen", "Hm, 4.\n</think>\n\nFour."),
        ("gpt-oss", "<|channel|>analysis<|message|>Hm, 4.<|end|><|start|>assistant<|channel|>final<|message|>Four."),
        ("gpt-oss", "<|channel|>final<|message|>Four."),
    ],
)
def test_so_it_is_with_real_tokenizers(name: str, text: str) -> None:
    from transformers import AutoTokenizer

    renderer = make_renderer(AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name)))
    check_arriving(renderer, text)
    thinking, response = renderer.split(renderer.tokenizer.encode(text, add_special_tokens=False))
    assert response.startswith(("Four", "Ünïcode"))
    assert all("<|" not in part and "think>" not in part for part in (thinking, response))


def test_thinking_is_told_from_the_response_while_it_arrives(renderer: Renderer) -> None:
    text = COMPLETIONS[0]
    seen = arriving(renderer, renderer.tokenizer.encode(text, add_special_tokens=False))
    assert ("Hm, 4", "") in [(thinking.rstrip("."), response) for thinking, response in seen]
    assert all(not response or thinking == "Hm, 4." for thinking, response in seen)
    assert renderer.reader.is_thinking("<think>\nHm")
    assert not renderer.reader.is_thinking(text)
    assert not renderer.reader.is_thinking("Four.")


def test_the_beginning_of_a_tag_is_held_back(renderer: Renderer) -> None:
    read = renderer.reader.so_far
    assert read("<") == read("<thi") == ("", "")
    assert read("<think>\nHm </thi") == ("Hm", "")
    assert read("<think>\nHm </this") == ("Hm </this", "")
    assert read("a <thin") == ("", "a")
    assert read("a <thin line") == ("", "a <thin line")


class Bytes:
    """A tokenizer with a token for each byte."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_character_is_decoded_when_all_its_bytes_are_there() -> None:
    decoding, seen = Decoding(Bytes()), []
    for byte in "a🙂é".encode():
        decoding.add(byte)
        seen.append(decoding.text)
    assert seen == ["a", "a", "a", "a", "a🙂", "a🙂", "a🙂é"]


def test_bytes_that_are_no_character_do_not_hold_up_the_rest() -> None:
    decoding = Decoding(Bytes())
    for byte in [0xF0, 0xF0, 0xF0, 0xF0, 0xF0, *b"abc"]:
        decoding.add(byte)
    assert decoding.text.endswith("abc")


def test_a_turn_in_the_history_has_its_thinking_in_a_field() -> None:
    assert as_message("Hm.", "Four.") == {"role": "assistant", "content": "Four.", "reasoning_content": "Hm."}
    assert as_message("", "Four.") == {"role": "assistant", "content": "Four."}
