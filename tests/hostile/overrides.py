"""Overrides `key=value`, and the options and arguments of every command."""

from __future__ import annotations

import functools

from support.hostile import Prepare, audit, command, done, inspect, refused, train


def plainly(*arguments: object) -> Prepare:
    """These arguments alone."""
    return lambda place: arguments


verify = functools.partial(command, "verify")
bench = functools.partial(command, "bench")

OVERRIDES = (
    refused("no value", train("training.max_steps"), "'training.max_steps'", "section.key=value"),
    refused("no key", train("=1"), "'=1'", "section.key=value"),
    refused("a key between two dots", train("training..max_steps=1"), "training..max_steps=1"),
    refused("a dot at the end", train("training.=1"), "'training.=1'"),
    refused("an empty argument", train(""), "section.key=value"),
    refused("a section instead of a key", train("training=5"), "'training'", "mapping"),
    refused("a section taken away", train("data=null"), "'data'"),
    refused("a misspelt key", train("training.max_stepz=1"), "'training.max_stepz'", "'max_steps'"),
    refused("keys below a plain value", train("date.day=1"), "date.day=1", "plain value"),
    refused("an index out of range", train("data.train.7.weight=1"), "data.train.7.weight=1", "'7'"),
    refused("an index below 0", train("data.train.-1.weight=1"), "data.train.-1.weight=1", "'-1'"),
    refused("an index that is a power of two", train("data.train.².weight=1"), "data.train.².weight=1"),
    refused("an index in the digits of another script", train("data.train.٧.weight=1"), "data.train.٧.weight=1"),
    refused("a name for an index", train("data.train.first=x"), "data.train.first=x", "'first'"),
    refused("a value that is no YAML", train("lora.target_modules=[q_proj"), "lora.target_modules=[q_proj", "YAML"),
    refused("a value with duplicate keys", train("template={a: 1, a: 2}"), "template={a: 1, a: 2}"),
    refused("a value that runs code", train("template=!!python/object/apply:os.system [ls]"), "template=", "YAML"),
    refused("a value of 5,000 lists in each other", train(f"template={'{a: ' * 5000}{'}' * 5000}"), "template="),
    refused("a value that contains itself", train("template=&a {x: *a}"), "template"),
    refused("a value in another type", train("training.seed=[1]"), "'training.seed'"),
    refused("a value taken away that is needed", train("model.name_or_path="), "'model.name_or_path'"),
    refused("escape codes", train("\x1b[31mmodel=1"), "unknown key", "[31mmodel"),
    refused("two lines", train("one\ntwo"), "two", "section.key=value"),
    refused("half a surrogate pair", train("template={a: \udc80}"), "template"),
    refused("a key of 100,000 characters", train("k" * 100_000 + "=1"), "unknown key"),
    refused("5,000 keys in each other", train(".".join(["template"] * 5000) + "=1"), "template"),
    refused(
        "the last of 300 overrides is wrong", train(*[f"training.seed={i}" for i in range(299)], "seed=1"), "'seed'"
    ),
    refused("an override before the recipe", plainly("train", "training.seed=1", "recipe.yaml"), "training.seed=1"),
    refused("an option as an override", plainly("train", "recipe.yaml", "resume=true"), "'resume'"),
)

