"""Claims: the encoder gives the tokenizer's own ids for any text, encodes no piece twice, and no more of a text than is
asked for; what it remembers is bounded.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rendering import (
    SHARED_TOKENIZERS,
    load,
)

from mtr.chat.encoding import Encoder


class Counting:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.added_tokens_decoder = plain.added_tokens_decoder
        self.encoded = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.encoded += len(texts)
        return self.plain(texts, **options)


TOKENIZERS = [
    pytest.param(str(QUICKSTART / "base"), id="quickstart"),
    *[pytest.param(str(SHARED / "tokenizers" / name), id=name, marks=needs_shared) for name in SHARED_TOKENIZERS],
]


def warm(counting: Counting) -> Encoder:
    """An encoder past its first texts, which it encodes twice."""
    encoder = Encoder(counting)
    encoder([f"text {i}" for i in range(40)])
    return encoder


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_encoder_equals_the_tokenizer(folder: str) -> None:
    plain = load(folder)
    counting = Counting(plain)
    encoder = warm(counting)
    added = sorted(str(token) for token in plain.added_tokens_decoder.values())
    pieces = st.one_of(
        st.text(max_size=12), st.sampled_from(added), st.sampled_from([" ", "\n", "\n\n", "<think", "|>", "wörd", "12"])
    )

    @given(st.lists(st.lists(pieces, max_size=8).map("".join), min_size=1, max_size=3))
    @settings(max_examples=150, deadline=None)
    def check(texts: list[str]) -> None:
        assert encoder(texts) == plain(texts, add_special_tokens=False)["input_ids"]

    check()
    text = f"one{added[0]}two"
    encoder([text])
    before = counting.encoded
    encoder([text, text])
    assert counting.encoded == before, "known pieces are encoded again"


def test_encoder_of_an_odd_tokenizer() -> None:
    """Added tokens that eat white space make pieces depend on each other: texts are encoded whole."""
    plain = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    plain.add_tokens([transformers.AddedToken("<eats>", lstrip=True, rstrip=True)])
    encoder = warm(Counting(plain))
    for texts in itertools.permutations(["a <eats> b", "a<eats>b", "a"], 2):
        assert encoder(list(texts)) == plain(list(texts), add_special_tokens=False)["input_ids"]


def test_encoder_of_nothing() -> None:
    encoder = Encoder(load(str(QUICKSTART / "base")))
    assert encoder([]) == []
    assert encoder([""]) == [[]]


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_the_beginning_of_a_text(folder: str) -> None:
    plain = load(folder)
    encoder = warm(Counting(plain))
    added = sorted(str(token) for token in plain.added_tokens_decoder.values())
    for text in (
        "",
        "Ana has 4 coins.",
        f"{added[0]}Ana{added[-1]} has{added[0]}",
        f"{added[0]}word" * 500,
        "漢字" * 900,
    ):
        ids = plain(text, add_special_tokens=False)["input_ids"]
        assert all(encoder.beginning(text, tokens) == ids[:tokens] for tokens in (1, 2, 9, 400))


def test_a_beginning_needs_little_of_the_text() -> None:
    plain = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    counting = Counting(plain)
    encoder = warm(counting)
    text = "".join(f"<|im_start|>text {number}" for number in range(10_000))
    before = counting.encoded
    assert len(encoder.beginning(text, 100)) == 100
    assert counting.encoded - before <= 50


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.chat.encoding._CACHED_CHARACTERS", 100)
    plain = load(str(QUICKSTART / "base"))
    encoder = warm(Counting(plain))
    for number in range(30):
        text = f"<|im_start|>{number} coins<|im_end|>{'and more ' * number}"
        assert encoder([text]) == plain([text], add_special_tokens=False)["input_ids"]
        assert sum(map(len, encoder._pieces)) <= max(100, len(text))
