"""Recipes: files that are none, YAML that grows or nests, keys, types and values that are wrong, texts that steer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from support.hostile import Place, Prepare, after, audit, done, either, refused, train
from support.paths import QUICKSTART


def text(content: str | bytes) -> Prepare:
    """A recipe of exactly this text."""

    def prepare(place: Place) -> list[object]:
        return ["train", place.write("recipe.yaml", content)]

    return prepare


def besides(content: str) -> Prepare:
    """The usual recipe, and more text after it."""

    def prepare(place: Place) -> list[object]:
        return ["train", place.write("recipe.yaml", (place / "recipe.yaml").read_text() + content)]

    return prepare


def flow(**sections: Any) -> str:
    """A recipe as one line of JSON, with what YAML makes of it."""
    raw = {"model": {"name_or_path": str(QUICKSTART / "base")}, "data": {"train": "rows.jsonl"}}
    return json.dumps({**raw, "training": {"output_dir": "run"}, **sections})


def replaced(make: Any) -> Prepare:
    """Something else lies where the recipe should."""

    def prepare(place: Place) -> list[object]:
        (place / "recipe.yaml").unlink()
        make(place / "recipe.yaml")
        return ["train", "recipe.yaml"]

    return prepare


def bomb(levels: int) -> str:
    """Aliases of aliases: ten times as many with each level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\ntemplate: {{deep: *a{levels - 1}}}\n"


def in_encoding(encoding: str, prefix: bytes = b"") -> Prepare:
    def prepare(place: Place) -> list[object]:
        written = "# höflich\n" + (place / "recipe.yaml").read_text()
        return ["train", place.write("recipe.yaml", prefix + written.encode(encoding))]

    return prepare


ONE = ("recipe.yaml",)
FILES = (
    refused("no such file", after(lambda p: (p / "recipe.yaml").unlink(), lambda p: ["train", "recipe.yaml"]), *ONE),
    refused("an empty file", text(""), *ONE, "mapping"),
    refused("only a comment", text("# nothing\n"), *ONE, "mapping"),
    refused("a list", text("- model\n"), *ONE, "mapping"),
    refused("a plain text", text("model"), *ONE, "mapping"),
    refused("a number", text("7"), *ONE, "mapping"),
    refused("an open bracket", text("model: ["), *ONE, "not valid YAML"),
    refused("a tab for indentation", text("model:\n\tname_or_path: x"), *ONE, "not valid YAML"),
    refused("an open quote", text('model: "x'), *ONE, "not valid YAML"),
    refused("a NUL byte", text(b"model: \x00"), *ONE),
    refused("a PNG", text(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), *ONE),
    refused("a pickle", text(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94."), *ONE),
    refused("escape codes", text(b"model: \x1b[31m\n"), *ONE),
    refused("Latin-1", in_encoding("latin-1"), *ONE),
    refused("UTF-16", in_encoding("utf-16"), *ONE),
    done("a byte order mark", in_encoding("utf-8", b"\xef\xbb\xbf")),
    done(
        "DOS line ends",
        after(
            lambda p: p.write("recipe.yaml", (p / "recipe.yaml").read_bytes().replace(b"\n", b"\r\n")),
            lambda p: ["train", "recipe.yaml"],
        ),
    ),
    refused("two documents", besides("---\nmodel: {}\n"), *ONE, "not valid YAML"),
    refused("a duplicate section", besides("training: {output_dir: other}\n"), *ONE, "duplicate key 'training'"),
    refused("a duplicate key", text("model: {name_or_path: a, name_or_path: b}"), *ONE, "duplicate key 'name_or_path'"),
    refused("a duplicate key in a source", besides("x: [{path: a, path: b}]\n"), *ONE, "duplicate key 'path'"),
    refused("a tag that runs code", text("model: !!python/object/apply:os.system ['touch harm']"), *ONE, "YAML"),
    refused("a tag of a Python name", text("model: !!python/name:os.system"), *ONE, "YAML"),
    refused("a tag that nobody knows", text("model: !secret x"), *ONE, "YAML"),
    refused("an alias of nothing", text("model: *nothing"), *ONE, "YAML"),
    refused("a mapping as a key", text("? {a: b}\n: c\n"), *ONE),
    refused("a list that contains itself", besides("template: {deep: &a [*a]}\n"), *ONE),
    refused("a mapping that contains itself", besides("template: &a {deep: *a}\n"), *ONE),
    refused("aliases that grow to ten million", besides(bomb(7)), *ONE),
    refused("aliases that grow to 10^30", besides(bomb(30)), *ONE),
    refused(
        "merge keys that grow",
        besides(
            "".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9) if i else '{a: 1}'}]\n" for i in range(9))
        ),
        *ONE,
    ),
    refused("a merge of no mapping", besides("template:\n  <<: 7\n"), *ONE, "YAML"),
    refused("5,000 lists in each other", besides(f"template: {{deep: {'[' * 5000}{']' * 5000}}}\n"), *ONE),
    refused("5,000 mappings in each other", besides(f"template: {'{a: ' * 5000}{'}' * 5000}\n"), *ONE),
    refused("900 lists in each other", besides(f"template: {{deep: {'[' * 900}{']' * 900}}}\n"), *ONE),
    refused("100,000 lists opened", text("[" * 100_000), *ONE),
    refused("300 levels of indentation", text("".join(f"{' ' * i}a:\n" for i in range(300))), *ONE),
    refused("a folder", replaced(Path.mkdir), *ONE),
    refused("a dangling link", replaced(lambda path: path.symlink_to("nowhere")), *ONE),
    refused("a link to itself", replaced(lambda path: path.symlink_to(path)), *ONE),
    refused("a pipe that nobody writes to", replaced(os.mkfifo), *ONE, seconds=2),
    refused("an empty device", replaced(lambda path: path.symlink_to("/dev/null")), *ONE),
    refused("30 MB of one word", text("x" * 30_000_000), *ONE, seconds=3),
    refused("a name too long for a file", lambda p: ["train", "x" * 300 + ".yaml"], "xxx.yaml"),
    refused("a name with escape codes", lambda p: ["train", "\x1b[31mred.yaml"], "red.yaml", "no such recipe"),
    refused("a name in two lines", lambda p: ["train", "one\ntwo.yaml"], "two.yaml", "no such recipe"),
)

