"""Claims: all that is wrong with a recipe is reported at once, by key; an unknown key with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.recipes import MINIMAL, changed, refused


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
        (changed(learning_rate=1e-4), "unknown key 'learning_rate': it is training.learning_rate"),
        (changed(training__r=8), "unknown key 'training.r': it is lora.r"),
        (changed(training__lora={"r": 8}), "unknown key 'training.lora': it is lora, beside model, data and training"),
        (changed(**{"training.seed": 1}), "unknown key 'training.seed', write 'seed:' below 'training:'"),
        (changed(training__adam_beta1=0.9), "optimizers have the defaults of their library"),
        (changed(model__vocabulary=1), "known keys: name_or_path, revision"),
        (changed(sequence={"zzz": 1}), "known keys: strategy, merge, max_length, max_tokens, overlong"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, raw: dict[str, Any], words: str) -> None:
    message = refused(tmp_path, raw)
    assert words in message
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(training__max_steps="many"), "'training.max_steps'"),
        (changed(training__max_steps=1.5), "'training.max_steps'"),
        (changed(training__learning_rate=[1]), "'training.learning_rate'"),
        (changed(training__gradient_checkpointing="perhaps"), "'training.gradient_checkpointing'"),
        (changed(training__torch_compile="perhaps"), "'training.torch_compile': Input should be 'auto', true or false"),
        (changed(model__name_or_path=3), "'model.name_or_path'"),
        (changed(model__name_or_path=None), "'model.name_or_path'"),
        (changed(model="gpt2"), "'model'"),
        (changed(lora=5), "'lora'"),
        (changed(template=["x"]), "'template'"),
        (changed(lora={"target_modules": 5}), "'lora.target_modules'"),
        (changed(data__train=5), "'data.train'"),
        (changed(data__train=[{"path": "a"}, 5]), "'data.train.1'"),
        (changed(data__messages=["m"]), "'data.messages'"),
        (changed(model="me/m"), "(got 'me/m'), did you mean 'name_or_path: me/m' below it?"),
        (changed(training="output_dir:/o"), "(got 'output_dir:/o'), did you mean 'output_dir: /o'?"),
        (changed(lora=False), "'lora': a section must be a mapping of keys (got false); null trains all weights"),
        (changed(model__revision=1234567), "(got 1234567); text that YAML reads as a number, true or false needs"),
        (changed(sequence={"max_tokens": "16k"}), "unable to parse string as an integer, or 'auto' (got '16k')"),
        (changed(lora={"target_modules": None}), "a valid string, or a list (got null); leave the key out for its"),
        (changed(data__eval=True), "or a list of them, or a share such as 0.05 (got true)"),
        (changed(data__train=None), "must be a file, a folder, a pattern or a Hub id, or a list of them (got null)"),
        (changed(training__preempt_signal=10), "must be the name of a signal, such as USR1, or a list of names (got"),
        (changed(date=2026), "'date': not a date; write it YYYY-MM-DD (got 2026)"),
    ],
)
def test_a_wrong_type_is_refused_by_its_key(tmp_path: Path, raw: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, raw)


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
