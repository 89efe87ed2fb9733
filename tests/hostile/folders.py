"""Where a run writes: folders that are the user's, what lies in them, and names that lead elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

from support.hostile import Attempt, Ended, Place, Prepare, after, done, in_turn, refused, train

MARKER = "mtr-run.json"
LATER_ERROR = "lora.target_modules=[nothing]"
"""If the folder were not refused, the run would end at this before it wrote anything."""


def into(folder: str, *arguments: str, **sections: object) -> Prepare:
    return train(f"training.output_dir={folder}", LATER_ERROR, *arguments, **sections)


def never(name: str, folder: str, *arguments: str, prepare: Callable[[Place], object] | None = None) -> Attempt:
    """A folder that no run may have, least of all with --overwrite."""
    run = into(folder, "--overwrite", *arguments)
    return refused(name, after(prepare, run) if prepare else run, "training.output_dir")


def foreign(*files: str, folder: str = "run") -> Callable[[Place], object]:
    """A folder of the user's with these files."""

    def prepare(place: Place) -> None:
        for name in files:
            place.write(f"{folder}/{name}", f"mine: {name}")

    return prepare


def not_a_run(name: str, *files: str) -> list[Attempt]:
    """A folder with such files is no run, whatever is asked for."""
    return [
        refused(f"{name}, {how}", after(foreign(*files), how), "training.output_dir")
        for how in ("--overwrite", "--resume")
    ]


def again(*arguments: str, change: Callable[[Place], object] = lambda place: None) -> Prepare:
    """Another run in the folder of a finished one, after something was done to it."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        change(place)
        return ["train", "recipe.yaml", *arguments]

    return prepare


def marker(text: str) -> Callable[[Place], object]:
    return lambda place: place.write(f"run/{MARKER}", text)


def stays(*names: str) -> Callable[[Place, Ended], None]:
    """Files of the user's that are still there and say what they said."""

    def holds(place: Place, _: Ended) -> None:
        for name in names:
            assert (place / name).exists(), f"{name} is gone"
            assert (place / name).read_text() == f"mine: {name.removeprefix('run/')}", f"{name} was changed"
        assert (place.run / "adapter_model.safetensors").stat().st_size > 1000

    return holds


def kept(name: str, *files: str, arguments: str = "--overwrite") -> Attempt:
    """What the user has put into the folder of a run stays there."""
    return done(name, again(arguments, change=foreign(*files)), holds=stays(*(f"run/{file}" for file in files)))


def leading_out(name: str, *, folder: bool = False) -> Callable[[Place], object]:
    """A name in the run's folder is a link to something of the user's."""

    def prepare(place: Place) -> None:
        target = place / "home" / "mine"
        path = place.run / name
        if folder:
            place.write("home/mine/diary.txt", "mine")
            if path.is_dir():
                shutil.rmtree(path)
        else:
            place.write("home/mine", "mine")
            path.unlink(missing_ok=True)
        path.symlink_to(target)

    return prepare


def untouched(name: str, arguments: str, folder: bool = False) -> Attempt:
    """Whatever the end: what a link in the run's folder leads to is not touched (every attempt checks that)."""
    shown = f"{name} is a link to a {'folder' if folder else 'file'} of the user's, {arguments}"
    return Attempt(
        shown, again(arguments, change=leading_out(name, folder=folder)), (), codes=(0, 2, 3), writes=("run",)
    )


def git_root(place: Place) -> None:
    (place / "project/.git").mkdir(parents=True)


def own_base(place: Place) -> None:
    place.base("model")


def named(folder: str) -> Prepare:
    return train(f"training.output_dir={folder}")


def model_at(*arguments: str) -> tuple[str, ...]:
    return ("model.name_or_path=model", *arguments)


def data_at(folder: str) -> Callable[[Place], object]:
    def prepare(place: Place) -> None:
        (place / folder).mkdir()
        shutil.copy(place / "rows.jsonl", place / folder / "rows.jsonl")

    return prepare


def finished_inside(place: Place) -> None:
    """A model inside the folder of a finished run."""
    place.finished()
    shutil.copytree(place / "base", place.run / "base")


PLACES = (
    never("the root of all", "/"),
    refused("the root of all, without a flag", into("/"), "training.output_dir"),
    refused("the root of all, --resume", into("/", "--resume"), "training.output_dir"),
    never("the home folder", "home"),
    never("the home folder by another name", "run/../home", prepare=lambda p: p.run.mkdir()),
    never("the working folder", "."),
    never("the folder above", ".."),
    never("the root of a repository", "project", prepare=git_root),
    never("the model's folder", "model", *model_at(), prepare=own_base),
    never("inside the model's folder", "model/run", *model_at(), prepare=own_base),
    never(
        "around the model's folder", "outer", "model.name_or_path=outer/model", prepare=lambda p: p.base("outer/model")
    ),
    never(
        "the model's folder through a link",
        "link",
        *model_at(),
        prepare=in_turn(own_base, lambda p: (p / "link").symlink_to("model")),
    ),
    never("the data's folder", "data", "data.train=data/rows.jsonl", prepare=data_at("data")),
    never(
        "around the data's folder",
        "outer",
        "data.train=outer/data/rows.jsonl",
        prepare=in_turn(lambda p: (p / "outer").mkdir(), data_at("outer/data")),
    ),
    never("the evaluation's folder", "data", "data.eval=data/rows.jsonl", prepare=data_at("data")),
    never("a folder searched for data", "data/run", "data.train=data", prepare=data_at("data")),
    never("a file", "rows.jsonl"),
    never("inside a file", "rows.jsonl/run"),
    refused("a device", into("/dev/null"), "training.output_dir"),
    refused("a folder of the kernel's", named("/proc/mtr/run"), "/proc/mtr/run", codes=(2, 3)),
    refused("a name too long for a folder", named("x" * 300), "xxx", codes=(2, 3)),
    refused("a path too long", named("a/" * 3000 + "run"), "a/a/a", codes=(2, 3)),
    refused("a dangling link", after(lambda p: p.run.symlink_to("nowhere/at/all")), "run", codes=(2, 3)),
    refused("a link to itself", after(lambda p: p.run.symlink_to("run")), "run", codes=(2, 3)),
    done("a folder that is empty", after(lambda p: p.run.mkdir()), holds=stays()),
    done("a name in two lines", named("'run/a\nb'"), writes=("run",)),
    done("a name with escape codes", train(training={"output_dir": "run/\x1b[31mred"}), writes=("run",)),
    done("a name like an option", named("--run"), writes=("--run",)),
    done("a folder of the recipe's", named("run/deep/down"), writes=("run",)),
)

