"""`report` and `chat`: runs that are damaged, and say what would steer a terminal or a page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from support.hostile import Place, Prepare, done, refused

from hostile.commands import CACHES, EVIL, SLASHLESS, given, holds_no_markup, linked

# --- report -----------------------------------------------------------------------------------------------------------


def report(*arguments: object, run: Callable[[Place], object] | None = None) -> Prepare:
    """Of a finished run, after something was done to the place."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        if run:
            run(place)
        return ["report", *(arguments or ("run",))]

    return prepare


def file(name: str, content: str | bytes) -> Callable[[Place], object]:
    return lambda place: place.write(f"run/{name}", content)


def special(name: str, make: Callable[[Path], object]) -> Callable[[Place], object]:
    def change(place: Place) -> None:
        (place.run / name).unlink()
        make(place.run / name)

    return change


def evil_run(place: Place) -> None:
    """Every file of a run says what would steer."""
    place.write("run/recipe.yaml", yaml.safe_dump({"training": {EVIL: EVIL}, "model": EVIL, EVIL: {EVIL: [EVIL]}}))
    environment = {"packages": {EVIL: EVIL}, "strategy": {"taken": EVIL, "reason": EVIL}, "device": EVIL}
    place.write("run/environment.json", json.dumps({**environment, "accepted_changes": [{"changes": [EVIL]}]}))
    totals = {"untrained_turns": {EVIL: 3}, "turns": 2}
    lines = [{"step": 1, "loss": 1, "totals": totals, "skipped": EVIL}, {"step": 1, "eval_loss": 1}]
    place.write("run/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    said = {"turn": 0, "conversation": EVIL, "thinking": EVIL, "response": EVIL, "reference": EVIL, "asked": EVIL}
    place.write("run/generations.jsonl", "".join(json.dumps({**said, "step": step}) + "\n" for step in (0, 3)))
    place.write("run/rejects.jsonl", json.dumps({"reason": EVIL}) + "\n")
    place.run.rename(place / SLASHLESS)


def odd_checkpoints(place: Place) -> None:
    (place.run / "adapter_model.safetensors").unlink()
    for name in ("checkpoint-x9", "checkpoint--3", f"checkpoint-{'9' * 99}"):
        (place.run / name).mkdir()
    (place.run / "checkpoint-8").symlink_to("nowhere")
    (place.run / "checkpoint-7").write_text("")


def metrics(*lines: str) -> Callable[[Place], object]:
    return file("metrics.jsonl", "".join(f"{line}\n" for line in lines))


HUGE = '{"step": 1, "loss": 1e308, "seconds": 1e308, "num_tokens": 1e308, "mfu": 1e308, "total_seconds": 1e308}'
RUNS = {"writes": ("run", "o.html", "o.png", SLASHLESS, *CACHES)}
FILES = ("mtr-run.json", "environment.json", "metrics.jsonl", "recipe.yaml")
REPORT = (
    *(
        refused(f"report: {name} is {what}", report(run=file(name, content)), name)
        for name in FILES
        for what, content in (
            ("a number", "7\n"),
            ("cut", '{"a": [\n'),
            ("deep", "[" * 5_000 + "\n"),
            ("bytes", b"\xff\xfe\0\n"),
        )
    ),
    *(refused(f"report: {name} is a pipe", report(run=special(name, os.mkfifo)), "run", seconds=3) for name in FILES),
    *(
        done(f"report: {name} is damaged", report(run=file(name, b'{"a": [\n7\n\xff\n' + b"[" * 5_000)), **RUNS)
        for name in ("generations.jsonl", "rejects.jsonl", ".mtr-lock", "checkpoint-3/training_state.json")
    ),
    *(
        done(f"report: {name} is gone", report(run=special(name, lambda path: None)), **RUNS)
        for name in ("environment.json", "metrics.jsonl", "recipe.yaml")
    ),
    *(
        done(
            f"report: a recipe with {epochs} epochs",
            report(run=file("recipe.yaml", f"training: {{num_train_epochs: {epochs}}}")),
            **RUNS,
        )
        for epochs in (".nan", ".inf", "1.0e+308", "-3", "[x]")
    ),
    done("report: a recipe of lists", report(run=file("recipe.yaml", "training: [1]\nmodel: 7\ndata: x\n")), **RUNS),
    done(
        "report: changes that are none",
        report(run=file("environment.json", '{"accepted_changes": [1, {"changes": 7}]}')),
        **RUNS,
    ),
    done(
        "report: numbers that overflow",
        report("run", "--html", "o.html", run=metrics(HUGE, HUGE.replace("1,", "2,", 1))),
        **RUNS,
    ),
    done(
        "report: losses that are not finite",
        report(
            "run",
            "--png",
            "o.png",
            run=metrics('{"step": 1, "loss": -1e308}', '{"step": 2, "loss": Infinity}', '{"step": 3, "loss": 1e308}'),
        ),
        **RUNS,
    ),
    done("report: texts that steer", report(SLASHLESS, run=evil_run), **RUNS),
    done("report: texts that steer: JSON", report(SLASHLESS, "--json", run=evil_run), **RUNS),
    done(
        "report: texts that steer: a page",
        report(SLASHLESS, "--html", "o.html", run=evil_run),
        holds=holds_no_markup("o.html"),
        **RUNS,
    ),
    done("report: folders that are no checkpoints", report(run=odd_checkpoints), **RUNS),
    done(
        "report: formulas in a name",
        report("$x_{y^$", "--png", "o.png", run=lambda p: p.run.rename(p / "$x_{y^$")),
        writes=("$x_{y^$", *RUNS["writes"]),
    ),
    done("report: the same run by two names", report("run", "l", run=linked("l", "run")), **RUNS),
    refused("report: no such run", report("nope"), "nope", "no such folder"),
    refused("report: a name that is too long", report("x" * 5000), "no such folder"),
    refused("report: a checkpoint", report("run/checkpoint-1"), "name the run itself"),
    refused("report: a file", report("rows.jsonl"), "rows.jsonl", "a file"),
    refused("report: over the run's metrics", report("run", "--html", "run/metrics.jsonl"), "--html", ".html"),
    refused(
        "report: over the run's metrics by a link",
        report("run", "--html", "o.html", run=linked("o.html", "run/metrics.jsonl")),
        "--html",
        "a link to",
    ),
    refused(
        "report: over the run's weights by a link",
        report("run", "--png", "o.png", run=linked("o.png", "run/adapter_model.safetensors")),
        "--png",
        "a link to",
    ),
    done(
        "report: a page in the run, again",
        report("run", "--html", "run/r.html", run=file("r.html", "old")),
        writes=("run/r.html",),
    ),
)


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(*arguments: object, run: Callable[[Place], object] | None = None, tokens: int = 4) -> Prepare:
    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        if run:
            run(place)
        return ["chat", *arguments, "--prompt", "Paul has 3 nuts.", "--max-new-tokens", tokens]

    return prepare


def drawn(**keys: object) -> Callable[[Place], object]:
    return lambda place: place.write("base/generation_config.json", json.dumps({"do_sample": True, **keys}))


ADAPTER = "adapter_config.json"
CHAT = (
    refused("chat: no such folder", given("chat", "nope"), "nope"),
    refused("chat: a name that is too long", given("chat", "x" * 5000), "no such folder"),
    refused("chat: a file", given("chat", "rows.jsonl"), "rows.jsonl", "a file"),
    refused("chat: a folder of something else", given("chat", "home"), "home", "adapter_config.json"),
    refused("chat: a temperature that is no number", given("chat", "run", "--temperature", "nan"), "--temperature"),
    refused("chat: a top-p of nothing", given("chat", "run", "--top-p", 0), "--top-p"),
    refused("chat: a seed beyond all numbers", given("chat", "run", "--seed", 10**40), "--seed"),
    refused("chat: no base to compare with", chat("base", "--compare"), "--compare"),
    refused("chat: a config that is none", chat("run", run=file(ADAPTER, "[]")), ADAPTER),
    refused("chat: a config that is a pipe", chat("run", run=special(ADAPTER, os.mkfifo)), ADAPTER, seconds=3),
    refused(
        "chat: an adapter of another kind", chat("run", run=file(ADAPTER, '{"peft_type": "\\u001b[31m"}')), ADAPTER
    ),
    refused("chat: no base", chat("run", run=lambda p: shutil.rmtree(p / "base")), "base"),
    refused("chat: no weights", chat("run", run=lambda p: (p.run / "adapter_model.safetensors").unlink()), "run"),
    refused(
        "chat: weights that are cut", chat("run", run=file("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{")), "run"
    ),
    refused(
        "chat: a pickle",
        chat(
            "run", run=special("adapter_model.safetensors", lambda f: f.with_suffix(".bin").write_bytes(b"\x80\x04."))
        ),
        "run",
    ),
    refused("chat: a recipe that is damaged", chat("run", run=file("recipe.yaml", "x: [")), "recipe.yaml"),
    refused(
        "chat: a temperature of text", chat("run", run=drawn(temperature="x")), "generation_config.json", "temperature"
    ),
    refused(
        "chat: a temperature below nothing",
        chat("run", run=drawn(temperature=-5)),
        "generation_config.json",
        "temperature",
    ),
    refused(
        "chat: a template that refuses",
        chat("run", run=file("chat_template.jinja", "{{ raise_exception('\x1b[31m') }}")),
        "template",
    ),
    refused("chat: a prompt beyond the context", chat("run", "--prompt", "x " * 20_000), "context"),
    done("chat: texts that steer", chat("run", "--system", EVIL, "--json", "--prompt", EVIL), codes=(0, 2)),
)

ATTEMPTS = (*REPORT, *CHAT)
