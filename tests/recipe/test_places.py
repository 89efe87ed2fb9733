"""Claims: an error of a recipe says line and column of the key, or of the value, that is wrong; one of an override says
that it is; finding the place of any number of problems takes bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import check_refused
from support.recipes import refused

Mtr = Callable[..., tuple[int, str, str]]

TEXT = """\
# a recipe
model:
  name_or_path: /m
  dtype: bfloat16
lora: {r: 16, alpha: 32}
data:
  train:
    - /a.jsonl
    - {path: /b.jsonl, weight: 2}
training:
  output_dir: /o
  seed: 1
"""


SOURCES = "data:\n  train:\n    - /a.jsonl\n    - {path: /b.jsonl, weight: 2}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  seed: 1", "  sead: 1", "12:3: unknown key 'training.sead', did you mean 'seed'?"),
        ("lora: {r: 16", "lora: {rr: 16", "5:8: unknown key 'lora.rr', did you mean 'r'?"),
        ("lora:", "lara:", "5:1: unknown key 'lara', did you mean 'lora'?"),
        ("weight: 2", "wight: 2", "9:24: unknown key 'data.train.1.wight', did you mean 'weight'?"),
        ("  seed: 1", "  seed: one", "12:9: 'training.seed': Input should be a valid integer"),
        ("  seed: 1", "  seed: -1", "12:9: 'training.seed': Input should be greater than or equal to 0 (got -1)"),
        ("  seed: 1", "  seed:", "12:3: 'training.seed': Input should be a valid integer (got null); leave the"),
        ("  seed: 1", "  seed: [1]", "12:3: 'training.seed': Input should be a valid integer"),
        ("bfloat16", "int8", "4:10: 'model.dtype': Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("weight: 2", "weight: -2", "9:32: 'data.train.1.weight': Input should be greater than 0"),
        ("    - /a.jsonl", "    - 5", "8:7: 'data.train.0': a section must be a mapping of keys (got 5)"),
        ("  output_dir: /o\n", "", "10:1: 'training.output_dir' is missing"),
        ("path: /b.jsonl, ", "", "9:7: 'data.train.1.path' is missing"),
        ("model:\n  name_or_path: /m\n  dtype: bfloat16\n", "", "2:1: 'model' is missing"),
        ("lora: {r: 16, alpha: 32}", "lora: 7", "5:7: 'lora': a section must be a mapping of keys (got 7)"),
        ("  seed: 1", "  early_stopping_patience: 2", "12:28: training.early_stopping_patience needs"),
        (
            "  seed: 1",
            "  seed: 1\nsequence:\n  max_tokens: 10",
            "14:15: sequence.max_tokens (10) is below max_length",
        ),
        (
            "data:\n  train:\n    - /a.jsonl\n    - {path: /b.jsonl, weight: 2}",
            "data: {train: 5}",
            "6:15: 'data.train'",
        ),
        (
            "data:\n  train:\n    - /a.jsonl\n    - {path: /b.jsonl, weight: 2}",
            "data: {train: ''}",
            "6:15: 'data.train.0",
        ),
        ("data:\n", "data:\n  eval: 1.5\n", "7:9: 'data.eval_fraction': Input should be less than 1 (got 1.5)"),
        ("  seed: 1", "  parallel: fsdp2\n  optim: muon", "13:10: training.optim: muon works with training.parallel"),
        ("alpha: 32", "rank_pattern: {q: 0}", "5:33: 'lora.rank_pattern.q': Input should be greater than 0 (got 0)"),
        (
            "  seed: 1",
            "  lr_scheduler_kwargs:\n    num_cycles: [1]",
            "13:5: training.lr_scheduler_kwargs.num_cycles: must",
        ),
        (SOURCES, "data:\n  train: {path: x, name: no}", "7:26: 'data.train.0.name': Input should be a valid string"),
        (SOURCES, "data: {train: x, eval: 5%}", "6:24: data.eval: a share is written as a number: 0.05 (got '5%')"),
        ("  seed: 1", "  seed: 010", "12:9: not valid YAML: 010 is octal in YAML 1.1 and decimal in 1.2"),
        ("  seed: 1", "  output_dir: /p", "12:3: not valid YAML: duplicate key 'output_dir', which is on line 11 too"),
        ("  seed: 1", "  <<: {sead: 1}", "12:8: unknown key 'training.sead', did you mean 'seed'?"),
    ],
)
def test_a_problem_is_where_it_stands(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert TEXT.count(old) == 1
    assert refused(tmp_path, TEXT.replace(old, new)).startswith(f"{tmp_path / 'recipe.yaml'}:{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "1:9: not valid YAML: while parsing a flow node, expected the node content"),
        ("model:\n\tname: x", "2:1: not valid YAML: while scanning for the next token, found character '\\t'"),
        ("a: 1\nb: c: d", "2:5: not valid YAML: mapping values are not allowed here"),
        ("\ufeffa: 1\nb: 2\n  a: 1\nb: 2", "3:4: not valid YAML"),
        ("a: 1\nb: {c: 1, c: 2}", "2:11: not valid YAML: duplicate key 'c'"),
        ('a: "C:\\users"', "1:9: not valid YAML: while scanning a double-quoted scalar, expected escape sequence"),
        ("a: 1\nb: x\0y", "2:5: not valid YAML: the character U+0000 is not allowed"),
        ("a: !!python/name:os.system x", "1:4: not valid YAML: could not determine a constructor for the tag"),
    ],
)
def test_what_is_no_yaml_is_where_it_stands(tmp_path: Path, text: str, says: str) -> None:
    assert refused(tmp_path, text).startswith(f"{tmp_path / 'recipe.yaml'}:{says}")


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("model:\n\tname: x", "indent with spaces, which YAML takes alone"),
        ('a: "C:\\users"', "in double quotes a backslash begins an escape; use single quotes"),
        ("a: @x", "put the value in quotes"),
        ("a: 1\n b: 2", "the line is indented otherwise than those before it, or a text with ': ' needs quotes"),
    ],
)
def test_what_is_no_yaml_has_a_way_out(tmp_path: Path, text: str, mend: str) -> None:
    assert refused(tmp_path, text).endswith(f"; {mend}")


def test_problems_are_in_the_order_of_the_file_and_those_of_overrides_come_last(tmp_path: Path) -> None:
    text = TEXT.replace("seed", "sead").replace("model:\n", "model:\n  dtipe: x\n")
    message = refused(tmp_path, text, "lora.alpha=0")
    places = [part.split(": ")[0] for part in message.removeprefix(f"{tmp_path / 'recipe.yaml'}:").split("; ")]
    assert places == ["3:3", "13:3", "override"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.sead=1", "override: unknown key 'training.sead', did you mean 'seed'?"),
        ("modle.x=1", "override: unknown key 'modle', did you mean 'model'?"),
        ("training.seed=one", "override: 'training.seed': Input should be a valid integer"),
        ("data.train.1.weight=0", "override: 'data.train.1.weight': Input should be greater than 0"),
        ("model={}", "override: 'model.name_or_path' is missing"),
        ("data=null", "override: 'data': a section must be a mapping of keys (got null)"),
        ("training.early_stopping_patience=2", "override: training.early_stopping_patience needs"),
    ],
)
def test_what_an_override_says_stands_nowhere(tmp_path: Path, override: str, says: str) -> None:
    assert refused(tmp_path, TEXT, override).startswith(f"{tmp_path / 'recipe.yaml'}: {says}")


def test_a_key_beside_an_overridden_one_has_its_place(tmp_path: Path) -> None:
    message = refused(tmp_path, TEXT.replace("seed: 1", "sead: 1"), "training.max_steps=1", "lora.r=8")
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:12:3: unknown key 'training.sead'")


def test_what_is_found_missing_later_has_its_place(mtr: Mtr, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for folder in ("m", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("")
    recipe.write_text(TEXT.replace("/m", str(tmp_path / "m")).replace("/a.jsonl", str(tmp_path / "a.jsonl")))
    check_refused(mtr("inspect", recipe), f"{recipe}:9:14: data: no such file: /b.jsonl")
    check_refused(mtr("audit", recipe, "data.train.1.path=/c.jsonl"), f"{recipe}: override: data: no such file: /c")
    recipe.write_text(TEXT)
    check_refused(mtr("train", recipe), f"{recipe}:3:17: model.name_or_path: no such model folder: /m")
    check_refused(mtr("train", recipe, "--num-processes", 2), f"{recipe}:3:17: model.name_or_path")


def test_seven_thousand_wrong_keys_are_found_at_once(tmp_path: Path) -> None:
    keys = "".join(f"k{i}: 1\n" for i in range(7_000))
    began = time.process_time()
    message = refused(tmp_path, TEXT + keys, "training.sead=1")
    assert time.process_time() - began < 4
    assert f"{tmp_path / 'recipe.yaml'}:13:1: unknown key 'k0'" in message
    assert message.endswith("; and 6991 more")
