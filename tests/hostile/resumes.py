"""Runs that go on: damaged checkpoints and files, and inputs that are no longer what they were.

The end is either that of the run that nobody touched, bit for bit, or a refusal that says what is wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from support.hostile import Attempt, Ended, Place, Prepare, done, either, in_turn, is_the_finished_run, refused
from support.rows import conversation_row

Change = Callable[[Place], object]


def resumed(*changes: Change, arguments: Sequence[str] = ()) -> Prepare:
    """A finished run of three steps, changed, and told to go on."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        for change in changes:
            change(place)
        return ["train", "recipe.yaml", "--resume", *arguments]

    return prepare


def same(name: str, *changes: Change, says: str = "", arguments: Sequence[str] = ()) -> Attempt:
    """It goes on as if nothing had happened, and says what it passed over."""
    return done(name, resumed(*changes, arguments=arguments), says, holds=is_the_finished_run)


def told(name: str, *changes: Change, says: Sequence[str] = (), arguments: Sequence[str] = ()) -> Attempt:
    """It is refused, and says why."""
    return refused(name, resumed(*changes, arguments=arguments), *says)


def text(name: str, content: str | bytes) -> Change:
    return lambda place: place.write(f"run/{name}", content)


def gone(*names: str) -> Change:
    def change(place: Place) -> None:
        for name in names:
            path = place.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def flipped(name: str, at: float = 0.5) -> Change:
    """One bit of a file is another."""

    def change(place: Place) -> None:
        path = place.run / name
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return change


def cut(name: str, share: float = 0.5) -> Change:
    def change(place: Place) -> None:
        path = place.run / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def moved(name: str, to: str, copy: bool = False) -> Change:
    def change(place: Place) -> None:
        if copy:
            shutil.copytree(place.run / name, place.run / to)
        else:
            (place.run / name).rename(place.run / to)

    return change


def lines(change: Callable[[list[str]], list[str]], name: str = "metrics.jsonl") -> Change:
    def rewrite(place: Place) -> None:
        path = place.run / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return rewrite


def last_two_gone(place: Place) -> None:
    """So that only the first checkpoint is left, and two steps have to be done again."""
    gone("checkpoint-2", "checkpoint-3")(place)


def manifest(step: int, change: Callable[[dict[str, Any]], Any]) -> Change:
    def rewrite(place: Place) -> None:
        path = place.run / f"checkpoint-{step}" / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite


def link_outside(place: Place) -> None:
    (place.run / "checkpoint-3").rename(place / "home/checkpoint-3")
    (place.run / "checkpoint-3").symlink_to(place / "home/checkpoint-3")


def all_damaged(place: Place) -> None:
    for step in (1, 2, 3):
        cut(f"checkpoint-{step}/training_state.safetensors")(place)