FOREIGN = (
    *not_a_run("notes", "notes.txt"),
    *not_a_run("a checkpoint of another trainer", "checkpoint-7/model.safetensors", "checkpoint-7/trainer_state.json"),
    *not_a_run("a README", "README.md"),
    *not_a_run("a recipe and metrics", "recipe.yaml", "metrics.jsonl"),
    *not_a_run("an adapter", "adapter_config.json", "adapter_model.safetensors"),
    *not_a_run("a marker that is none", MARKER, "notes.txt"),
    *not_a_run("a hidden file", ".env"),
    refused("notes, and no flag", after(foreign("notes.txt")), "training.output_dir"),
    refused("a run, and no flag", again(), "training.output_dir", "--resume", "--overwrite"),
    *[
        refused(
            f"a marker that is {text or 'empty'}, {how}",
            again(how, change=marker(text)),
            MARKER,
        )
        for how, texts in {
            "--overwrite": ("", "{}", "[]", "null", "{", '{"run": 7, "files": []}', '{"format": 999}'),
            "--resume": ("{}", '{"format": 999}'),
        }.items()
        for text in texts
    ],
    *[
        refused(
            f"the marker is gone, {how}",
            again(how, change=lambda p: (p.run / MARKER).unlink()),
            "training.output_dir",
            MARKER,
        )
        for how in ("--overwrite", "--resume")
    ],
    *[
        refused(f"the marker is a link, {how}", again(how, change=leading_out(MARKER)), MARKER)
        for how in ("--overwrite", "--resume")
    ],
    kept("notes in a run", "notes.txt"),
    kept("notes in a folder in a run", "notes/today.txt"),
    kept("a file like a checkpoint", "checkpoint-notes.txt"),
    kept("a hidden folder in a run", ".secret/key"),
    kept("a merged model in a run", "merged/model.safetensors"),
    kept("notes in a run that goes on", "notes.txt", arguments="--resume"),
    kept("half a checkpoint of the user's", ".checkpoint-7.partial.txt"),
    *[
        refused(
            f"a changed {name} in a run, --overwrite",
            again("--overwrite", change=foreign(name)),
            "training.output_dir",
            *name.split("/")[:1],
        )
        for name in (
            "README.md",
            "recipe.yaml",
            "adapter_config.json",
            "checkpoint-2/notes.txt",
            "checkpoint-9/weights.bin",
            "environment.json",
        )
    ],
    *[
        untouched(name, how)
        for name in (
            "metrics.jsonl",
            "README.md",
            "recipe.yaml",
            "environment.json",
            "rejects.jsonl",
            "adapter_model.safetensors",
            "tokenizer.json",
            ".recipe.yaml.partial",
            ".mtr-lock",
        )
        for how in ("--overwrite", "--resume")
    ],
    *[
        untouched(name, how, folder=True)
        for name in ("checkpoint-3", "checkpoint-9", ".checkpoint-4.partial")
        for how in ("--overwrite", "--resume")
    ],
    refused(
        "the data inside the run, --overwrite",
        after(
            lambda p: (p.finished(), shutil.move(p / "rows.jsonl", p.run / "rows.jsonl")),
            lambda p: ["train", "recipe.yaml", "data.train=run/rows.jsonl", "--overwrite"],
        ),
        "training.output_dir",
    ),
    refused(
        "the model inside the run, --overwrite",
        after(finished_inside, lambda p: ["train", "recipe.yaml", "model.name_or_path=run/base", "--overwrite"]),
        "training.output_dir",
    ),
    refused(
        "the recipe inside the run, --overwrite",
        after(
            lambda p: (p.finished(), shutil.copy(p / "recipe.yaml", p.run / "mine.yaml")),
            lambda p: ["train", "run/mine.yaml", "--overwrite"],
        ),
        "training.output_dir",
    ),
    done("a run replaced", again("--overwrite"), holds=stays()),
    done(
        "a run replaced through a link",
        again("training.output_dir=link", "--overwrite", change=lambda p: (p / "link").symlink_to("run")),
        holds=stays(),
    ),
    done(
        "a hard link of the user's to the adapter",
        again(
            "--overwrite", change=lambda p: os.link(p.run / "adapter_model.safetensors", p / "home/mine.safetensors")
        ),
        holds=stays(),
    ),
    done(
        "a hard link of the user's to the metrics",
        again("--overwrite", change=lambda p: os.link(p.run / "metrics.jsonl", p / "home/metrics.jsonl")),
        holds=stays(),
    ),
)

ATTEMPTS = (*PLACES, *FOREIGN)
