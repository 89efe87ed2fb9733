"""Models: configs that contradict themselves, and weights that are torn, of other shapes, names or values."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.hostile import Attempt, Ended, Place, Prepare, command, done, either, in_turn, refused, stopped

from hostile.tokenizers import folder_for, gone, keys, link, text

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


def model(*changes: Callable[[Path], object], name: str = "train", **sections: Any) -> Prepare:
    """A command on a model that was changed."""

    def prepare(place: Place) -> Sequence[object]:
        folder = place.base()
        for change in changes:
            change(folder)
        return command(name, model={"name_or_path": str(folder), **sections.pop("model", {})}, **sections)(place)

    return prepare


def tensors(change: Callable[[Tensors], Tensors | None], name: str = "model.safetensors") -> Callable[[Path], object]:
    """Other tensors in a file; what `change` returns, or what it leaves if it returns nothing."""

    def rewrite(folder: Path) -> None:
        held = load_file(folder / name)
        changed = change(held)
        save_file(held if changed is None else changed, folder / name, {"format": "pt"})

    return rewrite


def renamed(make: Callable[[str], str]) -> Callable[[Path], object]:
    return tensors(lambda held: {make(name): tensor for name, tensor in held.items()})


def config(**changes: Any) -> Callable[[Path], object]:
    return keys("config.json", **changes)


def bad_config(name: str, *says: str, **changes: Any) -> Attempt:
    return refused(name, model(config(**changes)), "base", *says, seconds=10)


def bad_weights(name: str, change: Callable[[Path], object], *says: str, **sections: Any) -> Attempt:
    return refused(name, model(change, **sections), "base", *says)


def cut(share: float) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def in_shards(folder: Path) -> dict[str, str]:
    """Two shards with their index; the map of names to files."""
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: held[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        files = in_shards(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": change(files)}))

    return rewrite


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("__import__('pathlib').Path('home/harm').write_text('')",))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm()))


def filled(value: float) -> Callable[[Path], object]:
    """A tensor of which every element is this."""
    return tensors(lambda held: {**held, LAYER: torch.full_like(held[LAYER], value)})


def all_trained(place: Place, _: Ended) -> None:
    lines = (place.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert all(json.loads(line)["loss"] for line in lines)


def without(name: str) -> Callable[[Path], object]:
    return tensors(lambda held: {key: tensor for key, tensor in held.items() if key != name})


CONFIGS = (
    refused("no config.json", model(gone("config.json")), "base", "config"),
    refused("an empty config.json", model(text("config.json", "")), "base"),
    refused("a torn config.json", model(text("config.json", '{"model_type": "qwen3",')), "base"),
    refused("config.json is {}", model(text("config.json", "{}")), "base"),
    refused("config.json is []", model(text("config.json", "[]")), "base"),
    refused("config.json is null", model(text("config.json", "null")), "base"),
    refused("a config.json of NUL bytes", model(text("config.json", b"\0" * 99)), "base"),
    refused("a folder for config.json", model(folder_for("config.json")), "base"),
    refused("a dangling link for config.json", model(link("none", "config.json")), "base"),
    bad_config("a model that nobody knows", model_type="magic"),
    bad_config("a model type that is a number", model_type=7),
    bad_config("no model type", model_type=...),
    refused("a model that is no decoder", model(config(model_type="bert")), "bert"),
    refused("a model of images", model(config(model_type="vit")), "vit"),
    bad_config("code beside the config", auto_map={"AutoConfig": "harm.C"}, model_type="harm"),
    bad_config("no width", hidden_size=0),
    bad_config("a width below 0", hidden_size=-128),
    bad_config("a width in words", hidden_size="wide"),
    bad_config("a width that is null", hidden_size=None),
    bad_config("a width that the weights do not have", hidden_size=64),
    bad_config("a width of 10^9", hidden_size=10**9),
    bad_config("no layers", num_hidden_layers=0, layer_types=[]),
    bad_config("a layer more than the weights have", num_hidden_layers=5, layer_types=["full_attention"] * 5),
    bad_config("a layer fewer than the weights have", num_hidden_layers=3, layer_types=["full_attention"] * 3),
    bad_config("10^7 layers", num_hidden_layers=10**7, layer_types=None),
    bad_config("more layer types than layers", layer_types=["full_attention"] * 9),
    bad_config("a layer type that is none", layer_types=["magic_attention"] * 4),
    bad_config("recurrent layers", layer_types=["linear_attention", "full_attention"] * 2),
    bad_config("no heads", num_attention_heads=0),
    bad_config("heads that do not divide", num_attention_heads=3, num_key_value_heads=2),
    bad_config("more key heads than heads", num_key_value_heads=8),
    bad_config("a head of odd size", head_dim=31),
    bad_config("no vocabulary", vocab_size=0),
    bad_config("a vocabulary below 0", vocab_size=-1),
    refused("a vocabulary smaller than the tokenizer's", model(config(vocab_size=400)), "vocab_size", "400"),
    bad_config("a vocabulary larger than the weights'", vocab_size=1000),
    bad_config("an activation that is none", hidden_act="magic"),
    bad_config("a rotary embedding that is none", rope_parameters={"rope_type": "magic", "rope_theta": 1e4}),
    bad_config("a rotary embedding without its factor", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    bad_config("a rotary embedding that is a list", rope_parameters=[1]),
    stopped(
        "a rotary base of 0",
        model(config(rope_parameters={"rope_type": "default", "rope_theta": 0})),
        "not finite",
        codes=(2, 4),
    ),
    bad_config("a dtype that is none", dtype="float7"),
    bad_config("a dtype of whole numbers", dtype="int8"),
    bad_config("a norm that divides by text", rms_norm_eps="small"),
    either(
        "quantized in a way that nobody knows", model(config(quantization_config={"quant_method": "magic"})), "base"
    ),
    either("quantized, without saying how", model(config(quantization_config={})), "base"),
    bad_config("ids of a padding token beyond the vocabulary", pad_token_id=99_999),
)

WEIGHTS = (
    refused("no weights", model(gone("model.safetensors")), "base", "weights"),
    bad_weights("empty weights", text("model.safetensors", ""), "weights"),
    bad_weights("half of the weights", cut(0.5), "weights"),
    bad_weights("weights without their last byte", cut(0.999999), "weights"),
    bad_weights("weights of NUL bytes", text("model.safetensors", b"\0" * 4096), "weights"),
    bad_weights("a header of 10^18 bytes", text("model.safetensors", struct.pack("<Q", 10**18) + b"{}"), "weights"),
    bad_weights("a header that is no JSON", text("model.safetensors", struct.pack("<Q", 4) + b"{{{{"), "weights"),
    bad_weights("a header without tensors", text("model.safetensors", struct.pack("<Q", 2) + b"{}")),
    bad_weights(
        "offsets beyond the file",
        text(
            "model.safetensors",
            struct.pack("<Q", 60) + b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'.ljust(60)[:60],
        ),
        "weights",
    ),
    bad_weights(
        "a Git LFS pointer",
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "weights",
    ),
    bad_weights("a folder for the weights", folder_for("model.safetensors"), "weights"),
    bad_weights("a dangling link for the weights", link("none", "model.safetensors"), "weights"),
    bad_weights("pickled weights, with code in them", pickled, "pytorch_model.bin"),
    bad_weights("a prefix of torch.compile", renamed(lambda name: f"_orig_mod.{name}"), "_orig_mod."),
    bad_weights("a prefix of DDP", renamed(lambda name: f"module.{name}"), "module."),
    bad_weights("a prefix of PEFT", renamed(lambda name: f"base_model.model.{name}"), "base_model.model."),
    bad_weights(
        "names of another architecture", renamed(lambda name: name.replace("self_attn", "attention")), "attention"
    ),
    bad_weights("names in capitals", renamed(str.upper)),
    bad_weights("one tensor missing", without(LAYER), LAYER),
    bad_weights("a norm missing", without("model.norm.weight"), "model.norm.weight"),
    bad_weights("the embeddings missing", without("model.embed_tokens.weight"), "embed_tokens"),
    bad_weights("a bias missing that the config asks for", config(attention_bias=True), "bias"),
    bad_weights("one tensor renamed", renamed(lambda name: name.replace("layers.1.mlp.up", "layers.1.mlp.pu")), LAYER),
    bad_weights(
        "a tensor too many", tensors(lambda held: {**held, "model.extra.weight": torch.ones(3)}), "model.extra.weight"
    ),
    bad_weights(
        "a layer too many",
        tensors(lambda held: {**held, "model.layers.4.mlp.up_proj.weight": held[LAYER].clone()}),
        "layers.4",
    ),
    bad_weights(
        "a tensor turned on its side", tensors(lambda held: held.update({LAYER: held[LAYER].T.contiguous()})), LAYER
    ),
    bad_weights("a tensor of one value", tensors(lambda held: held.update({LAYER: torch.ones(1)})), LAYER),
    bad_weights(
        "embeddings of a smaller vocabulary",
        tensors(
            lambda held: held.update({"model.embed_tokens.weight": held["model.embed_tokens.weight"][:500].clone()})
        ),
        "embed_tokens",
    ),
    bad_weights(
        "a shard missing",
        in_turn(in_shards, gone("model-00002-of-00002.safetensors")),
        "00002",
    ),
    bad_weights(
        "an index that is torn",
        in_turn(in_shards, text("model.safetensors.index.json", "{")),
        "weights",
    ),
    bad_weights(
        "an index that is []",
        in_turn(in_shards, text("model.safetensors.index.json", "[]")),
        "weights",
    ),
    bad_weights(
        "an index without a map",
        in_turn(in_shards, text("model.safetensors.index.json", "{}")),
        "weights",
    ),
    bad_weights("an index of no tensors", index(lambda files: {})),
    bad_weights(
        "an index that leaves a shard out", index(lambda files: {n: f for n, f in files.items() if "00001" in f})
    ),
    bad_weights("an index to a file outside", index(lambda files: dict.fromkeys(files, "../rows.jsonl"))),
    either(
        "an index that names the shards in turn",
        model(index(lambda files: {n: f.translate({ord("1"): "3", ord("3"): "1"}) for n, f in files.items()})),
        "base",
        holds=all_trained,
    ),
    bad_weights(
        "a shard twice under both names",
        lambda folder: (
            in_shards(folder),
            (folder / "model-00002-of-00002.safetensors").write_bytes(
                (folder / "model-00001-of-00002.safetensors").read_bytes()
            ),
        ),
    ),
    stopped(
        "a value that is no number",
        model(filled(float("nan")), training={"max_nonfinite_steps": 2}),
        "not finite",
        codes=(2, 4),
    ),
    stopped(
        "values that are infinite",
        model(filled(float("inf")), training={"max_nonfinite_steps": 2}),
        "not finite",
        codes=(2, 4),
    ),
    done("in two shards", model(in_shards), holds=all_trained),
    done(
        "a missing tensor that is allowed",
        model(without(LAYER), model={"allow_missing": ["*.up_proj.weight"]}, lora=None),
        LAYER,
        holds=all_trained,
    ),
    done(
        "an unexpected tensor that is allowed",
        model(tensors(lambda held: {**held, "extra.weight": torch.ones(3)}), model={"allow_unexpected": ["extra.*"]}),
        holds=all_trained,
    ),
    bad_weights(
        "another missing than is allowed", without(LAYER), LAYER, model={"allow_missing": ["model.norm.weight"]}
    ),
    refused("verify: a tensor missing", model(without(LAYER), name="verify"), "base", LAYER),
    refused("verify: a foreign prefix", model(renamed(lambda name: f"_orig_mod.{name}"), name="verify"), "_orig_mod."),
    refused("bench: a tensor missing", model(without(LAYER), name="bench"), "base", LAYER),
    refused("verify: no width", model(config(hidden_size=0), name="verify"), "base"),
    refused("bench: random weights of no config", model(text("config.json", "[]"), name="bench"), "base"),
)

ATTEMPTS = (*CONFIGS, *WEIGHTS)
