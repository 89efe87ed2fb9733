"""Claims: whatever a recipe file or an override holds, it is answered in bounded time and memory, with a recipe or one
short line; a saved recipe that is damaged is named with a way out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import check_refused
from support.recipes import MINIMAL, at, changed, load, refused

from mtr.errors import UserError
from mtr.recipe.loading import load_recipe, load_saved_recipe
from mtr.recipe.sections import Recipe

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

GOOD = "model: {name_or_path: /m}\ndata: {train: /d.jsonl}\ntraining: {output_dir: /o}\n"
LAUGHS = "template: {a: &a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", {name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
TEXTS = {
    "deep lists": "[" * 5000,
    "deep lists in blocks": "- " * 5000 + "x",
    "deep mappings": "{a: " * 5000,
    "deep by aliases": "a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30,
    "aliases that multiply": GOOD + LAUGHS + "}",
    "aliases that multiply a text": GOOD + "template: {a: &a " + "x" * 100_000 + ", b: [" + "*a, " * 1000 + "]}",
    "a list that contains itself": GOOD + "template: &a {x: [*a]}",
    "a mapping that merges itself": GOOD + "template: &a {<<: *a}",
    "very many values": "[" + "a," * 200_000 + "]",
    "very many keys": GOOD + "".join(f"key{i}: 1\n" for i in range(50_000)),
    "an integer of 5,000 digits": GOOD + "date: " + "9" * 5000,
    "an integer of a million hexadecimal digits": GOOD + "date: 0x" + "f" * 100_000,
    "a sexagesimal number without end": GOOD + "date: 1" + ":1" * 100_000,
    "half of a surrogate pair": GOOD.replace("/o", '/o, preempt_signal: ["\\uD800"]'),
    "a NUL byte": GOOD + "date: \0",
    "a key that is a list": GOOD + "[a]: 1",
    "a key that is null": GOOD + "~: 1",
    "a key that is a number": GOOD + "1: 1",
    "keys of a template that are numbers": GOOD + "template: {1: 2, ~: 3}",
    "a key twice, deep": GOOD + "template: {a: {b: [{c: 1, c: 2}]}}",
    "an unknown tag": GOOD + "date: !!python/object:os.system x",
    "a tag that does not fit": GOOD + "date: !!int ''",
    "bytes": GOOD + "date: !!binary aGk=",
    "a set": GOOD + "template: !!set {a}",
    "infinity": GOOD + "lora: {alpha: 1.0e+999}",
    "not a number": GOOD + "template: {temperature: .nan}",
    "a huge key": GOOD + "? " + "k" * 100_000 + "\n: 1",
    "a huge value": GOOD + "train_on: " + "x" * 100_000,
    "a huge list of signals": GOOD.replace("/o", f"/o, preempt_signal: [{', '.join(f'S{i}' for i in range(3000))}]"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_hostile_recipe_is_one_short_line_at_once(tmp_path: Path, kind: str) -> None:
    began = time.process_time()
    message = refused(tmp_path, TEXTS[kind])
    assert time.process_time() - began < 2
    assert len(message) < 3000


OVERRIDES = {
    "a key of 10,000 parts": "template." + ".".join(["a"] * 10_000) + "=1",
    "a huge index": "data.train." + "9" * 5000 + ".path=x",
    "an index in superscript": "data.train.².path=x",
    "a deep value": "template.x=" + "[" * 5000,
    "a value that contains itself": "template.x=&a [*a]",
    "aliases that multiply": LAUGHS.replace(": ", "=", 1) + "}",
    "a huge integer": "training.seed=" + "9" * 5000,
    "a huge key": "k" * 100_000 + "=1",
    "a huge value": "train_on=" + "x" * 100_000,
    "a key of dots": "...=1",
    "a section that is a list": "model=[1]",
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_a_hostile_override_is_one_short_line_at_once(tmp_path: Path, kind: str) -> None:
    began = time.process_time()
    message = refused(tmp_path, MINIMAL, OVERRIDES[kind])
    assert time.process_time() - began < 2
    assert len(message) < 500


@pytest.mark.parametrize(
    ("path", "words"),
    [("fifo", "not a regular file"), ("/dev/zero", "not a regular file"), ("large.yaml", "more than 524,288 bytes")],
)
def test_a_file_without_end_is_not_read(mtr: Mtr, tmp_path: Path, path: str, words: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(100 << 20)
    if path != "large.yaml":  # reading it would never end
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it is read"))
            check_refused(mtr("train", tmp_path / path), words)
    else:
        check_refused(mtr("train", tmp_path / path), words)


def test_merge_keys_aliases_and_a_byte_order_mark_still_work(tmp_path: Path) -> None:
    text = "\ufeff" + GOOD + "template: {a: &a {x: 1}, b: {<<: *a, y: 2}, c: *a}"
    assert load(tmp_path, text).template == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


def test_what_looks_like_a_time_is_text(tmp_path: Path) -> None:
    assert "'1:30'" in refused(tmp_path, MINIMAL, "training.max_steps=1:30")
    assert at(load(tmp_path, MINIMAL, "template.time=1:30"), "template.time") == "1:30"


def test_a_saved_recipe_as_large_and_deep_as_may_be_is_read_again(tmp_path: Path) -> None:
    deep = "[" * 40 + "]" * 40
    recipe = load(tmp_path, GOOD + f"template: {{x: {deep}}}", f"template.y.{'.'.join('abcdefghij')}={deep}")
    (tmp_path / "saved.yaml").write_text(recipe.dump())
    assert load_saved_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\0", b"\xff\xfe", b"model: [", b"- " * 5000, GOOD.encode() + b"new_key: 1\n"]
)
def test_a_damaged_saved_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not a recipe as mtr saved it: .*Restore the file") as error:
        load_saved_recipe(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_damaged_saved_recipe_ends_a_resume_and_a_merge(mtr: Mtr, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(training={"max_steps": 1, "save_steps": 1})
    assert mtr("train", recipe)[0] == 0
    (tmp_path / "run" / "recipe.yaml").write_text("model: [")
    for command in (("train", recipe, "--resume"), ("merge", tmp_path / "run")):
        code, _, err = mtr(*command)
        assert code == 2
        assert "recipe.yaml" in err.splitlines()[-1]
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("key", "most"),
    {
        "lora.r": 2**16,
        "lora.alpha": 10**6,
        "data.num_workers": 1024,
        "data.shuffle_buffer": 10**8,
        "data.train.0.weight": 10**4,
        "sequence.max_length": 10**9,
        "sequence.max_tokens": 10**9,
        "generation.conversations": 10**6,
        "generation.max_new_tokens": 10**6,
        "training.conversations_per_step": 10**6,
        "training.num_train_epochs": 10**6,
        "training.max_steps": 10**9,
        "training.learning_rate": 100,
        "training.warmup_steps": 10**9,
        "training.weight_decay": 100,
        "training.save_steps": 2**63 - 1,
    }.items(),
)
def test_a_number_is_refused_only_where_it_can_be_nothing_but_a_mistake(tmp_path: Path, key: str, most: int) -> None:
    room = {
        "sequence.max_length": ["sequence.max_tokens=1000000000"],
        "generation.conversations": ["data.eval=/e"],
    }.get(key, [])
    assert at(load(tmp_path, MINIMAL, *room, f"{key}={most}"), key) == most
    message = refused(tmp_path, MINIMAL, f"{key}={most + 1}")
    assert f"{key!r}: Input should be less than" in message


@pytest.mark.parametrize("key", ["model.name_or_path", "data.train.0.path", "training.output_dir", "lora.init_from"])
@pytest.mark.parametrize("value", ["''", "' '", '"a\\0b"', '"\\ud800"'])
def test_a_path_that_can_be_none_is_refused(tmp_path: Path, key: str, value: str) -> None:
    assert key in refused(tmp_path, MINIMAL, f"{key}={value}")


@pytest.mark.parametrize("name", ["me/mine/too", "https://hub/me/mine", "me/", "me/m ine", ""])
def test_a_repository_has_a_name_that_the_hub_takes(tmp_path: Path, name: str) -> None:
    assert "'training.push_to_hub': " in refused(tmp_path, MINIMAL, f"training.push_to_hub='{name}'")
    assert load(tmp_path, MINIMAL, "training.push_to_hub=me/my_model-1.5").training.push_to_hub == "me/my_model-1.5"


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load(tmp_path, changed(training__output_dir="~/run", model={"name_or_path": "~/m"}, data__train="~/d"))
    assert recipe.training.output_dir == str(tmp_path / "run")
    assert recipe.model.name_or_path == str(tmp_path / "m")
    unknown = load(tmp_path, MINIMAL, "data.train=~nobody-of-this-name/x")
    assert unknown.data.train[0].path == "~nobody-of-this-name/x"


@pytest.mark.parametrize("name", ["m" * 300, "a/**b.jsonl", "[", "x\x01y"])
def test_a_name_that_no_file_can_have_is_no_error_of_the_look_up(tmp_path: Path, name: str) -> None:
    raw = changed(data__train=name, model={"name_or_path": name})
    assert Recipe.model_validate(raw).data.train[0].path == name
    path = tmp_path / "r.yaml"
    path.write_text(Recipe.model_validate(raw).dump())
    assert load_recipe(path).model.name_or_path == name
