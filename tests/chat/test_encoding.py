"""Claims: the encoder gives the tokenizer's own ids for any text, and encodes no piece twice."""

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
