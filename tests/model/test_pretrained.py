"""Claims: weights that are not the model's end with exit code 2 and one line that names tensors, the likely cause and
the way out, in every command that loads a model; what is allowed by name is logged, and is the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Tensors, changed_model, save_sharded, save_tensors
from support.paths import QUICKSTART

from mtr.errors import UserError
from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
Models = Callable[..., Path]
Change = Callable[[Tensors], Tensors]
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}_proj.weight"


def prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def added(name: str, like: str = UP) -> Change:
    return lambda tensors: {**tensors, name: tensors[like].clone()}


def with_adapter(tensors: Tensors) -> Tensors:
    """As saved from inside PEFT without merging."""
    inside = {f"base_model.model.{n}".replace("q_proj", "q_proj.base_layer"): t for n, t in tensors.items()}
    return {**inside, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 128)}


def shifted_experts(tensors: Tensors) -> Tensors:
    """Numbered from 1."""
    return {n.replace(*renumber(n)) if ".experts." in n else n: tensor for n, tensor in tensors.items()}


def renumber(name: str) -> tuple[str, str]:
    number = name.split(".experts.")[1].split(".")[0]
    return f".experts.{number}.", f".experts.{int(number) + 1}."


WRONG: dict[str, tuple[str, Change | None, dict[str, Any], list[str]]] = {
    "compiled": ("base", prefixed("_orig_mod."), {}, ["_orig_mod.model.embed_tokens", "46 tensors", "torch.compile"]),
    "compiled layers": (
        "base",
        lambda tensors: {n.replace(".mlp.", "._orig_mod.mlp."): tensor for n, tensor in tensors.items()},
        {},
        ["12 tensors (model.layers.0._orig_mod.mlp.down_proj.weight,", "and 9 more", "torch.compile"],
    ),
    "from PEFT": ("base", prefixed("base_model.model."), {}, ["saved from inside a PEFT model", "merge_and_unload"]),
    "with an adapter": ("base", with_adapter, {}, ["an adapter that was not merged", "mtr merge"]),
    "data parallel": ("base", prefixed("module."), {}, ["names in the files begin with 'module.'"]),
    "larger model": ("base", prefixed("model.language_model."), {}, ["the text part of a larger model"]),
    "one missing": ("base", without(UP), {}, [f"1 parameter ({UP}) of the model", "model.allow_missing"]),
    "norm missing": ("base", without("model.norm.weight"), {}, ["1 parameter (model.norm.weight)"]),
    "one more": ("base", added("model.extra.weight"), {}, ["1 tensor (model.extra.weight)", "model.allow_unexpected"]),
    "another shape": ("base", changed(UP, lambda t: t[:5].clone()), {}, [f"({UP} [5, 128], not [384, 128])"]),
    "no tensors": ("base", lambda tensors: {}, {}, ["47 parameters", "not complete"]),
    "no head": ("base", None, {"tie_word_embeddings": False}, ["(lm_head.weight)", "tie_word_embeddings: true"]),
    "fewer layers": (
        "base",
        None,
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        ["(model.layers.3.input_layernorm.weight,", "they have 4 layers, and config.json says 3"],
    ),
    "wider": ("base", None, {"intermediate_size": 400}, ["mlp.down_proj.weight [128, 384], not [128, 400]", "size"]),
    "another architecture": ("base", None, {"model_type": "llama"}, ["8 tensors", "may be that of another"]),
    "integers": ("base", changed(UP, lambda t: t.to(torch.int8)), {}, [f"{UP} is stored as I8"]),
    "eight bits": ("base", changed(UP, lambda t: t.to(torch.float8_e4m3fn)), {}, [f"{UP} is stored as F8_E4M3"]),
    "quantized": ("base", added(f"{UP.removesuffix('weight')}weight_scale"), {}, ["they are quantized"]),
    "an expert's gate": ("qwen3_moe", without(EXPERT.format("2.gate")), {}, ["(" + EXPERT.format("2.gate") + ")"]),
    "a last expert's gate": ("qwen3_moe", without(EXPERT.format("3.gate")), {}, [EXPERT.format("3.gate")]),
    "a middle expert": (
        "qwen3_moe",
        without(*(EXPERT.format(f"1.{kind}") for kind in ("gate", "up", "down"))),
        {},
        ["3 tensors", EXPERT.format("1.down")],
    ),
    "experts from 1": (
        "qwen3_moe",
        shifted_experts,
        {},
        ["6 tensors (model.layers.0.mlp.experts.0.down_proj.weight,", "copy or download"],
    ),
    "one more expert": ("qwen3_moe", None, {"num_experts": 3, "num_local_experts": 3}, ["[4, 32, 16], not [3,"]),
    "an expert's shape": (
        "qwen3_moe",
        changed(EXPERT.format("2.up"), lambda t: t[:3].clone()),
        {},
        ["experts of one layer have different shapes (model.layers.1.mlp.experts.*.up_proj.weight)"],
    ),
    "a correction of routing": (
        "deepseek_v3",
        without("model.layers.1.mlp.gate.e_score_correction_bias"),
        {},
        ["(model.layers.1.mlp.gate.e_score_correction_bias)"],
    ),
}  # fmt: skip


@pytest.fixture
def wrong(models: Models, tmp_path: Path) -> Callable[[str], tuple[Path, list[str]]]:
    """`wrong("compiled")` is the folder of such a model, with the words that have to be said of it."""

    def make(name: str) -> tuple[Path, list[str]]:
        kind, change, config, words = WRONG[name]
        source = QUICKSTART / "base" if kind == "base" else models(kind)
        return changed_model(source, tmp_path / "wrong", change, **config), words

    return make


@pytest.mark.parametrize("name", WRONG)
def test_weights_of_another_model_are_refused(
    write_recipe: Recipes, mtr: Mtr, wrong: Callable[[str], tuple[Path, list[str]]], name: str
) -> None:
    folder, words = wrong(name)
    code, out, err = mtr("verify", write_recipe(model={"name_or_path": str(folder)}), "--conversations", 1)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: model.name_or_path: ")
    for word in [str(folder), *words]:
        assert word in line
    assert "Traceback" not in err
    assert len(line) < 1200


@pytest.mark.parametrize("command", [("train",), ("bench", "--repeats", 1), ("verify",)])
def test_every_command_that_loads_a_model_refuses(
    write_recipe: Recipes,
    mtr: Mtr,
    wrong: Callable[[str], tuple[Path, list[str]]],
    command: tuple[object, ...],
    tmp_path: Path,
) -> None:
    recipe = write_recipe(model={"name_or_path": str(wrong("compiled")[0])})
    code, _, err = mtr(command[0], recipe, *command[1:])
    assert code == 2
    assert "torch.compile" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_random_weights_need_no_files(write_recipe: Recipes, mtr: Mtr, tmp_path: Path) -> None:
    folder = changed_model(QUICKSTART / "base", tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    recipe = write_recipe(model={"name_or_path": str(folder)})
    code, _, err = mtr("bench", recipe, "--random-weights", "--conversations", 1, "--repeats", 1)
    assert code == 0, err


def load(recipe: Path) -> Any:
    return load_model(load_recipe(recipe), torch.device("cpu"))


HEAD = "lm_head.weight"


@pytest.fixture
def headless(models: Models, tmp_path: Path) -> Path:
    return changed_model(models("qwen3"), tmp_path / "headless", without(HEAD))


def test_what_is_allowed_is_named(
    write_recipe: Recipes, headless: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = {"name_or_path": str(headless), "allow_missing": ["lm_head.*", "score.*"]}
    with caplog.at_level("WARNING", logger="mtr"):
        one, other = (load(write_recipe(model=model, lora=None)) for _ in range(2))
    said = [record.message for record in caplog.records if "allow_missing" in record.message]
    assert said == [f"model.allow_missing: not in the weights, so they start from random values: {HEAD}"] * 2
    assert torch.equal(one.lm_head.weight, other.lm_head.weight), "every process, and a resumed run, has the same"
    assert not torch.equal(one.lm_head.weight, one.model.embed_tokens.weight)

    caplog.clear()
    more = changed_model(headless, tmp_path / "more", added("model.mtp.weight", "model.norm.weight"))
    model |= {"name_or_path": str(more), "allow_unexpected": ["model.mtp.*"]}
    with caplog.at_level("WARNING", logger="mtr"):
        load(write_recipe(model=model, lora=None))
    assert "model.allow_unexpected: in the weights, and left out of the model: model.mtp.weight" in caplog.messages


def test_patterns_allow_nothing_else(write_recipe: Recipes, headless: Path, tmp_path: Path) -> None:
    both = changed_model(headless, tmp_path / "both", without("model.norm.weight"))
    model = {"name_or_path": str(both), "allow_missing": ["lm_head.*"], "allow_unexpected": ["*"]}
    with pytest.raises(UserError, match=r"1 parameter \(model\.norm\.weight\)"):
        load(write_recipe(model=model, lora=None))


def test_random_values_that_no_adapter_keeps_are_refused(write_recipe: Recipes, headless: Path) -> None:
    model = {"name_or_path": str(headless), "allow_missing": [HEAD]}
    with pytest.raises(UserError, match=r"an adapter does not keep; name its module in lora\.modules_to_save"):
        load(write_recipe(model=model))
    assert load(write_recipe(model=model, lora={"modules_to_save": ["lm_head"]})) is not None


def test_a_folder_of_an_adapter_is_no_model(write_recipe: Recipes, mtr: Mtr, tmp_path: Path) -> None:
    """transformers would put that adapter on top of the model without a word."""
    folder = changed_model(QUICKSTART / "base", tmp_path / "both")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, _, err = mtr("verify", write_recipe(model={"name_or_path": str(folder)}))
    assert code == 2
    assert "holds an adapter (adapter_config.json)" in err.splitlines()[-1]


# --- shards -----------------------------------------------------------------------------------------------------------


def in_shards(models: Models, folder: Path, **weight_map: Any) -> tuple[Path, Tensors, dict[str, str]]:
    from safetensors.torch import load_file

    tensors = load_file(models("qwen3") / "model.safetensors")
    path = changed_model(models("qwen3"), folder)
    return path, tensors, save_sharded(tensors, path, **weight_map)


def refused(mtr: Mtr, recipe: Path) -> str:
    code, out, err = mtr("verify", recipe, "--conversations", 1)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_shards_that_do_not_fit_are_refused(write_recipe: Recipes, mtr: Mtr, models: Models, tmp_path: Path) -> None:
    path, tensors, files = in_shards(models, tmp_path / "absent", extra="model-00003-of-00003.safetensors")
    line = refused(mtr, write_recipe(model={"name_or_path": str(path)}))
    assert "1 of the 3 files that model.safetensors.index.json names are not there, for example model-00003" in line

    index = path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    line = refused(mtr, write_recipe(model={"name_or_path": str(path)}))
    assert "the index does not name model-00002-of-00002.safetensors" in line

    path, tensors, files = in_shards(models, tmp_path / "twice")
    first, second = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    held = {name: tensors[name] for name in tensors if files[name] == second}
    twice = next(name for name in sorted(tensors) if files[name] == first and tensors[name].dim() == 2)
    save_tensors({**held, twice: tensors[twice]}, path / second)
    recipe = write_recipe(model={"name_or_path": str(path)})
    load(recipe)  # the same values twice do no harm
    save_tensors({**held, twice: tensors[twice] + 1}, path / second)
    line = refused(mtr, recipe)
    assert f"{first} and {second} both hold {twice}, with different values" in line


INDICES = {
    "a list": "[]",
    "empty": "{}",
    "cut off": "{",
    "deep": "[" * 10_000,
    "a number of files": '{"weight_map": 3}',
    "no files": '{"metadata": {}, "weight_map": {}}',
    "an object": '{"metadata": {}, "weight_map": {"x": {}}}',
    "a number": '{"metadata": {}, "weight_map": {"x": 3}}',
    "elsewhere": '{"metadata": {}, "weight_map": {"x": "../model.safetensors"}}',
    "no metadata": '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}',
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_that_makes_no_sense_is_refused(
    write_recipe: Recipes, mtr: Mtr, models: Models, tmp_path: Path, index: str
) -> None:
    path, _, _ = in_shards(models, tmp_path / "model")
    (path / "model.safetensors.index.json").write_text(index)
    assert "no weights can be loaded from" in refused(mtr, write_recipe(model={"name_or_path": str(path)}))
