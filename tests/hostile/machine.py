"""The machine: permissions, limits, signals, and other runs in the same folder."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from support.hostile import (
    Attempt,
    Place,
    Prepare,
    after,
    done,
    is_the_finished_run,
    refused,
    start,
    stopped,
    train,
    until,
    without_privileges,
)

from hostile.folders import again
from hostile.merging import merge
from hostile.weights import all_trained


def closed(*names: str, mode: int = 0, run: Prepare | None = None) -> Prepare:
    """These files or folders may not be used; then the command."""

    def prepare(place: Place) -> Sequence[object]:
        arguments = (run or train())(place)
        for name in names:
            (place / name).chmod(mode)
        return arguments

    return prepare


def own_model(place: Place) -> Sequence[object]:
    place.base()
    return train(model={"name_or_path": "{place}/base"})(place)


def forbidden(name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """Something that permissions forbid, to whoever runs the command."""
    return refused(name, prepare, *says, limits=without_privileges, **keys)


PERMISSIONS = (
    forbidden("a recipe that may not be read", closed("recipe.yaml"), "recipe.yaml"),
    forbidden("data that may not be read", closed("rows.jsonl"), "rows.jsonl"),
    forbidden(
        "a folder of data that may not be listed",
        closed("data", run=after(lambda p: (p / "data").mkdir(), data={"train": "{place}/data"})),
        "data",
    ),
    forbidden("a model that may not be listed", closed("base", run=own_model), "base"),
    forbidden("weights that may not be read", closed("base/model.safetensors", run=own_model), "base"),
    forbidden("a config that may not be read", closed("base/config.json", run=own_model), "base"),
    forbidden("a tokenizer that may not be read", closed("base/tokenizer.json", run=own_model), "base"),
    forbidden("a template that may not be read", closed("base/chat_template.jinja", run=own_model), "base"),
    forbidden("a folder in which nothing may be made", closed(".", mode=0o555), "run", codes=(2, 3)),
    forbidden(
        "a folder of the run that may not be written",
        closed("run", mode=0o555, run=after(lambda p: p.run.mkdir())),
        "run",
        codes=(2, 3),
    ),
    forbidden(
        "a folder of the run that may not be listed",
        closed("run", mode=0o333, run=after(lambda p: p.run.mkdir())),
        "run",
        codes=(2, 3),
    ),
    forbidden(
        "a run that may not be written, --resume", closed("run", mode=0o555, run=again("--resume")), "run", codes=(2, 3)
    ),
    forbidden(
        "a run that may not be written, --overwrite",
        closed("run", mode=0o555, run=again("--overwrite")),
        "run",
        codes=(2, 3),
    ),
    forbidden(
        "a checkpoint that may not be listed",
        closed("run/checkpoint-3", run=again("--resume")),
        "checkpoint-3",
        codes=(0, 2),
        writes=("run",),
    ),
    forbidden("a marker that may not be read", closed("run/mtr-run.json", run=again("--resume")), "mtr-run.json"),
    forbidden("a saved recipe that may not be read", closed("run/recipe.yaml", run=again("--resume")), "recipe.yaml"),
    forbidden(
        "metrics that may not be written",
        closed("run/metrics.jsonl", mode=0o444, run=again("--resume", "training.max_steps=4")),
        "metrics.jsonl",
        codes=(2, 3),
        writes=("run",),
    ),
    forbidden(
        "merge: a run that may not be written",
        closed("run", mode=0o555, run=merge()),
        "run",
        codes=(2, 3),
    ),
    forbidden(
        "verify: the JSON where nothing may be made",
        closed(
            "home", mode=0o555, run=lambda p: ["verify", "recipe.yaml", "--conversations", 1, "--json", "home/out.json"]
        ),
        "--json",
        "home/out.json",
    ),
)


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def at_most(size: int, name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """No file may be larger than so many bytes: what a full disk is like at one file or another."""
    keys = {"codes": (3,), **keys}
    return stopped(name, prepare, *says, limits=limit(resource.RLIMIT_FSIZE, size), **keys)


LIMITS = (
    at_most(0, "no byte may be written", train(), "run"),
    at_most(200, "the first files of the run do not fit", train(), "run"),
    at_most(2_000, "no checkpoint fits", train(), "run"),
    at_most(100_000, "the weights of a checkpoint do not fit", train(), "checkpoint-1"),
    at_most(20_000, "the result does not fit", train(training={"save_steps": None}), "run"),
    at_most(
        100_000, "the next checkpoint of a run does not fit", again("--resume", "training.max_steps=4"), "checkpoint-4"
    ),
    at_most(100, "nothing fits when a run goes on", again("--resume", "training.max_steps=4"), "run"),
    at_most(100, "nothing fits when a run is replaced", again("--overwrite"), "run"),
)


def once_started(signal_number: int, *more: int) -> Callable[[Place, int], None]:
    """A signal after the first step."""

    def meanwhile(place: Place, child: int) -> None:
        until(lambda: (place.run / "metrics.jsonl").exists())
        for number in (signal_number, *more):
            os.kill(child, number)
            time.sleep(0.01)

    return meanwhile


def long_run(**training: Any) -> Prepare:
    return train(training={"max_steps": 100_000, "save_steps": None, **training})


SIGNALS = (
    Attempt("SIGTERM", long_run(), (), codes=(143,), writes=("run",), meanwhile=once_started(signal.SIGTERM)),
    Attempt("SIGINT", long_run(), (), codes=(130,), writes=("run",), meanwhile=once_started(signal.SIGINT)),
    Attempt(
        "a signal that the recipe names",
        long_run(preempt_signal="USR1"),
        (),
        codes=(138,),
        writes=("run",),
        meanwhile=once_started(signal.SIGUSR1),
    ),
    Attempt(
        "SIGTERM twice",
        long_run(),
        (),
        codes=(143,),
        writes=("run",),
        meanwhile=once_started(signal.SIGTERM, signal.SIGTERM),
    ),
    Attempt("SIGKILL", long_run(), (), codes=(137,), writes=("run",), meanwhile=once_started(signal.SIGKILL)),
)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def beside(*arguments: object, run: Prepare | None = None) -> Prepare:
    """Another run is at work in the folder."""

    def prepare(place: Place) -> Sequence[object]:
        first = [str(argument) for argument in long_run()(place)]
        other = start(place, first)
        place.cleanups.append(lambda: end(other))
        assert until(lambda: (place.run / "metrics.jsonl").exists())
        os.kill(other, signal.SIGSTOP)  # so that nothing in its folder changes by itself
        return run(place) if run else ["train", "recipe.yaml", *arguments]

    return prepare


def after_a_kill(*arguments: object) -> Prepare:
    """A run was killed after a step, and its lock is still there."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        for step in (2, 3):
            os.rename(place.run / f"checkpoint-{step}", place / f"home/checkpoint-{step}")
        other = start(place, ["train", "recipe.yaml", "--resume", "training.max_steps=100000"])
        size = (place.run / "metrics.jsonl").stat().st_size
        until(lambda: (place.run / "metrics.jsonl").stat().st_size != size and (place.run / "checkpoint-2").exists())
        end(other)
        return ["train", "recipe.yaml", *arguments]

    return prepare


