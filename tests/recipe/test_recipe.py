"""Claims: every key of the contract loads with its default; what a recipe may not say is refused by name, with the
nearest known key; overrides reach every key; a dumped recipe is the recipe; differing_keys sees what changes a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.paths import QUICKSTART, ROOT

from mtr.errors import UserError
from mtr.recipe.changes import differing_keys
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "/m"},
    "data": {"train": [{"path": "/d.jsonl"}]},
    "training": {"output_dir": "/o"},
}
CONTRACT: dict[str, Any] = {
    "model.name_or_path": "/m",
    "model.dtype": "auto",
    "model.attention": "auto",
    "model.trust_remote_code": False,
    "template": {},
    "lora.r": 16,
    "lora.alpha": 32,
    "lora.dropout": 0.0,
    "lora.target_modules": "all-linear",
    "data.train.0.path": "/d.jsonl",
    "data.train.0.name": None,
    "data.train.0.split": "train",
    "data.train.0.weight": 1.0,
    "data.eval": [],
    "data.messages": "messages",
    "data.tools": "tools",
    "data.streaming": True,
    "data.shuffle": True,
    "sequence.strategy": "single_pass",
    "sequence.max_length": 4096,
    "sequence.max_tokens": 16384,
    "sequence.overlong": "drop",
    "loss.weighting": "token",
    "training.output_dir": "/o",
    "training.conversations_per_step": 16,
    "training.num_train_epochs": 1,
    "training.max_steps": None,
    "training.learning_rate": 2.0e-4,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 0.03,
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "training.optim": "adamw_torch",
    "training.gradient_checkpointing": True,
    "training.logging_steps": 1,
    "training.eval_steps": None,
    "training.save_steps": None,
    "training.seed": 42,
    "training.report_to": [],
}


def load(tmp_path: Path, raw: Any, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_recipe(path, list(overrides))


def refused(tmp_path: Path, raw: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, raw, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(**keys: Any) -> dict[str, Any]:
    """MINIMAL with `section__key=value` set."""
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for key, value in keys.items():
        section, _, name = key.partition("__")
        if name:
            raw.setdefault(section, {})[name] = value
        else:
            raw[section] = value
    return raw


def at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump()
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize("key", CONTRACT)
def test_every_key_of_the_contract_has_its_default(key: str) -> None:
    value = at(Recipe.model_validate(MINIMAL), key)
    assert value == CONTRACT[key]
    assert isinstance(value, bool) == isinstance(CONTRACT[key], bool)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("model.dtype", v) for v in ("float32", "bfloat16", "float16")),
        *(("model.attention", v) for v in ("flex", "segment", "sdpa", "eager")),
        ("model.trust_remote_code", True),
        ("template", {"enable_thinking": True}),
        ("lora", None),
        ("lora.dropout", 0.1),
        ("lora.target_modules", ["q_proj", "v_proj"]),
        ("lora.modules_to_save", ["lm_head"]),
        ("sequence.strategy", "per_turn"),
        ("sequence.overlong", "truncate"),
        ("sequence.overlong", "error"),
        ("loss.weighting", "turn"),
        ("loss.weighting", "conversation"),
        ("training.warmup_steps", 10),
        ("training.num_train_epochs", 0.5),
        ("training.max_steps", 7),
        ("training.eval_steps", 3),
        ("training.save_steps", 3),
        ("training.seed", 0),
    ],
)
def test_other_values_of_the_contract_load(tmp_path: Path, key: str, value: Any) -> None:
    assert at(load(tmp_path, MINIMAL, f"{key}={yaml.safe_dump(value, default_flow_style=True)}"), key) == value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(modle={"x": 1}), "unknown key 'modle', did you mean 'model'?"),
        (changed(training__learning_rte=1), "unknown key 'training.learning_rte', did you mean 'learning_rate'?"),
        (changed(model__atention="flex"), "unknown key 'model.atention', did you mean 'attention'?"),
        (changed(lora={"rank_alpha": 1}), "unknown key 'lora.rank_alpha', did you mean 'alpha'?"),
        (changed(thinking={"opn": "<t>"}), "unknown key 'thinking.opn', did you mean 'open'?"),
        (
            changed(data__train=[{"path": "a.jsonl"}, {"path": "b.jsonl", "wieght": 2}]),
            "unknown key 'data.train.1.wieght', did you mean 'weight'?",
        ),
        (
            changed(data__eval={"path": "b.jsonl", "splitt": "x"}),
            "unknown key 'data.eval.0.splitt', did you mean 'split'?",
        ),
        (changed(sequence={"zzz": 1}), "known keys: strategy, merge, max_length, max_tokens, overlong"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, raw: dict[str, Any], words: str) -> None:
    message = refused(tmp_path, raw)
    assert words in message
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: ")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(training__max_steps="many"), "'training.max_steps'"),
        (changed(training__max_steps=1.5), "'training.max_steps'"),
        (changed(training__learning_rate=[1]), "'training.learning_rate'"),
        (changed(training__gradient_checkpointing="perhaps"), "'training.gradient_checkpointing'"),
        (changed(model__name_or_path=3), "'model.name_or_path'"),
        (changed(model__name_or_path=None), "'model.name_or_path'"),
        (changed(model="gpt2"), "'model'"),
        (changed(lora=5), "'lora'"),
        (changed(template=["x"]), "'template'"),
        (changed(lora={"target_modules": 5}), "'lora.target_modules'"),
        (changed(data__train=5), "'data.train'"),
        (changed(data__train=[{"path": "a"}, 5]), "'data.train.1'"),
        (changed(data__messages=["m"]), "'data.messages'"),
    ],
)
def test_a_wrong_type_is_refused_by_its_key(tmp_path: Path, raw: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, raw)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.dtype", "int8", "'bfloat16' or 'float16' (got 'int8')"),
        ("model.attention", "flash", "'eager' (got 'flash')"),
        ("lora.r", "0", "greater than 0 (got 0)"),
        ("lora.alpha", "0", "greater than 0"),
        ("lora.dropout", "1.0", "less than 1 (got 1.0)"),
        ("lora.dropout", "-0.1", "greater than or equal to 0"),
        ("data.train.0.weight", "0", "greater than 0"),
        ("data.train.0.weight", "-1", "greater than 0"),
        ("data.train.0.weight", ".inf", "finite"),
        ("data.train", "[]", "at least 1 item"),
        ("data.num_workers", "-1", "greater than or equal to 0"),
        ("sequence.strategy", "double", "'single_pass' or 'per_turn' (got 'double')"),
        ("sequence.overlong", "cut", "'drop', 'truncate' or 'error'"),
        ("sequence.max_length", "0", "greater than 0"),
        ("sequence.max_tokens", "-5", "greater than 0"),
        ("loss.weighting", "row", "'token', 'turn' or 'conversation'"),
        ("training.conversations_per_step", "0", "greater than 0"),
        ("training.num_train_epochs", "0", "greater than 0"),
        ("training.max_steps", "0", "greater than 0"),
        ("training.learning_rate", "0", "greater than 0"),
        ("training.learning_rate", ".nan", "finite"),
        ("training.lr_scheduler_type", "cosin", "(got 'cosin')"),
        ("training.warmup_steps", "-1", "greater than or equal to 0"),
        ("training.weight_decay", "-0.1", "greater than or equal to 0"),
        ("training.max_grad_norm", "0", "greater than 0"),
        ("training.optim", "adamx", "(got 'adamx')"),
        ("training.logging_steps", "0", "greater than 0"),
        ("training.eval_steps", "0", "greater than 0"),
        ("training.save_steps", "0", "greater than 0"),
        ("training.seed", "-1", "greater than or equal to 0"),
        ("training.on_save_error", "ignore", "(got 'ignore')"),
        ("date", "2025-1-1", "'date'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(tmp_path: Path, key: str, value: str, words: str) -> None:
    message = refused(tmp_path, MINIMAL, f"{key}={value}")
    assert f"{key!r}: " in message
    assert words in message


def test_max_tokens_below_max_length_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL, "sequence.max_tokens=100", "sequence.max_length=101")
    assert "max_tokens (100) is below max_length (101)" in message
    assert "raise sequence.max_tokens" in message
    equal = load(tmp_path, MINIMAL, "sequence.max_tokens=100", "sequence.max_length=100")
    assert equal.sequence.max_tokens == equal.sequence.max_length == 100


def test_half_a_pair_of_thinking_tags_is_refused(tmp_path: Path) -> None:
    assert "both thinking.open and thinking.close" in refused(tmp_path, MINIMAL, "thinking.open=<t>")
    assert load(tmp_path, MINIMAL, "thinking.open=<t>", "thinking.close=</t>").thinking.close == "</t>"


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_missing_section_is_named(tmp_path: Path, section: str) -> None:
    raw = {name: value for name, value in MINIMAL.items() if name != section}
    assert f"{section!r} is missing" in refused(tmp_path, raw)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    assert "'training.output_dir' is missing" in refused(tmp_path, changed(training={"seed": 1}))
    assert "'data.train.0.path' is missing" in refused(tmp_path, changed(data__train=[{"split": "x"}]))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, changed(modle={}, training__seed=-1))
    assert "'modle'" in message
    assert "'training.seed'" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a recipe is a mapping of sections"),
        ("- 1", "a recipe is a mapping of sections"),
        ("just words", "a recipe is a mapping of sections"),
        ("model: [", "not valid YAML"),
        ("model:\n\tname: x", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert words in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.max_steps=20", "training.max_steps", 20),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.max_steps=", "training.max_steps", None),
        ("training.learning_rate=1.0e-3", "training.learning_rate", 1e-3),
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("training.gradient_checkpointing=false", "training.gradient_checkpointing", False),
        ("training.output_dir=a=b", "training.output_dir", "a=b"),
        ("lora.target_modules=[q_proj, k_proj]", "lora.target_modules", ["q_proj", "k_proj"]),
        ("template.enable_thinking=true", "template", {"enable_thinking": True}),
        ("template={a: {b: 1}}", "template", {"a": {"b": 1}}),
        ("template.a.b.c=1", "template", {"a": {"b": {"c": 1}}}),
        ("data.train.0.weight=0.5", "data.train.0.weight", 0.5),
        ("data.eval=[{path: /e.jsonl, split: test}]", "data.eval.0.split", "test"),
        ("lora=null", "lora", None),
    ],
)
def test_an_override_reaches_its_key(tmp_path: Path, override: str, key: str, value: Any) -> None:
    assert at(load(tmp_path, MINIMAL, override), key) == value


def test_an_override_opens_a_section_that_is_null_and_later_ones_win(tmp_path: Path) -> None:
    recipe = load(tmp_path, changed(lora=None), "lora.r=4", "lora.r=8")
    assert recipe.lora is not None
    assert recipe.lora.r == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", "an override is written section.key=value"),
        ("=5", "an override is written section.key=value"),
        ("template.x=[", "the value is not valid YAML; quote it"),
        ("training.seed.x=1", "'seed' holds a plain value, it has no keys"),
        ("data.train.7.path=x", "'7' is no index of a list of 1"),
        ("data.train.1={path: x}", "'1' is no index of a list of 1"),
        ("data.train.first.path=x", "'first' is no index of a list of 1"),
        ("training.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("trainig.seed=1", "did you mean 'training'?"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, words: str) -> None:
    raw = changed(training__seed=1)
    message = refused(tmp_path, raw, override)
    assert words in message


@pytest.mark.parametrize(
    "short",
    ["/a.jsonl", ["/a.jsonl"], {"path": "/a.jsonl"}, [{"path": "/a.jsonl"}]],
)
def test_a_source_may_be_written_short(tmp_path: Path, short: Any) -> None:
    recipe = load(tmp_path, changed(data={"train": short, "eval": short}))
    assert [s.path for s in recipe.data.train] == [s.path for s in recipe.data.eval] == ["/a.jsonl"]


def test_short_and_long_sources_mix(tmp_path: Path) -> None:
    recipe = load(tmp_path, changed(data={"train": ["/a.jsonl", {"path": "/b.jsonl", "weight": 2}]}))
    assert [(s.path, s.weight) for s in recipe.data.train] == [("/a.jsonl", 1.0), ("/b.jsonl", 2.0)]


def test_relative_paths_are_found_in_the_working_directory_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder, names in ((here, ("both.jsonl",)), (beside, ("both.jsonl", "only.jsonl", "part-1.jsonl"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
    (beside / "model").mkdir()
    monkeypatch.chdir(here)
    sources = ["both.jsonl", "only.jsonl", "part-*.jsonl", "org/name", "absent.jsonl"]
    recipe = load(beside, changed(model={"name_or_path": "model"}, data={"train": sources, "eval": "only.jsonl"}))
    assert recipe.model.name_or_path == str(beside / "model")
    assert [s.path for s in recipe.data.train] == [
        str(here / "both.jsonl"),
        str(beside / "only.jsonl"),
        str(beside / "part-*.jsonl"),
        "org/name",
        "absent.jsonl",
    ]
    assert recipe.data.eval[0].path == str(beside / "only.jsonl")


def test_a_relative_output_dir_is_not_looked_up_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside" / "run").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load(tmp_path / "beside", changed(training__output_dir="run")).training.output_dir == "run"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, changed(data__train="~/x.jsonl")).data.train[0].path == str(tmp_path / "x.jsonl")


def test_a_dumped_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        changed(
            template={"name": "Zoë", "on": True},
            lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            thinking={"open": "<t>", "close": "</t>"},
            date="2025-01-31",
            data__eval=["/e.jsonl"],
            training__learning_rate=1e-7,
        ),
    )
    dumped = recipe.dump()
    assert load(tmp_path, dumped) == recipe
    assert load(tmp_path, dumped).dump() == dumped
    whole = yaml.safe_load(dumped)
    assert whole["training"].keys() >= {key.split(".")[1] for key in CONTRACT if key.startswith("training.")}
    assert whole["sequence"]["max_tokens"] == CONTRACT["sequence.max_tokens"]
    assert "Zoë" in dumped


def test_a_recipe_without_lora_keeps_that_through_a_dump(tmp_path: Path) -> None:
    assert load(tmp_path, load(tmp_path, changed(lora=None)).dump()).lora is None


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    for section, key in ((recipe, "date"), (recipe.training, "seed"), (recipe.data.train[0], "path")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, "x")


def test_replace_makes_a_checked_copy() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    other = recipe.replace(sequence={"strategy": "per_turn"}, training={"seed": 1})
    assert (other.sequence.strategy, other.training.seed) == ("per_turn", 1)
    assert (recipe.sequence.strategy, recipe.training.seed) == ("single_pass", 42)
    assert other.sequence.max_length == recipe.sequence.max_length
    with pytest.raises(ValidationError):
        recipe.replace(sequence={"strategy": "none"})


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"training": {"learning_rate": 1e-3}}, ["training.learning_rate"]),
        ({"training": {"seed": 1}, "loss": {"weighting": "turn"}}, ["loss.weighting", "training.seed"]),
        ({"lora": {"r": 8}}, ["lora.r"]),
        ({"data": {"train": [{"path": "/other.jsonl"}]}}, ["data.train"]),
        ({"data": {"shuffle": False}}, ["data.shuffle"]),
        ({"sequence": {"max_length": 100}}, ["sequence.max_length"]),
        ({"template": {"enable_thinking": True}}, ["template.enable_thinking"]),
        ({"training": {"conversations_per_step": 2}}, ["training.conversations_per_step"]),
        ({"training": {"num_train_epochs": 2}}, ["training.num_train_epochs"]),
        ({"sequence": {"max_tokens": 5000, "strategy": "per_turn"}}, []),
        ({"training": {"output_dir": "/p", "max_steps": 9, "save_steps": 2, "logging_steps": 5}}, []),
        ({"model": {"attention": "sdpa"}, "data": {"num_workers": 1, "eval": ["/e.jsonl"]}}, []),
        ({"training": {"gradient_checkpointing": False}}, []),
    ],
)
def test_differing_keys_are_those_that_change_the_mathematics(
    change: dict[str, dict[str, Any]], different: list[str]
) -> None:
    one = Recipe.model_validate(MINIMAL)
    other = one.replace(**change)
    assert sorted(differing_keys(one, other)) == different
    assert sorted(differing_keys(other, one)) == different


def test_lora_against_all_weights_differs() -> None:
    one = Recipe.model_validate(MINIMAL)
    assert any(key.startswith("lora") for key in differing_keys(one, Recipe.model_validate({**MINIMAL, "lora": None})))


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training.output_dir
    assert Recipe.model_validate(yaml.safe_load(recipe.dump())) == recipe


def test_the_quickstart_recipe_finds_its_files_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.model.name_or_path == str(QUICKSTART / "base")
    assert all(Path(source.path).is_file() for source in recipe.data.train + recipe.data.eval)


def test_a_date_needs_no_quotes_and_must_exist(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "date='2025-01-31'").date == "2025-01-31"
    assert load(tmp_path, MINIMAL, "date=2025-01-31").date == "2025-01-31"
    for value in ("2025-13-41", "'2025-13-41'"):
        assert "'date" in refused(tmp_path, MINIMAL, f"date={value}")


def test_the_test_recipe_is_valid(write_recipe: Callable[..., Path]) -> None:
    assert load_recipe(write_recipe(lora=None)).lora is None
