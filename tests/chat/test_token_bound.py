"""Claims: no token stands for more characters than the bound says, and there is none where characters can get lost."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rendering import SHARED_TOKENIZERS, load
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mtr.chat.token_bound import longest_token

FOLDERS = [
    pytest.param(str(QUICKSTART / "base"), 13, id="quickstart"),
    *[
        pytest.param(str(SHARED / "tokenizers" / name), 512 if name == "qwen3" else 128, id=name, marks=needs_shared)
        for name in SHARED_TOKENIZERS
    ],
]


def bytes_of(splitter: Any, normalizer: Any = None, vocabulary: list[str] | None = None) -> Any:
    """A tokenizer with a token for each byte and one for four spaces."""
    words = pre_tokenizers.ByteLevel.alphabet() if vocabulary is None else vocabulary
    tokens = {token: number for number, token in enumerate([*sorted(words), "ĠĠ", "ĠĠĠĠ"])}
    made = Tokenizer(models.BPE(vocab=tokens, merges=[("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")] if "Ġ" in tokens else []))
    made.pre_tokenizer, made.normalizer = splitter, normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(("folder", "longest"), FOLDERS)
def test_no_text_has_fewer_tokens(folder: str, longest: int) -> None:
    plain = load(folder)
    assert longest_token(plain) == longest
    added = sorted(map(str, plain.added_tokens_decoder.values()))
    pieces = st.one_of(
        st.text(max_size=20), st.sampled_from(added), st.integers(1, 400).map(lambda n: " " * n), st.just("\u1f82" * 9)
    )

    @given(st.lists(pieces, max_size=6).map("".join), st.sampled_from(["NFC", "NFD"]))
    @settings(max_examples=150, deadline=None)
    def check(text: str, form: Any) -> None:
        import unicodedata

        text = unicodedata.normalize(form, text)
        assert len(text) <= longest * len(plain(text, add_special_tokens=False)["input_ids"])

    check()


def test_the_bound_is_reached() -> None:
    plain = bytes_of(BYTES)
    assert longest_token(plain) == 4
    assert len(plain(" " * 400, add_special_tokens=False)["input_ids"]) == 100
    composed = bytes_of(BYTES, normalizers.NFC())
    assert longest_token(composed) == 16


REMOVING = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES])
UNKNOWN = {
    "spaces are removed": lambda: bytes_of(REMOVING),
    "spaces are split away": lambda: bytes_of(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])),
    "text is stripped": lambda: bytes_of(BYTES, normalizers.Strip()),
    "a byte is missing": lambda: bytes_of(BYTES, None, sorted(pre_tokenizers.ByteLevel.alphabet())[1:]),
    "no bytes": lambda: bytes_of(None, None, ["a", "b"]),
    "words": lambda: transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_characters_can_get_lost_there_is_no_bound(name: str) -> None:
    assert longest_token(UNKNOWN[name]()) is None


def test_an_added_token_that_eats_white_space() -> None:
    plain = bytes_of(BYTES)
    plain.add_tokens([transformers.AddedToken("<eats>", lstrip=True)])
    assert longest_token(plain) is None


def test_tokens_of_sentencepiece_with_bytes() -> None:
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = Tokenizer(
        models.BPE(vocab={**bytes_, "▁a": 256, "▁": 257, "a": 258}, merges=[("▁", "a")], byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    assert longest_token(plain) == 6
    for text in ("a a a", "漢字🙂", " " * 50):
        assert len(text) <= 6 * len(plain(text, add_special_tokens=False)["input_ids"])