DAMAGED = (
    same("nothing happened"),
    same("the last checkpoint is gone", gone("checkpoint-3")),
    same("two checkpoints are gone", last_two_gone),
    same("the result is gone", gone("adapter_model.safetensors", "adapter_config.json", "README.md")),
    *[
        same(
            f"the last manifest is {shown}", text("checkpoint-3/manifest.json", content), says="checkpoint-3 is damaged"
        )
        for shown, content in (
            ("empty", ""),
            ("{}", "{}"),
            ("[]", "[]"),
            ("null", "null"),
            ("torn", '{"a": '),
            ("binary", b"\xff\0\xfe"),
        )
    ],
    *[
        same(f"a bit of the last {what} is flipped", flipped(f"checkpoint-3/{what}"), says="checkpoint-3 is damaged")
        for what in ("training_state.safetensors", "training_state.json", "adapter_model.safetensors", "tokenizer.json")
    ],
    *[
        same(f"the last {what} is cut short", cut(f"checkpoint-3/{what}"), says="checkpoint-3 is damaged")
        for what in ("training_state.safetensors", "adapter_model.safetensors", "manifest.json")
    ],
    *[
        same(f"the last {what} is gone", gone(f"checkpoint-3/{what}"), says="checkpoint-3 is damaged")
        for what in ("training_state.safetensors", "training_state.json", "adapter_model.safetensors", "manifest.json")
    ],
    same("the manifest lists nothing", manifest(3, lambda held: {**held, "files": {}}), says="checkpoint-3 is damaged"),
    same("the manifest lists lists", manifest(3, lambda held: {**held, "files": []}), says="checkpoint-3 is damaged"),
    same(
        "the manifest lists no sums",
        manifest(3, lambda held: {**held, "files": {name: {} for name in held["files"]}}),
        says="checkpoint-3 is damaged",
    ),
    same(
        "the manifest lists a file above",
        manifest(3, lambda held: {**held, "files": {**held["files"], "../../rows.jsonl": {"bytes": 1, "sha256": ""}}}),
        says="checkpoint-3 is damaged",
    ),
    same(
        "the manifest is that of another step",
        lambda p: shutil.copy(p.run / "checkpoint-2/manifest.json", p.run / "checkpoint-3/manifest.json"),
        says="checkpoint-3 is damaged",
    ),
    same(
        "the state is that of another step",
        lambda p: shutil.copy(
            p.run / "checkpoint-2/training_state.safetensors", p.run / "checkpoint-3/training_state.safetensors"
        ),
        says="checkpoint-3 is damaged",
    ),
    same(
        "checkpoint-1 is called checkpoint-9 too", moved("checkpoint-1", "checkpoint-9", copy=True), says="checkpoint-9"
    ),
    same(
        "checkpoint-1 is called checkpoint-3",
        gone("checkpoint-3"),
        moved("checkpoint-1", "checkpoint-3", copy=True),
        says="checkpoint-3",
    ),
    same(
        "checkpoint-3 is called checkpoint-2",
        gone("checkpoint-2"),
        moved("checkpoint-3", "checkpoint-2"),
        says="checkpoint-2",
    ),
    same("checkpoint-3 is called checkpoint-03", moved("checkpoint-3", "checkpoint-03")),
    same("an empty checkpoint-9", lambda p: (p.run / "checkpoint-9").mkdir(), says="checkpoint-9"),
    same("a file called checkpoint-9", text("checkpoint-9", "x")),
    same("checkpoint-9 of 30 digits", lambda p: (p.run / f"checkpoint-{'9' * 30}").mkdir(), says="damaged"),
    same("a link to the checkpoint elsewhere", link_outside, says="checkpoint-3"),
    same(
        "half a checkpoint",
        in_turn(moved("checkpoint-3", ".checkpoint-3.partial"), gone(".checkpoint-3.partial/manifest.json")),
    ),
    same(
        "the first checkpoint is damaged too",
        flipped("checkpoint-3/training_state.json"),
        flipped("checkpoint-2/training_state.json"),
        says="checkpoint-2 is damaged",
    ),
    same("the last state is {}", text("checkpoint-3/training_state.json", "{}"), says="checkpoint-3 is damaged"),
    told("all checkpoints are damaged", all_damaged, says=("no good checkpoint", "checkpoint-1", "checkpoint-3")),
    told(
        "all manifests are gone",
        *[gone(f"checkpoint-{i}/manifest.json") for i in (1, 2, 3)],
        says=("no good checkpoint",),
    ),
    either(
        "all checkpoints are gone",
        resumed(gone("checkpoint-1", "checkpoint-2", "checkpoint-3")),
        "checkpoint",
        holds=is_the_finished_run,
    ),
    *[
        told(f"recipe.yaml is {shown}", text("recipe.yaml", content), says=("recipe.yaml",))
        for shown, content in (
            ("empty", ""),
            ("{}", "{}"),
            ("[]", "[]"),
            ("torn", "model: {"),
            ("binary", b"\xff\0\xfe"),
            ("another recipe's", "model: {name_or_path: x}"),
            ("5,000 brackets", "[" * 5000),
            ("code", "!!python/object/apply:os.system [ls]"),
        )
    ],
    told("recipe.yaml is gone", gone("recipe.yaml"), says=("recipe.yaml",)),
    told(
        "recipe.yaml is a folder", gone("recipe.yaml"), lambda p: (p.run / "recipe.yaml").mkdir(), says=("recipe.yaml",)
    ),
    same("a line of the metrics is cut short", cut("metrics.jsonl", 0.9), last_two_gone),
)


def says_that_metrics_are_missing(place: Place, ended: Ended) -> None:
    assert "metrics.jsonl" in ended.err, "nothing is said of the metrics"


METRICS = tuple(
    either(
        f"the metrics are {shown}", resumed(change, last_two_gone), "metrics.jsonl", holds=says_that_metrics_are_missing
    )
    for shown, change in {
        "gone": gone("metrics.jsonl"),
        "empty": text("metrics.jsonl", ""),
        "{}": text("metrics.jsonl", "{}\n"),
        "binary": text("metrics.jsonl", b"\xff\0\xfe" * 99),
        "without their first line": lines(lambda held: held[1:]),
        "those of lists": text("metrics.jsonl", "[1]\n[2]\n[3]\n"),
        "a folder": in_turn(gone("metrics.jsonl"), lambda p: (p.run / "metrics.jsonl").mkdir()),
    }.items()
)


def rows(change: Callable[[list[str]], list[str]]) -> Change:
    """The rows of the data are changed."""

    def rewrite(place: Place) -> None:
        path = place / "rows.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return rewrite


def weights(change: Callable[[dict[str, Any]], object]) -> Change:
    def rewrite(place: Place) -> None:
        path = place / "base/model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, {"format": "pt"})

    return rewrite


def one_value(held: dict[str, Any]) -> None:
    held["model.layers.2.mlp.up_proj.weight"][0, 0] += 1


def recipe(**sections: Any) -> Change:
    return lambda place: place.recipe(
        **{**sections, "model": {"name_or_path": str(place / "base"), **sections.get("model", {})}}
    )


