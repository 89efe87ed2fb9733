"""Adapters to start from: of another model or shape, torn, and in the way of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from support.hostile import Attempt, Place, Prepare, done, refused, stopped, train

from hostile.tokenizers import folder_for, gone, keys, text
from hostile.weights import all_trained, tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(*changes: Callable[[Path], object], model: str = "{place}/base", **lora: Any) -> Prepare:
    """Training that starts from the adapter of a finished run, which was changed."""

    def prepare(place: Place) -> Sequence[object]:
        run = place.finished()
        start = run.rename(place / "adapter")
        for change in changes:
            change(start)
        section = {"init_from": "{place}/adapter", **lora}
        return train(model={"name_or_path": model}, lora=section)(place)

    return prepare


def bad(name: str, change: Callable[[Path], object], *says: str, **lora: Any) -> Attempt:
    return refused(name, adapter(change, **lora), "lora.init_from", *says)


def in_the_way(start: str) -> Prepare:
    """The run replaces the folder that it starts from."""

    def prepare(place: Place) -> Sequence[object]:
        place.finished()
        return train("--overwrite", model={"name_or_path": "{place}/base"}, lora={"init_from": start})(place)

    return prepare


def nothing(_: Path) -> None: ...


def names(make: Callable[[str], str]) -> Callable[[Path], object]:
    return tensors(lambda held: {make(name): tensor for name, tensor in held.items()}, WEIGHTS)


def narrower(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t[:1].contiguous() if "lora_A" in n else t[:, :1].contiguous() for n, t in held.items()}


ATTEMPTS = (
    bad("no such folder", nothing, "none", init_from="{place}/none"),
    bad("an empty folder", nothing, "home", init_from="{place}/home"),
    bad("a file", nothing, init_from="{place}/rows.jsonl"),
    bad("an empty name", nothing, init_from=""),
    bad("a name in two lines", nothing, init_from="a\nb"),
    bad("no config", gone(CONFIG)),
    bad("a torn config", text(CONFIG, "{")),
    bad("a config that is {}", text(CONFIG, "{}")),
    bad("a config that is []", text(CONFIG, "[]")),
    bad("a config that is null", text(CONFIG, "null")),
    bad("a config in Latin-1", text(CONFIG, '{"ä": 1}'.encode("latin-1"))),
    bad("another kind of adapter", keys(CONFIG, peft_type="IA3"), "IA3"),
    bad("another rank", nothing, "r 2", r=4),
    bad("another alpha", nothing, "alpha", alpha=7),
    bad("DoRA", nothing, "use_dora", use_dora=True),
    bad("fewer targets", nothing, target_modules=["q_proj"]),
    bad("another base", keys(CONFIG, base_model_name_or_path="other/model"), "other/model"),
    bad("escape codes in the base's name", keys(CONFIG, base_model_name_or_path="\x1b[2Jmodel")),
    bad("no weights", gone(WEIGHTS)),
    bad("empty weights", text(WEIGHTS, "")),
    bad("weights that are a folder", folder_for(WEIGHTS)),
    bad("a tensor missing", tensors(lambda held: {n: held[n] for n in sorted(held)[1:]}, WEIGHTS)),
    bad("a tensor too many", tensors(lambda held: {**held, "extra.lora_A.weight": torch.ones(2, 2)}, WEIGHTS), "extra"),
    bad("a foreign prefix", names(lambda name: f"_orig_mod.{name}"), "_orig_mod."),
    bad("no prefix", names(lambda name: name.removeprefix("base_model.model."))),
    bad(
        "names of A and B exchanged",
        names(lambda n: n.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B")),
    ),
    bad("tensors of another rank than the config says", tensors(narrower, WEIGHTS)),
    stopped(
        "values that are no numbers",
        adapter(tensors(lambda held: {n: t * float("nan") for n, t in held.items()}, WEIGHTS)),
        "not finite",
        codes=(2, 4),
    ),
    done("as it is", adapter(), holds=all_trained),
    refused("in output_dir itself", in_the_way("{place}/run"), "output_dir", "init_from"),
    refused("in a checkpoint of output_dir", in_the_way("{place}/run/checkpoint-2"), "output_dir", "init_from"),
)