OPTIONS = (
    refused("a command that is none", plainly("tarin", "recipe.yaml"), "tarin"),
    refused("no recipe", plainly("train"), "RECIPE"),
    refused("an option that is none", train("--fast"), "--fast"),
    refused("an option misspelt", train("--resum"), "--resum"),
    refused("to continue and to replace", train("--resume", "--overwrite"), "--resume", "--overwrite"),
    refused("no process", train("--num-processes", 0), "--num-processes"),
    refused("processes in words", train("--num-processes", "two"), "--num-processes"),
    refused("processes of a recipe that is none", plainly("train", "none.yaml", "--num-processes", 2), "none.yaml"),
    refused("processes of a wrong key", train("--num-processes", 2, "training.max_stepz=1"), "training.max_stepz"),
    refused("a row before the first", inspect("--index", -1), "--index"),
    refused("a row after the last", inspect("--index", 6), "6 rows"),
    refused("a row after the last of 2^63", inspect("--index", 2**63), "6 rows"),
    refused("a row in words", inspect("--index", "first"), "--index"),
    refused("inspect: no such file", inspect(data={"train": "{place}/none.jsonl"}), "none.jsonl"),
    refused("inspect: no such model", inspect(model={"name_or_path": "{place}/none"}), "model.name_or_path", "none"),
    refused("verify: no conversation", verify("--conversations", 0), "--conversations"),
    refused("verify: a dtype that is none", verify("--dtype", "int8"), "--dtype", "int8"),
    refused("verify: an attention that is none", verify("--attention", "flash"), "--attention", "flash"),
    refused("verify: a folder for the JSON", verify("--json", "home", "--conversations", 1), "--json", "home"),
    refused("verify: no turn to train", verify(sequence={"max_length": 5}), "data.train", "max_length (5)"),
    done(
        "verify: the JSON into a new folder",
        verify("--json=new/out.json", "--conversations", 1),
        writes=("new",),
    ),
    refused("bench: no repeat", bench("--repeats", 0), "--repeats"),
    refused("bench: turns in words", bench("--sweep", "--turns", "two"), "--turns", "two"),
    refused("bench: no turn", bench("--sweep", "--turns", "0"), "--turns"),
    refused("bench: turns with a gap", bench("--sweep", "--turns", "2,,4"), "--turns", "2,,4"),
    refused("bench: no turns at all", bench("--sweep", "--turns", ""), "--turns"),
    refused("bench: thinking of less than nothing", bench("--sweep", "--thinking=-1"), "--thinking"),
    refused("bench: thinking in superscript", bench("--sweep", "--thinking", "²"), "--thinking"),
    refused("bench: messages without words", bench("--sweep", "--words", 0, 5), "--words"),
    refused("bench: a plot in Word", bench("--plot", "times.docx"), "--plot", "times.docx"),
    refused("bench: another trainer that nobody knows", bench("--vs", "axolotl"), "--vs", "axolotl"),
    refused("bench: an attention that is none", bench("--attention", "flash"), "--attention", "flash"),
    refused("bench: a folder for the JSON", bench("--json", "home", "--repeats", 1, "--no-padded"), "--json", "home"),
    refused("audit: fewer than no rows", audit("--rows", -1), "--rows"),
    refused("audit: a folder that is not there", plainly("audit", "./none"), "none"),
    refused("audit: an empty name", plainly("audit", ""), "model.name_or_path"),
    refused("audit: a folder without a tokenizer", plainly("audit", "home"), "home"),
    refused("audit: a file that is no recipe", plainly("audit", "rows.jsonl"), "rows.jsonl"),
    refused(
        "audit: a name of the Hub that is none", plainly("audit", "no spaces/allowed here"), "no spaces/allowed here"
    ),
    refused("audit: an override of data without data", plainly("audit", "home", "data.train=x", "modle=1"), "'modle'"),
    refused("audit: the rows are not there", audit(data={"train": "{place}/none.jsonl"}), "none.jsonl"),
    refused("a data path with a letter too few", train(data={"train": "{place}/row.jsonl"}), "row.jsonl"),
    refused("a relative data path that is nowhere", train(data={"train": "data/rows.jsonl"}), "data/rows.jsonl"),
    refused("evaluation on a file that is not there", train(data={"eval": "{place}/none.jsonl"}), "none.jsonl"),
    refused("a glob that matches nothing", train(data={"train": "{place}/*.parquet"}), "*.parquet"),
    refused("a model's folder that is not there", train(model={"name_or_path": "{place}/none"}), "model.name_or_path"),
    refused("a file for the model", train(model={"name_or_path": "{place}/rows.jsonl"}), "model.name_or_path"),
    refused("a model of the Hub without a network", train(model={"name_or_path": "nobody/nothing"}), "nobody/nothing"),
    refused("data of the Hub without a network", train(data={"train": "nobody/nothing"}), "nobody/nothing"),
    refused("a name with a slash too many", train(model={"name_or_path": "a/b/c"}), "model.name_or_path", "a/b/c"),
    refused("a model's name in two lines", train(model={"name_or_path": "a\nb"}), "model.name_or_path"),
    done("the version", plainly("--version"), "mtr"),
    done("help beside nonsense", plainly("train", "--help", "nonsense"), "--resume"),
)


ATTEMPTS = (*OVERRIDES, *OPTIONS)
