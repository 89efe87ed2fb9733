"""Claims: every key of the contract loads with its default; values outside its limits are refused by name; a recipe is
frozen, and a dumped recipe is the same recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.recipes import MINIMAL, at, changed, load, refused

from mtr.recipe.sections import Recipe

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
    "sequence.strategy": "auto",
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


@pytest.mark.parametrize("key", CONTRACT)
def test_every_key_of_the_contract_has_its_default(key: str) -> None:
    value = at(Recipe.model_validate(MINIMAL), key)
    assert value == CONTRACT[key]
    assert isinstance(value, bool) == isinstance(CONTRACT[key], bool)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("model.dtype", v) for v in ("float32", "bfloat16", "float16")),
        *(("model.attention", v) for v in ("flex", "varlen", "segment", "sdpa", "eager")),
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
        ("sequence.strategy", "double", "'auto', 'single_pass', 'per_turn' or 'per_turn_unpacked' (got 'double')"),
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
    assert (recipe.sequence.strategy, recipe.training.seed) == ("auto", 42)
    assert other.sequence.max_length == recipe.sequence.max_length
    with pytest.raises(ValidationError):
        recipe.replace(sequence={"strategy": "none"})


def test_a_date_needs_no_quotes_and_must_exist(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "date='2025-01-31'").date == "2025-01-31"
    assert load(tmp_path, MINIMAL, "date=2025-01-31").date == "2025-01-31"
    for value in ("2025-13-41", "'2025-13-41'"):
        assert "'date" in refused(tmp_path, MINIMAL, f"date={value}")