def accepted(place: Place, _: Ended) -> None:
    found = [*place.run.glob("checkpoint-*/environment.json"), place.run / "environment.json"]
    assert any(json.loads(path.read_text()).get("accepted_changes") for path in found), "the change is not recorded"


GO_ON = ("training.max_steps=4",)
CHANGED = (
    told(
        "a row added",
        rows(lambda held: [*held, json.dumps(conversation_row()) + "\n"]),
        says=("data.train",),
        arguments=GO_ON,
    ),
    told("a row removed", rows(lambda held: held[:-1]), says=("data.train",), arguments=GO_ON),
    told("the first row removed", rows(lambda held: held[1:]), says=("data.train",), arguments=GO_ON),
    told("rows in another order", rows(lambda held: held[::-1]), says=("data.train",), arguments=GO_ON),
    told(
        "a word of a row is another",
        rows(lambda held: [held[0].replace("Ana", "Eva", 1), *held[1:]]),
        says=("data.train",),
        arguments=GO_ON,
    ),
    told(
        "a number in the last row is another",
        rows(lambda held: [*held[:-1], held[-1].replace("2", "3", 1)]),
        says=("data.train",),
        arguments=GO_ON,
    ),
    told(
        "a row is there twice", rows(lambda held: [held[0], held[0], *held[2:]]), says=("data.train",), arguments=GO_ON
    ),
    told("a row is broken", rows(lambda held: ["{\n", *held[1:]]), says=("rows.jsonl",), arguments=GO_ON),
    told("the data is gone", lambda p: (p / "rows.jsonl").unlink(), says=("rows.jsonl",)),
    told("the data is empty", rows(lambda held: []), says=("rows.jsonl",)),
    told(
        "other data",
        lambda p: p.rows(conversation_row(turns=5), conversation_row(turns=4), name="other.jsonl"),
        says=("data.train",),
        arguments=("data.train=other.jsonl",),
    ),
    told(
        "one more source",
        lambda p: p.rows(conversation_row(), name="other.jsonl"),
        says=("data.train",),
        arguments=("data.train=[rows.jsonl, other.jsonl]",),
    ),
    told("a value of the weights is another", weights(one_value), says=("weights",), arguments=GO_ON),
    told("the weights are gone", lambda p: (p / "base/model.safetensors").unlink(), says=("base",)),
    told("the model is gone", lambda p: shutil.rmtree(p / "base"), says=("model.name_or_path",)),
    told(
        "the template is another",
        lambda p: p.write(
            "base/chat_template.jinja", (p / "base/chat_template.jinja").read_text().replace("\\n\\n", "\\n")
        ),
        says=("template",),
        arguments=GO_ON,
    ),
    told(
        "the template prints something first",
        lambda p: p.write("base/chat_template.jinja", "Hello" + (p / "base/chat_template.jinja").read_text()),
        says=("template",),
        arguments=GO_ON,
    ),
    told(
        "another token ends a turn",
        lambda p: p.write("base/generation_config.json", '{"eos_token_id": 5}'),
        says=("stops",),
        arguments=GO_ON,
    ),
    *[
        told(f"another {key}", says=(key,), arguments=(f"{key}={value}",))
        for key, value in {
            "training.seed": 7,
            "lora.r": 4,
            "sequence.max_length": 64,
            "train_on": "last",
            "data.shuffle": "true",
            "date": "2020-01-01",
        }.items()
    ],
    same("the data was only touched", lambda p: (p / "rows.jsonl").touch()),
    same("a copy of the data in its place", lambda p: p.write("rows.jsonl", (p / "rows.jsonl").read_bytes())),
    same(
        "the recipe in another order",
        lambda p: p.write(
            "recipe.yaml", yaml.safe_dump(yaml.safe_load((p / "recipe.yaml").read_text()), sort_keys=True, indent=4)
        ),
    ),
    done(
        "a row added, and accepted",
        resumed(
            rows(lambda held: [*held, json.dumps(conversation_row()) + "\n"]), arguments=(*GO_ON, "--accept-changes")
        ),
        "data.train",
        holds=accepted,
    ),
    done(
        "a value of the weights is another, and accepted",
        resumed(weights(one_value), arguments=(*GO_ON, "--accept-changes")),
        "weights",
        holds=accepted,
    ),
    refused(
        "changes accepted without going on",
        lambda p: ["train", "recipe.yaml", "--accept-changes"],
        "--accept-changes",
        "--resume",
    ),
    either(
        "environment.json is gone", resumed(gone("environment.json")), "environment.json", holds=is_the_finished_run
    ),
    either(
        "environment.json is torn",
        resumed(text("environment.json", "{")),
        "environment.json",
        holds=is_the_finished_run,
    ),
    *[
        either(f"the lock is {shown}", resumed(text(".mtr-lock", content)), holds=is_the_finished_run)
        for shown, content in (
            ("empty", ""),
            ("torn", "{"),
            ("a list", "[]"),
            ("of a process that is gone", '{"host": "here", "pid": 999999, "boot": "", "started": "0"}'),
        )
    ],
)

ATTEMPTS = (*DAMAGED, *METRICS, *CHANGED)
