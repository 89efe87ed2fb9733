"""`init`, `inspect` and `plan`: options, files that would be destroyed, texts that steer, rows that are nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import yaml
from support.hostile import Attempt, Ended, Place, Prepare, after, done, either, in_turn, inspect, refused

EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J[bold]b[/bold][/]<script>alert(1)</script></title>\u202egnp.exe"
SLASHLESS = "\x1b[31m\x9b2J[bold][nothing]<b>\u202egnp: {#"
"""As a part of a path."""
CACHES = ("home/.cache", "home/.config")
"""Of matplotlib, which writes down which fonts there are."""
PLAN = "plan", "recipe.yaml"
LOOPS = "{% for i in range(10**12) %}x{% endfor %}"


def given(*arguments: object) -> Prepare:
    return lambda place: arguments


def evil_rows(place: Place) -> None:
    said = [("system", EVIL), ("user", EVIL), ("assistant", f"<think>{EVIL}</think>{EVIL}"), ("user", EVIL)]
    place.rows({"messages": [{"role": role, "content": text} for role, text in (*said, ("assistant", EVIL))]})


def evil_data(place: Place) -> None:
    """Rows in a file whose name steers."""
    shutil.copy(place / "rows.jsonl", place / f"{SLASHLESS}.jsonl")
    place.recipe(data={"train": str(place / f"{SLASHLESS}.jsonl")})


def rows(*texts: str) -> Callable[[Place], object]:
    return lambda place: place.rows(*texts)


def linked(name: str, target: str) -> Callable[[Place], object]:
    return lambda place: (place / name).symlink_to(target)


def same_file(name: str, target: str) -> Callable[[Place], object]:
    return lambda place: os.link(place / target, place / name)


def own_base(place: Place, *without: str, **config: Any) -> None:
    place.base(without=without, **config)
    place.recipe(model={"name_or_path": str(place / "base")})


def configless(place: Place) -> None:
    """Nothing is estimated then, which takes most of the time."""
    own_base(place, "config.json")


def holds_no_markup(name: str) -> Callable[[Place, Ended], None]:
    def holds(place: Place, _: Ended) -> None:
        text = (place / name).read_text()
        assert "alert(1)" in text, "the text is not there"
        assert "<script>alert" not in text, "it would run"
        assert not set("\x1b\x9b\u202e") & set(text), "it would steer"

    return holds


# --- files that would be destroyed ------------------------------------------------------------------------------------


def destroys(name: str, change: Callable[[Place], object] | None, *arguments: object, says: str = "") -> Attempt:
    """An output that is an input; the last option is at fault."""
    option = str(arguments[-2])
    return refused(f"over {name}", after(change or (lambda _: None), given(*arguments)), option, says or "destroyed")


OVER = (
    destroys("the data: a page", None, "inspect", "recipe.yaml", "--html", "rows.jsonl", says=".html"),
    destroys("the recipe: a picture", None, "inspect", "recipe.yaml", "--png", "recipe.yaml", says=".png"),
    destroys(
        "the data by a link: a page",
        linked("o.html", "rows.jsonl"),
        "inspect",
        "recipe.yaml",
        "--html",
        "o.html",
        says="a link to",
    ),
    destroys(
        "the data by a link: a picture", linked("o.png", "rows.jsonl"), *PLAN, "--plot", "o.png", says="a link to"
    ),
    destroys("the data by a hard link", same_file("o.png", "rows.jsonl"), "inspect", "recipe.yaml", "--png", "o.png"),
    destroys("the data: JSON", None, *PLAN, "--json", "./home/../rows.jsonl"),
    destroys(
        "one of many files of data",
        lambda p: p.recipe(data={"train": f"{p.folder}/*.jsonl"}),
        *PLAN,
        "--json",
        "rows.jsonl",
    ),
    destroys("the recipe: JSON", linked("o.json", "recipe.yaml"), *PLAN, "--json", "o.json"),
    destroys("the model: JSON", own_base, *PLAN, "--json", "base/config.json"),
    destroys("the run: JSON", lambda p: p.write("run/metrics.jsonl", ""), *PLAN, "--json", "run/metrics.jsonl"),
    destroys("the data: verify", None, "verify", "recipe.yaml", "--json", "rows.jsonl"),
    destroys("the data: bench", None, "bench", "recipe.yaml", "--json", "rows.jsonl"),
    refused("over a recipe", given("init", "--model", "m", "--data", "d", "--output", "recipe.yaml"), "--force"),
    refused(
        "over a link to nothing",
        after(linked("o.html", "nowhere.html"), inspect("--html", "o.html")),
        "link to nothing",
    ),
    refused("over a link to itself", after(linked("o.html", "o.html"), inspect("--html", "o.html")), "--html"),
    refused("over a pipe", after(lambda p: os.mkfifo(p / "o.html"), inspect("--html", "o.html")), "no regular file"),
    refused("over a folder", inspect("--html", "{place}"), "--html", "it is a folder"),
    refused("over the root of all", given(*PLAN, "--json", "/"), "--json", "it is a folder"),
    refused("below a file", inspect("--html", "rows.jsonl/o.html"), "--html", "not a folder"),
    refused("a page whose name is too long", inspect("--html", "x" * 300 + ".html"), "--html", "too long"),
    refused("a page with NUL in its name", inspect("--html", "a\0b.html"), "--html", "null byte"),
    refused("a page without a name", inspect("--html", ""), "--html", "it is a folder"),
    done(
        "a page through a link to a page",
        after(
            in_turn(linked("o.html", "real.html"), lambda p: p.write("real.html", "old")), inspect("--html", "o.html")
        ),
        writes=("real.html",),
    ),
)


# --- init -------------------------------------------------------------------------------------------------------------


def init(*arguments: object, output: str = "new.yaml", data: str = "rows.jsonl", model: str = "base") -> Prepare:
    return given("init", "--model", model, "--data", data, "--gpu", "cpu", "--output", output, *arguments)


def new_recipe_names(data: str, output: str = "new.yaml") -> Callable[[Place, Ended], None]:
    def holds(place: Place, _: Ended) -> None:
        text = (place / output).read_text()
        assert yaml.safe_load(text)["data"]["train"] == data, text
        assert not set("\x1b\x9b\u202e\x85") & set(text), "the text would steer"

    return holds


NEW = {"writes": ("new.yaml",)}
INIT = (
    refused("init: no model", given("init", "--output", "new.yaml"), "--model and --data"),
    refused("init: no data", given("init", "--model", "base", "--output", "new.yaml"), "--data"),
    refused(
        "init: a GPU that is none",
        given("init", "--model", "m", "--data", "d", "--gpu", EVIL, "--output", "new.yaml"),
        "GPU",
    ),
    refused("init: a method that is none", init("--method", "EVIL"), "--method"),
    refused("init: a model that is a file", init(model="rows.jsonl"), "model.name_or_path"),
    refused("init: a folder without data", after(configless, init(data="home")), "home", "no data file"),
    refused("init: data that is a recipe", after(configless, init(data="recipe.yaml")), "recipe.yaml", "file type"),
    refused("init: an empty file", after(in_turn(configless, rows()), init()), "rows.jsonl"),
    refused("init: over the data", after(configless, init("--force", output="rows.jsonl")), "--output", "destroyed"),
    refused(
        "init: over the data by another name",
        after(in_turn(configless, same_file("o.yaml", "rows.jsonl")), init("--force", output="o.yaml")),
        "--output",
        "destroyed",
    ),
    refused(
        "init: over the weights",
        after(configless, init("--force", output="base/model.safetensors")),
        "--output",
        "destroyed",
    ),
    refused("init: a NUL in the output", after(configless, init(output="a\0b")), "--output", "NUL"),
    refused(
        "init: a config that builds no model",
        after(lambda p: own_base(p, num_attention_heads=0), init()),
        "--model",
        "config.json",
    ),
    either("init: no positions", after(lambda p: own_base(p, max_position_embeddings=0), init()), "config.json", **NEW),
    done(
        "init: rows that steer",
        after(in_turn(configless, evil_rows), init()),
        holds=new_recipe_names("rows.jsonl"),
        **NEW,
    ),
    done(
        "init: data whose name steers",
        after(in_turn(evil_data, configless), init(data=f"{SLASHLESS}.jsonl")),
        holds=new_recipe_names(f"{SLASHLESS}.jsonl"),
        **NEW,
    ),
    done("init: a pattern", after(configless, init(data="*.jsonl")), holds=new_recipe_names("*.jsonl"), **NEW),
    done(
        "init: a recipe whose name steers",
        after(configless, init(output="\x1b[31m[b].yaml")),
        writes=("\x1b[31m[b].yaml",),
    ),
    refused(
        "init: rows that are nothing",
        after(in_turn(configless, rows("{}", "null", "[]", "x")), init()),
        "nothing can be trained of the 4 rows",
        "rows.jsonl, line 1",
    ),
    refused(
        "init: a template that loops",
        after(in_turn(configless, lambda p: p.write("base/chat_template.jinja", LOOPS)), init()),
        "template",
    ),
)


# --- inspect and plan -------------------------------------------------------------------------------------------------

EMPTY = {"an empty file": rows(), "rows that are nothing": rows("{}", "null"), "damaged rows": rows('{"messages": [')}


def plan(*arguments: object) -> Prepare:
    return after(configless, given(*PLAN, *arguments))


SHOWN = (
    *(
        Attempt(
            f"inspect {' '.join(options)}: {name}",
            after(change, inspect(*options)),
            ("",),
            (0, 1, 2),
            writes=("o.html",),
        )
        for name, change in EMPTY.items()
        for options in ([], ["--turn", "0"], ["--random"], ["--untrained"], ["--all"], ["--html", "o.html"])
    ),
    refused("a turn that is not there", inspect("--turn", 99), "turn", "99"),
    refused("a row beyond all numbers", inspect("--index", 10**30), "the data has 6 rows"),
    refused("no rows", inspect("--rows", 0), "--rows"),
    refused("two orders", inspect("--random", "--longest"), "--random and --longest"),
    refused("a row by number and by chance", inspect("--random", "--index", 0), "--index and --random"),
    refused("a seed of nothing", inspect("--seed", 3), "--seed"),
    refused("a turn of a page", inspect("--turn", 0, "--html", "o.html"), "--turn and --html"),
    refused("a picture of three rows", inspect("--rows", 3, "--png", "o.png"), "--png"),
    refused("a text to find that is none", inspect("--find", " "), "--find"),
    refused(
        "a picture of no turn",
        after(rows('{"messages": [{"role": "user", "content": "a"}]}'), inspect("--png", "o.png")),
        "row",
    ),
    *(
        done(f"rows that steer: inspect {' '.join(options)}", after(evil_rows, inspect(*options)))
        for options in ([], ["--turn", "1"], ["--json"], ["--all"], ["--find", "[/]"])
    ),
    done(
        "rows that steer: a page",
        after(evil_rows, inspect("--html", "o.html")),
        writes=("o.html",),
        holds=holds_no_markup("o.html"),
    ),
    done("rows that steer: a picture", after(evil_rows, inspect("--png", "o.png")), writes=("o.png", *CACHES)),
    done("rows that steer: plan", after(evil_rows, plan())),
    done("data whose name steers: inspect", after(evil_data, given("inspect", "recipe.yaml"))),
    done("data whose name steers: plan", after(evil_data, given(*PLAN, "--rows", 1))),
    done("a plan of rows that are nothing", after(rows("{}", "null"), plan("--json"))),
    refused("a plan of no rows", after(rows(), plan()), "rows.jsonl"),
    refused("a plan for no GPU", plan("--gpu", EVIL), "GPU"),
    refused("a plan for more GPUs than there are", plan("--num-gpus", 10**30), "--num-gpus"),
    refused("a price that is no number", plan("--price", "nan"), "--price"),
    refused("two prices for four GPUs", plan("--price", 1, "--price", 2), "--price"),
    refused("a plot of text", plan("--plot", "o.txt"), "--plot", ".png"),
    refused("more of schema than there is", given("schema", EVIL), "argument"),
    refused("more of doctor than there is", given("doctor", EVIL), "argument"),
)


ATTEMPTS = (*OVER, *INIT, *SHOWN)
