"""Claims: the JSON schema takes every recipe that mtr takes and refuses what mtr refuses, key by key over values of
every kind, except for what a schema cannot express (listed here); the released file is what `mtr schema` prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from support.paths import ROOT
from support.recipes import MINIMAL, changed

from mtr.recipe.descriptions import Key, descriptions, every_key
from mtr.recipe.plain_yaml import read_yaml
from mtr.recipe.schema import SCHEMA_FILE, modeline, recipe_schema, schema_text
from mtr.recipe.sections import Recipe, Source

Mtr = Callable[..., tuple[int, str, str]]

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
KEYS = {key.name: key for key in every_key()}

VALUES: tuple[Any, ...] = (
    *(None, True, False),
    *(0, 1, 2, -1, 10, 2**40, 2**63, 10**30),
    *(0.5, -0.5, 1.5, 1e-4, 100.5, 1e12),
    *("", " ", "x", "none", "auto", "a/b", "a/b/c", "SIGUSR1", "usr1", "KILL", "stop", "2026-01-31", "31.1.2026"),
    *([], ["x"], ["none"], ["wandb", "mlflow"], ["USR1", "sighup"], ["SIGKILL"], [1], [["x"]], [None]),
    *({}, {"x": 1}, {"x": "y"}, {"x": None}, {"prompt": "q"}, {"path": "x"}, {"messages": 1}, {"1": -1}),
    *([{"path": "x"}, "y"], [{"path": "x", "weight": 0}], [{"weight": 2}], {"path": "x", "weight": 10**5}),
)


def accepts(raw: Any) -> bool:
    try:
        Recipe.model_validate(raw)
    except ValidationError:
        return False
    return True


TIED: dict[str, dict[str, Any]] = {
    "thinking.open": {"thinking": {"close": "</t>"}},
    "thinking.close": {"thinking": {"open": "<t>"}},
    "sequence.max_tokens": {"sequence": {"max_length": 1}},
    "generation.conversations": {"data": {"train": "x", "eval": "y"}},
    "training.early_stopping_patience": {"training": {"output_dir": "x", "eval_steps": 1}},
}
"""What a key needs of others."""
FOR_MTR_ONLY: dict[str, Any] = {
    "thinking.open": [None],
    "thinking.close": [None],
    "lora.init_lora_weights": ["loftq"],
    "training.optim": ["schedule_free_adamw"],
    "training.lr_scheduler_type": ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "wsd"],
    "training.lr_scheduler_kwargs": VALUES,
}
"""Values that are wrong beside what other keys are, which a schema of keys cannot say."""


def with_value(name: str, value: Any) -> dict[str, Any]:
    raw = changed(**TIED.get(name, {}))
    *sections, last = name.split(".")
    place: dict[str, Any] = raw
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return raw


def is_lenient(key: Key, value: Any) -> bool:
    """What mtr takes for another type: 1 and `y` for true, and anything empty for no signal."""
    of_signals = key.name.endswith("_signal") and not value
    return of_signals or ("bool" in str(key.field.annotation) and type(value) in (int, float, str))


_PLAIN = st.one_of(
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers(-(10**12), 10**12) | st.floats(-2, 2),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8).filter(lambda text: not re.fullmatch(r"\s*[-+\d_.]*([eE][-+\d]*)?\s*", text) or not text),
    st.sampled_from(["auto", "none", "USR1", "sigusr2", "a/b", "a b", "2026-01-31", "2026-1-31", "2026-W01-1"]),
)
ANY_VALUE = st.recursive(
    _PLAIN,
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text(max_size=6), below, max_size=3)
        | st.fixed_dictionaries({"path": below})
    ),
    max_leaves=5,
)
"""Whatever YAML can say but numbers in quotes, which only mtr takes."""


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(KEYS.keys() - {"training.lr_scheduler_kwargs"})), ANY_VALUE)
@example("lora.rank_pattern", {"q_proj": True})
@example("lora.alpha_pattern", {"q_proj": True})
@example("date", "20260131")
@example("date", 20260131)
def test_any_value_is_taken_by_both_or_by_none(name: str, value: Any) -> None:
    raw = with_value(name, value)
    by_mtr, by_schema = accepts(raw), VALIDATOR.is_valid(raw)
    is_tied = value in FOR_MTR_ONLY.get(name, ()) or (name == "sequence.max_length" and by_schema and value > 16384)
    assert by_mtr == by_schema or (by_mtr and is_lenient(KEYS[name], value)) or (by_schema and is_tied)


@pytest.mark.parametrize("name", KEYS)
def test_a_value_is_taken_by_both_or_by_none(name: str) -> None:
    taken, choices = 0, [{"true": True, "false": False, "null": None}.get(one, one) for one in KEYS[name].choices]
    for value in (*VALUES, *choices):
        raw = with_value(name, value)
        by_mtr, by_schema = accepts(raw), VALIDATOR.is_valid(raw)
        taken += by_mtr
        assert by_schema or not by_mtr or is_lenient(KEYS[name], value), f"{value!r} is refused by the schema only"
        assert by_mtr or not by_schema or value in FOR_MTR_ONLY.get(name, ()), f"{value!r} is taken by the schema only"
    assert taken, "no value was right"


BAD: dict[str, Any] = {
    "no section": {},
    "a list": [MINIMAL],
    "a section missing": {name: value for name, value in MINIMAL.items() if name != "data"},
    "a key missing": changed(model={"dtype": "auto"}),
    "a section misspelt": changed(modle={}),
    "a key misspelt": changed(training__learnin_rate=1e-4),
    "a key of a source misspelt": changed(data__train=[{"path": "x", "wieght": 2}]),
    "a key of another section": changed(model__seed=1),
    "a section that is text": changed(lora="r: 16"),
    "a value that is none": changed(model__dtype="int8"),
    "text for a number": changed(training__max_steps="many"),
    "true for a number": changed(training__max_steps=True),
    "half a step": changed(training__max_steps=1.5),
    "a learning rate of 0": changed(training__learning_rate=0),
    "a rank of 10^8": changed(lora={"r": 10**8}),
    "no source": changed(data__train=[]),
    "a share of 1.5": changed(data__eval=1.5),
    "a share in percent": changed(data__eval="5 %"),
    "an argument that is mtr's": changed(template={"messages": []}),
    "a column that no format has": changed(data__columns={"question": "q"}),
    "a signal that cannot be caught": changed(training__preempt_signal="SIGKILL"),
    "a tracker that is none": changed(training__report_to="paper"),
    "a repository that is no name": changed(training__push_to_hub="no spaces/here"),
    "a date of another form": changed(date="31.1.2026"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recipe_is_refused_by_both(kind: str) -> None:
    assert not accepts(BAD[kind])
    assert not VALIDATOR.is_valid(BAD[kind])


@pytest.mark.parametrize(
    "raw",
    [
        changed(data__train="x.jsonl", data__eval=0.05),
        changed(data__train=["x.jsonl", {"path": "me/data", "weight": 0.5}], data__eval={"path": "y"}),
        changed(training__report_to="none", training__preempt_signal="usr1"),
        changed(training__report_to=["wandb", "mlflow"], training__preempt_signal=["SIGUSR1", "Hup"]),
        changed(training__gradient_checkpointing=False, training__torch_compile="auto", lora=None),
        changed(template={"enable_thinking": True, "deep": {"x": [1, None]}}, date="2026-01-31"),
        changed(sequence={"max_tokens": "auto"}, lora={"target_modules": ["q_proj"], "rank_pattern": {"q": 8}}),
    ],
)
def test_short_forms_are_taken_by_both(raw: dict[str, Any]) -> None:
    assert accepts(raw)
    VALIDATOR.validate(raw)


def test_it_is_a_schema_of_its_draft_and_every_key_says_what_it_means() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    described = {
        name: entry for part in (SCHEMA, *SCHEMA["$defs"].values()) for name, entry in part["properties"].items()
    }
    assert [name for name, entry in described.items() if not entry.get("description")] == []
    assert all(part["additionalProperties"] is False for part in (SCHEMA, *SCHEMA["$defs"].values()))
    assert descriptions(Source)["weight"] == SCHEMA["$defs"]["Source"]["properties"]["weight"]["description"]


def test_mtr_schema_prints_the_released_file(mtr: Mtr) -> None:
    code, out, err = mtr("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == SCHEMA
    assert SCHEMA_FILE.read_text() == out == schema_text() + "\n", "run: mtr schema > src/mtr/recipe/schema.json"


def test_a_saved_recipe_is_taken_too(tmp_path: Path) -> None:
    (tmp_path / "saved.yaml").write_text(Recipe.model_validate(changed(training__preempt_signal="USR1")).dump())
    VALIDATOR.validate(read_yaml(tmp_path / "saved.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_taken_and_names_the_schema(path: Path) -> None:
    VALIDATOR.validate(read_yaml(path))
    first, _, _ = path.read_text().partition("\n")
    assert first == modeline(path)
    assert (path.parent / first.partition("$schema=")[2]).resolve() == SCHEMA_FILE.resolve()


def test_a_recipe_elsewhere_names_the_installed_schema(tmp_path: Path) -> None:
    for recipe in (tmp_path / "my.yaml", None):
        assert modeline(recipe) == f"# yaml-language-server: $schema={SCHEMA_FILE}"