KEYS = (
    refused("an unknown section", besides("modle: {}\n"), *ONE, "'modle'", "did you mean 'model'?"),
    refused("a misspelt key", train(training={"lerning_rate": 1}), "'training.lerning_rate'", "'learning_rate'"),
    refused("a key of a source misspelt", train(data={"train": [{"paht": "x"}]}), "'data.train.0.paht'", "'path'"),
    refused("a key in the wrong section", train(model={"max_length": 4}), "'model.max_length'"),
    refused("a number as a key", besides("7: x\n"), *ONE, "7"),
    refused("null as a key", besides("~: x\n"), *ONE),
    refused("a key of an empty text", besides("'': x\n"), *ONE),
    refused("a key with escape codes", besides('"\\e[2J\\e]0;title\\a": x\n'), *ONE, "unknown key"),
    refused("a key in two lines", besides('"one\\ntwo": x\n'), *ONE, "unknown key"),
    refused("a key that reorders what is read", besides('"\\u202Egnp.exe": x\n'), *ONE, "unknown key"),
    refused("half a surrogate pair as a key", besides('"\\uD800": x\n'), *ONE),
    refused("half a surrogate pair as a value", train(training={"preempt_signal": ["\ud800"]}), *ONE),
    refused("a key of 100,000 characters", besides(f"{'k' * 100_000}: x\n"), *ONE),
    refused("10,000 unknown keys", besides("".join(f"unknown{i}: x\n" for i in range(10_000))), *ONE),
    refused("no sections", text("{}"), *ONE, "'model' is missing", "'training' is missing"),
    refused("a section that is null", text("model:\ndata:\ntraining:\n"), *ONE, "'model'"),
    refused("a section that is a list", besides("loss: [token]\n"), *ONE, "'loss': a section must be a mapping"),
    refused("a section that is text", besides("sequence: long\n"), *ONE, "'sequence'"),
    refused("no output_dir", train(training={"output_dir": None}), "'training.output_dir'"),
    refused("a list for a text", train(model={"name_or_path": ["a", "b"]}), "'model.name_or_path'"),
    refused("YAML's `no` for a name", text(flow(model={"name_or_path": False})), "'model.name_or_path'", "quotes"),
    refused("an empty name of the model", train(model={"name_or_path": ""}), "model.name_or_path"),
    refused("a NUL in the model's name", train(model={"name_or_path": "a\0b"}), "model.name_or_path"),
    refused("a NUL in a data path", train(data={"train": "a\0b.jsonl"}), "data"),
    refused("a NUL in output_dir", train(training={"output_dir": "a\0b"}), "output_dir"),
    refused("an empty output_dir", train(training={"output_dir": ""}), "training.output_dir"),
    refused("an empty data path", train(data={"train": ""}), "data"),
    refused("no source", train(data={"train": []}), "'data.train'"),
    refused("a source that is a number", train(data={"train": [7]}), "'data.train.0'"),
    refused(
        "a source of weight 0", train(data={"train": [{"path": "rows.jsonl", "weight": 0}]}), "data.train.0.weight"
    ),
    refused(
        "a weight that is infinite", text(flow(data={"train": [{"path": "rows.jsonl", "weight": float("inf")}]})), *ONE
    ),
    refused(
        "weights so small that no row is left",
        train(data={"train": [{"path": "{place}/rows.jsonl", "weight": 1e-9}]}),
        "data.train",
        "weight",
    ),
    refused(
        "a weight that needs more rows than memory has",
        train(data={"train": [{"path": "{place}/rows.jsonl", "weight": 1e12}]}),
        "weight",
    ),
    refused("a column that no format has", train(data={"columns": {"question": "q"}}), "data.columns"),
    refused("a learning rate of text", train(training={"learning_rate": "high"}), "'training.learning_rate'", "high"),
    refused("a learning rate of 0", train(training={"learning_rate": 0}), "'training.learning_rate'"),
    refused(
        "a learning rate that is no number",
        text(flow(training={"output_dir": "run", "learning_rate": float("nan")})),
        *ONE,
        "learning_rate",
    ),
    refused("half a step", train(training={"max_steps": 1.5}), "'training.max_steps'", "1.5"),
    refused("a step of -1", train(training={"max_steps": -1}), "'training.max_steps'"),
    refused("a seed of 2^63", train(training={"seed": 2**63}), "'training.seed'"),
    refused("a date of 5,000 digits", train(date="9" * 5000), "'date'"),
    refused("a seed of 5,000 digits", besides(f"  seed: {'9' * 5000}\n"), *ONE),
    refused("a dropout of 1", train(lora={"dropout": 1.0}), "'lora.dropout'"),
    refused("a rank of 0", train(lora={"r": 0}), "'lora.r'"),
    refused("a rank of 10^8", train(lora={"r": 100_000_000}), "lora.r", seconds=5),
    refused("a rank of 10^30", train(lora={"r": 10**30}), "lora.r", seconds=5),
    refused(
        "a rank of 10^8 in a pattern",
        train(lora={"rank_pattern": {"q_proj": 100_000_000}}),
        "lora.rank_pattern",
        seconds=5,
    ),
    refused("a rank larger than the model, spelled as text", train(lora={"r": "sixteen"}), "'lora.r'", "sixteen"),
    refused("a target that no module has", train(lora={"target_modules": ["nothing"]}), "lora", "nothing"),
    refused("a target that is no regular expression", train(lora={"target_modules": "("}), "lora"),
    refused("targets of an empty list", train(lora={"target_modules": []}), "lora"),
    refused(
        "a module to save that is not there", train(lora={"modules_to_save": ["head"]}), "lora.modules_to_save", "head"
    ),
    refused(
        "a parameter that is not there", train(lora={"target_parameters": ["x.y"]}), "lora.target_parameters", "x.y"
    ),
    refused(
        "dropout on parameters", train(lora={"target_parameters": ["x"], "dropout": 0.1}), "lora.target_parameters"
    ),
    refused("4 bits without LoRA", train(model={"load_in_4bit": True}, lora=None), "model.load_in_4bit needs lora"),
    refused("16 bits for all weights", train(model={"dtype": "float16"}, lora=None), "model.dtype", "float16"),
    refused("a dtype that is none", train(model={"dtype": "int8"}), "'model.dtype'", "int8"),
    refused("an attention that is none", train(model={"attention": "flash"}), "'model.attention'", "flash"),
    refused("an optimizer that is none", train(training={"optim": "adam"}), "'training.optim'", "adam"),
    refused("a tracker that is none", train(training={"report_to": "paper"}), "'training.report_to"),
    refused(
        "a tracker that is not installed", train(training={"report_to": "clearml"}), "training.report_to", "clearml"
    ),
    refused(
        "a signal that cannot be caught",
        train(training={"preempt_signal": "KILL"}),
        "training.preempt_signal",
        "SIGKILL",
    ),
    refused(
        "a signal that is none", train(training={"preempt_signal": ["HELLO"]}), "training.preempt_signal", "SIGHELLO"
    ),
    refused("packs smaller than turns", train(sequence={"max_tokens": 10}), "max_tokens (10)", "max_length"),
    refused("a length of 0", train(sequence={"max_length": 0}), "'sequence.max_length'"),
    refused("a length that every turn exceeds", train(sequence={"max_length": 5}), "data.train", "max_length (5)"),
    refused(
        "a length that is an error",
        train(sequence={"max_length": 20, "overlong": "error"}),
        "rows.jsonl, line",
        "max_length (20)",
    ),
    refused(
        "truncated to nothing",
        train(sequence={"max_length": 5, "overlong": "truncate"}),
        "data.train",
        "max_length (5)",
    ),
    refused("a filter without rows", train(data={"filter": {"min_turns": 99}}), "data.filter"),
    refused("a filter upside down", train(data={"filter": {"min_turns": 3, "max_turns": 2}}), "min_turns (3)"),
    refused("held out: all", train(data={"eval": 1.0}), "eval_fraction"),
    refused(
        "held out: so much that nothing is left",
        train(data={"eval": 0.99}),
        "data.eval_fraction",
        "nothing to train on",
    ),
    refused("held out and named", train(data={"eval": "{place}/rows.jsonl", "eval_fraction": 0.5}), "eval_fraction"),
    refused("held out: true", train(data={"eval": True}), "data.eval"),
    refused(
        "a column to group by that no row has", train(data={"group_by": "question"}), "data.group_by", "'question'"
    ),
    refused("patience without evaluations", train(training={"early_stopping_patience": 2}), "early_stopping_patience"),
    refused(
        "the best of no evaluation",
        train(training={"load_best_at_end": True}),
        "training.load_best_at_end needs data.eval",
    ),
    refused(
        "generation without data to compare with", train(generation={"conversations": 3}), "generation.conversations"
    ),
    refused("an argument that is mtr's own", train(template={"messages": []}), "template", "messages"),
    refused("half a pair of tags", train(thinking={"open": "<think>"}), "thinking.close"),
    refused("tags of empty text", train(thinking={"open": "", "close": ""}), "thinking"),
    refused("tags that are one tag", train(thinking={"open": "<think>", "close": "<think>"}), "thinking"),
    refused("a day that no month has", train(date="2026-02-31"), "'date'"),
    refused(
        "a repository that is no name",
        train(training={"push_to_hub": "no spaces allowed/here"}),
        "training.push_to_hub",
    ),
    refused("true for a number of steps", train(training={"max_steps": True}), "'training.max_steps'"),
    refused("a pattern that is no text", train(model={"allow_missing": [7]}), "'model.allow_missing"),
    done(
        "a rate in the manner of Python",
        text(flow(lora={"r": 2}, training={"output_dir": "run", "max_steps": 1, "learning_rate": "1e-3"})),
    ),
    refused(
        "a seed that is 8 in YAML 1.1 and 10 in 1.2",
        lambda p: ["train", p.write("recipe.yaml", (p / "recipe.yaml").read_text() + "  seed: 010\n")],
        *ONE,
        "octal",
    ),
    done("anchors and merge keys", besides("loss: &a {weighting: turn}\nthinking: {<<: {history: respell}}\n")),
    either("a length beyond the model's positions", train(sequence={"max_length": 8192}), "1,024"),
    refused(
        "an audit of a recipe that is none",
        after(lambda p: p.write("bad.yaml", "model: ["), lambda p: ["audit", "bad.yaml"]),
        "bad.yaml",
    ),
    refused("an audit with a misspelt key", audit(training={"lerning_rate": 1}), "'training.lerning_rate'"),
)

ATTEMPTS = (*FILES, *KEYS)
