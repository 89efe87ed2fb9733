"""`mtr merge`: of what is no run, of damaged adapters and bases, to where something lies, and on a full disk."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from support.hostile import Attempt, Ended, Place, Prepare, done, either, refused

from hostile.adapters import CONFIG, WEIGHTS, names, narrower
from hostile.tokenizers import folder_for, gone, keys, text
from hostile.weights import LAYER, renamed, tensors, without

MERGED = ("run/merged",)
FULL = "model.safetensors"


def merge(
    *arguments: object, run: Callable[[Path], object] | None = None, base: Any = None, **sections: Any
) -> Prepare:
    """Merge a finished run, after something was done to its folder or to its base."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished(**sections)
        for folder, change in ((place.run, run), (place / "base", base)):
            if change:
                change(folder)
        return ["merge", "run", *arguments]

    return prepare


def bad(name: str, run: Callable[[Path], object], *says: str) -> Attempt:
    return refused(name, merge(run=run), "run", *says)


def bad_base(name: str, base: Callable[[Path], object], *says: str) -> Attempt:
    return refused(name, merge(base=base), "base", *says)


def loads(folder: str = "run/merged") -> Callable[[Place, Ended], None]:
    """The merged folder holds a model without an adapter."""

    def holds(place: Place, _: Ended) -> None:
        found = {path.name for path in (place / folder).iterdir()}
        assert {FULL, "config.json", "tokenizer.json"} <= found, found
        assert CONFIG not in found

    return holds


