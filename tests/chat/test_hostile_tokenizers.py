"""Claims: a tokenizer, chat template file or generation config that is broken, of the wrong type or of another model is
an error in one line that names the folder, whatever the libraries raise; the tokens that end a turn are those that the
model's files name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import QUICKSTART
from support.rendering import parsed
from support.rows import conversation_row, copy_tokenizer

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.rendering import Renderer
from mtr.errors import UserError
from mtr.recipe.loading import recipe_of_tokenizer

TEMPLATE = (QUICKSTART / "base" / "chat_template.jinja").read_text()
Change = Callable[[Path], Any]


def load(folder: Path) -> Renderer:
    recipe = recipe_of_tokenizer(str(folder), None)
    return load_renderer(recipe, load_tokenizer(recipe))


def written(name: str, content: str | bytes) -> Change:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def config(**keys: Any) -> Change:
    """Other keys in tokenizer_config.json; with a chat_template, the only one."""

    def change(folder: Path) -> None:
        if "chat_template" in keys:
            (folder / "chat_template.jinja").unlink()
        held = json.loads((folder / "tokenizer_config.json").read_text())
        written("tokenizer_config.json", json.dumps({**held, **keys}))(folder)

    return change


def tokenizer(model: dict[str, Any] | None = None, **keys: Any) -> Change:
    """Other keys in tokenizer.json, and in its model."""

    def change(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        written("tokenizer.json", json.dumps({**held, "model": {**held["model"], **(model or {})}, **keys}))(folder)

    return change


def generation(**keys: Any) -> Change:
    return written("generation_config.json", json.dumps(keys))


HUGE = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (written("tokenizer.json", '{"version": '), "no tokenizer can be loaded"),
        (written("tokenizer.json", '{"a":' * 100_000), "no tokenizer can be loaded"),
        (written("tokenizer_config.json", "[]"), "no tokenizer can be loaded"),
        (written("tokenizer_config.json", '{"a":' * 100_000), "RecursionError"),
        (written("special_tokens_map.json", "[]"), "AttributeError"),
        (tokenizer(model={"dropout": 5.0}), "Dropout should be between 0 and 1"),
        (tokenizer(model={"vocab": {"a": 1.5}}), "floating point"),
        (tokenizer(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}), "fails to encode"),
        (tokenizer(padding={"strategy": {"Fixed": 10**13}, **HUGE}), "SIGABRT"),
        (config(eos_token={"content": 7}), "eos_token"),
        (config(added_tokens_decoder={"x": 1}), "no tokenizer can be loaded"),
        (config(chat_template=42), "the chat template is not text"),
        (config(chat_template=[1]), "no tokenizer can be loaded"),
        (config(chat_template={"default": 7}), "the chat template is not text"),
        (config(chat_template={"other": TEMPLATE}), "with no default specified"),
        (written("chat_template.jinja", b"\xff\xfe\xfa"), "utf-8"),
        (written("chat_template.jinja", "a" * 100_000_000), "the chat template has 100,000,000 characters"),
        (written("additional_chat_templates/x.jinja", b"\xff"), "utf-8"),
        (written("generation_config.json", "{"), "generation_config.json cannot be read"),
        (written("generation_config.json", b"\xff\xfe"), "generation_config.json cannot be read"),
        (written("generation_config.json", "[" * 100_000), "generation_config.json cannot be read"),
        (written("generation_config.json", "[]"), "generation_config.json is no JSON object"),
        (generation(eos_token_id="2"), 'generation_config.json: eos_token_id is "2"'),
        (generation(eos_token_id=[[2]]), "eos_token_id is [[2]]"),
        (generation(eos_token_id=-1), "eos_token_id is -1"),
        (generation(eos_token_id=10**30), "eos_token_id is 1000"),
        (generation(eos_token_id=True), "eos_token_id is true"),
        (generation(eos_token_id=10**6), "no token with the model's eos_token_id (1000000)"),
        (written("config.json", '{"eos_token_id": "x"}'), 'config.json: eos_token_id is "x"'),
    ],
)
def test_what_is_broken_is_named(change: Change, says: str, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "base")
    change(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def added(*texts: str) -> Change:
    def change(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        at = max(held["model"]["vocab"].values()) + 1
        tokens = [{**held["added_tokens"][0], "id": at + i, "content": text} for i, text in enumerate(texts)]
        tokenizer(added_tokens=[*held["added_tokens"], *tokens])(folder)

    return change


@pytest.mark.parametrize(
    "change",
    [
        added(""),
        added("(.*)+[", "a|b", "\\", "^$"),
        added("\0", "\x1b[31m"),
        config(eos_token=None),
        config(chat_template=[{"name": "default", "template": TEMPLATE}]),
        config(chat_template={"default": TEMPLATE, "tool_use": TEMPLATE}),
        generation(eos_token_id=[]),
    ],
)
def test_what_is_odd_changes_nothing(change: Change, tmp_path: Path) -> None:
    plain, odd = copy_tokenizer(tmp_path / "plain"), copy_tokenizer(tmp_path / "odd")
    change(odd)
    conversation = parsed(conversation_row(3))
    turns = load(plain).render(conversation)
    assert load(odd).render(conversation) == turns
    assert all(turn.trained for turn in turns)


def test_stop_ids_are_those_of_the_generation_config_or_else_of_the_config(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "base")
    written("config.json", '{"eos_token_id": 1}')(folder)
    assert load(folder).stop_ids == [2, 1]
    written("config.json", '{"text_config": {"eos_token_id": [0, 2]}}')(folder)
    assert load(folder).stop_ids == [2, 0]
    generation(eos_token_id=[0])(folder)
    assert load(folder).stop_ids == [2, 0]


def test_a_stop_id_without_a_token_is_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its text would be that of Python's None, and answers contain the word."""
    folder = copy_tokenizer(tmp_path / "base")
    generation(eos_token_id=[2, 99_999])(folder)
    with caplog.at_level(logging.INFO, "mtr"):
        made = load(folder)
    assert made.stop_ids == [2]
    assert "no token 99999" in caplog.text
    row = conversation_row(1, thinking=False)
    row["messages"][-1]["content"] = "None of them."
    (turn,) = made.render(parsed(row))
    assert turn.trained


@pytest.mark.parametrize("change", [tokenizer(model={"vocab": {"a": 1.5}}), generation(eos_token_id="2")])
def test_a_command_says_it_in_one_line(
    change: Change, tmp_path: Path, mtr: Callable[..., tuple[int, str, str]]
) -> None:
    folder = copy_tokenizer(tmp_path / "base")
    change(folder)
    code, out, err = mtr("audit", folder)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_a_text_that_cannot_be_encoded_names_its_conversation(tmp_path: Path) -> None:
    """A template can write half of a surrogate pair."""
    head = "{%- if messages | length > 4 -%}{{- '\\ud800' -}}{%- endif -%}"
    made = load(copy_tokenizer(tmp_path / "base", head + TEMPLATE))
    with pytest.raises(UserError, match=r"row 1: .*the tokenizer fails to encode"):
        made.render(parsed(conversation_row(4)))