def foreign_lock(**changes: Any) -> Callable[[Place], object]:
    """A lock of a run on another machine."""
    held = {"host": "elsewhere", "boot": "another", "pid": 1, "started": "1", "since": "2026-01-31 00:00:00 +0000"}
    return lambda place: place.write("run/.mtr-lock", json.dumps({**held, **changes}))


def old_lock(place: Place) -> None:
    foreign_lock()(place)
    os.utime(place.run / ".mtr-lock", (0, 0))


RUNS = (
    refused("another run is at work", beside(), "run"),
    refused("another run is at work, --overwrite", beside("--overwrite"), "run", "another run"),
    refused("another run is at work, --resume", beside("--resume"), "run", "another run"),
    refused(
        "another run is at work, by another name of the folder",
        beside("--overwrite", "training.output_dir=home/../run"),
        "another run",
    ),
    refused("a run on another machine, --resume", again("--resume", change=foreign_lock()), "elsewhere", "another run"),
    refused(
        "a run on another machine, --overwrite", again("--overwrite", change=foreign_lock()), "elsewhere", "another run"
    ),
    done("a lock that has not been touched for years", again("--resume", change=old_lock), holds=is_the_finished_run),
    done("a run that was killed", after_a_kill("--resume"), holds=all_trained),
    done("a run that was killed is replaced", after_a_kill("--overwrite"), holds=is_the_finished_run),
)

ATTEMPTS = (*PERMISSIONS, *LIMITS, *SIGNALS, *RUNS)