def small_files(most: int) -> Callable[[], None]:
    """As if the disk were full: no file may be larger. What is half written must not block the next try."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def whole_weights(place: Place) -> Sequence[object]:
    place.finished("whole", lora=None, model={"dtype": "float32"})
    return ["merge", "run"]


def twice(place: Place) -> Sequence[object]:
    place.finished()
    place.write("run/merged/model.safetensors", "mine")
    return ["merge", "run"]


ATTEMPTS = (
    done("a run", merge(), writes=MERGED, holds=loads()),
    done(
        "a checkpoint",
        lambda p: (p.finished(), ["merge", "run/checkpoint-2"])[1],
        writes=("run/checkpoint-2/merged",),
        holds=loads("run/checkpoint-2/merged"),
    ),
    done(
        "to another folder, which has to be made",
        merge("--output", "new/deep"),
        writes=("new",),
        holds=loads("new/deep"),
    ),
    done("in bfloat16", merge("--dtype", "bfloat16"), writes=MERGED, holds=loads()),
    done("a run without its recipe", merge(run=gone("recipe.yaml")), writes=MERGED, holds=loads()),
    done("a run without its README", merge(run=gone("README.md")), writes=MERGED, holds=loads()),
    either(
        "a run whose README is no text",
        merge(run=text("README.md", b"\xff\xfe\0")),
        "README.md",
        writes=MERGED,
        holds=loads(),
    ),
    either("a run without its tokenizer", merge(run=gone("tokenizer.json")), "run", writes=MERGED),
    refused("no folder", lambda p: ["merge", "none"], "none"),
    refused("an empty folder", lambda p: ["merge", "home"], "home"),
    refused("a file", lambda p: ["merge", "rows.jsonl"], "rows.jsonl"),
    refused("an empty name", lambda p: ["merge", ""], "adapter_config.json"),
    refused("a base model", lambda p: (p.base(), ["merge", "base"])[1], "base", "full weights"),
    refused("a run that trained all weights", whole_weights, "run", "full weights"),
    bad("a torn config", text(CONFIG, "{"), CONFIG),
    bad("a config that is []", text(CONFIG, "[]"), CONFIG),
    bad("a config that is {}", text(CONFIG, "{}")),
    bad("a config that is null", text(CONFIG, "null"), CONFIG),
    bad("a folder for the config", folder_for(CONFIG), CONFIG),
    bad("another kind of adapter", keys(CONFIG, peft_type="IA3"), "IA3"),
    bad("a kind with escape codes", keys(CONFIG, peft_type="\x1b[2J")),
    bad("no rank", keys(CONFIG, r=...)),
    bad("a rank that is text", keys(CONFIG, r="two")),
    bad("another rank than the tensors have", keys(CONFIG, r=4)),
    bad("no base", keys(CONFIG, base_model_name_or_path=None), "base"),
    bad("a base that is gone", keys(CONFIG, base_model_name_or_path="/none/at/all"), "/none/at/all"),
    bad(
        "a base of the Hub without a network", keys(CONFIG, base_model_name_or_path="nobody/nothing"), "nobody/nothing"
    ),
    bad("a base with escape codes", keys(CONFIG, base_model_name_or_path="\x1b[2J/model")),
    bad("targets that the base does not have", keys(CONFIG, target_modules=["nothing"])),
    bad("no weights", gone(WEIGHTS)),
    bad("empty weights", text(WEIGHTS, "")),
    bad("half of the weights", lambda run: (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:5000])),
    bad("a tensor missing", tensors(lambda held: {n: held[n] for n in sorted(held)[1:]}, WEIGHTS)),
    bad(
        "a tensor too many",
        tensors(lambda held: {**held, "base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, WEIGHTS),
        "extra",
    ),
    bad("a foreign prefix", names(lambda name: f"_orig_mod.{name}"), "_orig_mod."),
    bad("tensors of another rank", tensors(narrower, WEIGHTS)),
    bad("values that are no numbers", tensors(lambda held: {n: t * float("nan") for n, t in held.items()}, WEIGHTS)),
    *[
        bad(f"recipe.yaml is {shown}", text("recipe.yaml", content), "recipe.yaml")
        for shown, content in (("torn", "model: ["), ("[]", "[]"), ("another's", "a: 1"), ("binary", b"\xff\0"))
    ],
    bad_base("the base is gone", shutil.rmtree),
    bad_base("the base has no weights", gone(FULL)),
    bad_base("the base's config is torn", text("config.json", "{")),
    bad_base("the base's config is []", text("config.json", "[]")),
    bad_base("a tensor of the base is missing", without(LAYER), LAYER),
    bad_base("the base has a foreign prefix", renamed(lambda name: f"_orig_mod.{name}"), "_orig_mod."),
    refused(
        "the base's weights are others",
        merge(base=tensors(lambda held: {n: t + 1 for n, t in held.items()})),
        "weights",
    ),
    refused("to a folder that is not empty", twice, "--output", "not empty"),
    refused("to a file", merge("--output", "rows.jsonl"), "--output", "rows.jsonl"),
    refused("to the run itself", merge("--output", "run"), "--output"),
    refused("to the base", merge("--output", "base"), "--output"),
    refused("into the base", merge("--output", "base/merged"), "--output"),
    refused(
        "to the home folder",
        merge("--output", "home", run=lambda run: (run.parent / "home/x").write_text("mine")),
        "--output",
    ),
    refused("into a file", merge("--output", "rows.jsonl/merged"), "rows.jsonl", codes=(2, 3)),
    refused(
        "to a dangling link",
        merge("--output", "link", run=lambda run: (run.parent / "link").symlink_to("none/at/all")),
        "link",
        codes=(0, 2, 3),
        writes=("none",),
    ),
    refused("to a name too long", merge("--output", "x" * 300), "--output"),
    refused("a dtype that is none", merge("--dtype", "int4"), "--dtype", "int4"),
    refused("a repository that is no name", merge("--push-to-hub", "no spaces/allowed here"), "no spaces/allowed here"),
    Attempt(
        "an upload without a network",
        merge("--push-to-hub", "nobody/nothing"),
        ("nobody/nothing",),
        codes=(2, 7),
        writes=MERGED,
    ),
    *[
        Attempt(
            f"no file may be larger than {size:,} bytes",
            merge(),
            ("merged",),
            codes=(2, 3),
            limits=small_files(size),
        )
        for size in (0, 1000, 100_000, 1_500_000)
    ],
)
