"""Tokenizers: torn, of another model, with code of their own, without the tokens that they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.hostile import Attempt, Place, Prepare, after, command, either, refused
from support.rows import ANSWER, USER, chat, conversation_row

RUNS_CODE = "from pathlib import Path\nPath(__file__).with_name('harm').write_text('')\nclass T: pass\n"


def files(*changes: Callable[[Path], object], name: str = "train", **sections: Any) -> Prepare:
    """A command on a model whose tokenizer files were changed."""

    def prepare(place: Place) -> Sequence[object]:
        folder = place.base()
        for change in changes:
            change(folder)
        return command(name, model={"name_or_path": str(folder)}, **sections)(place)

    return prepare


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def keys(name: str = "tokenizer_config.json", **changes: Any) -> Callable[[Path], object]:
    """Other keys in a JSON file; ... leaves one out."""

    def change(folder: Path) -> None:
        changed = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))

    return change


def edit(change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Callable[[Path], object]:
    """Something done to what a JSON file holds."""

    def rewrite(folder: Path) -> None:
        held = json.loads((folder / name).read_text())
        change(held)
        (folder / name).write_text(json.dumps(held))

    return rewrite


def bad(name: str, *changes: Callable[[Path], object], says: str = "tokenizer") -> Attempt:
    return refused(name, files(*changes), "base", says)


def link(target: str, name: str = "tokenizer.json") -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def folder_for(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


MAPPED = keys(auto_map={"AutoTokenizer": [None, "harm.T"]}, tokenizer_class="T")


def new_tokens(like: dict[str, Any]) -> list[dict[str, Any]]:
    """Twenty more; the model has embeddings for fifteen."""
    return [{**like, "id": 673 + i, "content": f"<new{i}>"} for i in range(20)]


ATTEMPTS = (
    bad("no tokenizer.json", gone("tokenizer.json")),
    bad("an empty tokenizer.json", text("tokenizer.json", "")),
    bad("a torn tokenizer.json", text("tokenizer.json", '{"version": "1.0", "model": {')),
    bad("tokenizer.json is {}", text("tokenizer.json", "{}")),
    bad("tokenizer.json is []", text("tokenizer.json", "[]")),
    bad("tokenizer.json is null", text("tokenizer.json", "null")),
    bad("a tokenizer.json of NUL bytes", text("tokenizer.json", b"\0" * 999)),
    bad("a tokenizer.json in Latin-1", text("tokenizer.json", '{"ä": 1}'.encode("latin-1"))),
    bad(
        "a Git LFS pointer",
        text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    bad("a folder for tokenizer.json", folder_for("tokenizer.json")),
    bad("a dangling link", link("none")),
    bad("a link to itself", link("tokenizer.json")),
    bad("a model that nobody knows", edit(lambda held: held["model"].update(type="Magic"))),
    bad("no model", edit(lambda held: held.pop("model"))),
    bad("a vocabulary that is a list", edit(lambda held: held["model"].update(vocab=["a"]))),
    bad("ids that are texts", edit(lambda held: held["model"].update(vocab={"a": "0"}))),
    bad("ids below 0", edit(lambda held: held["model"]["vocab"].update(a=-1))),
    bad("merges of tokens that are not there", edit(lambda held: held["model"].update(merges=[["never", "seen"]]))),
    bad("a pre-tokenizer that nobody knows", edit(lambda held: held.update(pre_tokenizer={"type": "Magic"}))),
    bad("added tokens that are texts", edit(lambda held: held.update(added_tokens=["<x>"]))),
    bad("an added token without an id", edit(lambda held: held["added_tokens"][0].pop("id"))),
    bad("a torn tokenizer_config.json", text("tokenizer_config.json", "{")),
    bad("tokenizer_config.json is []", text("tokenizer_config.json", "[]")),
    bad("tokenizer_config.json is 7", text("tokenizer_config.json", "7")),
    either("a class that nobody knows", files(keys(tokenizer_class="MagicTokenizer")), "base"),
    bad("a class that is a number", keys(tokenizer_class=7)),
    bad("special tokens that are a number", keys(extra_special_tokens=7)),
    either("code beside the tokenizer", files(MAPPED, text("harm.py", RUNS_CODE)), "base"),
    refused(
        "vocabulary larger than the model's",
        files(keys("config.json", vocab_size=400), name="train", lora=None),
        "vocab",
    ),
    refused(
        "an added token beyond the model's ids",
        after(
            lambda place: place.rows(conversation_row(), chat(USER, {**ANSWER, "content": "a <new19> b"})),
            files(edit(lambda held: held["added_tokens"].extend(new_tokens(held["added_tokens"][0])))),
        ),
        "rows.jsonl, line 2",
        "688",
    ),
    either("no tokenizer_config.json", files(gone("tokenizer_config.json")), "base"),
    either(
        "no end of text",
        files(keys(eos_token=...), gone("generation_config.json"), keys("config.json", eos_token_id=None)),
        "base",
    ),
    either("an end of text that is no token", files(keys(eos_token="<nowhere>")), "base"),
    either("an end of text that is an id", files(keys(eos_token=2)), "base"),
    either("no padding", files(keys(pad_token=None))),
    either("a longest length of 1", files(keys(model_max_length=1)), "base"),
    either("a longest length in words", files(keys(model_max_length="long")), "base"),
    either("stop tokens beyond the vocabulary", files(keys("generation_config.json", eos_token_id=[99_999])), "base"),
    either("stop tokens in words", files(keys("generation_config.json", eos_token_id="end")), "generation_config.json"),
    either("a torn generation_config.json", files(text("generation_config.json", "{")), "base"),
    either("generation_config.json is []", files(text("generation_config.json", "[]")), "base"),
    either(
        "words are all unknown",
        files(edit(lambda held: held["model"].update(vocab={"<unk>": 0}, merges=[], unk_token="<unk>"))),
        "base",
    ),
    refused("audit: a torn tokenizer.json", files(text("tokenizer.json", "{"), name="audit"), "base"),
    refused("inspect: tokenizer.json is []", files(text("tokenizer.json", "[]"), name="inspect"), "base"),
    refused("verify: no tokenizer.json", files(gone("tokenizer.json"), name="verify"), "base"),
)
