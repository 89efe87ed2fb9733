"""Claims: each recipe of the repository takes a step in one pass, with its own settings, on a tiny random model of its
architecture; all of its adapters learn, and what its comments call frozen has none; TRL's copy of the model's template,
where it has one, knows the template arguments.

Only the model's folder, the data and its numbers (dtype, length of the run) are overridden. Tokenizer and template are
the quickstart's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.families.catalogue import config_of
from support.paths import QUICKSTART, ROOT

from mtr.model.probe import small_configs
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train

RECIPES = {
    "gemma-3-4b": "gemma3",
    "gemma-4-e4b": "gemma4",
    "glm-4.5-air-8gpu": "glm4_moe",
    "glm-z1-9b": "glm4",
    "gpt-oss-120b-8gpu": "gpt_oss",
    "gpt-oss-20b": "gpt_oss",
    "llama-3.1-8b": "llama",
    "nemotron-3-nano-30b-a3b-2gpu": "nemotron_h",
    "nemotron-nano-9b-v2": "nemotron_h",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-8b": "qwen3",
    "qwen3.5-35b-a3b-4gpu": "qwen3_5_moe",
    "qwen3.5-9b": "qwen3_5",
    "r1-distill-llama-70b-8gpu": "llama",
    "r1-distill-qwen-7b": "qwen2",
    "smollm3-3b": "smollm3",
}
"""`model_type` of each; that of an image-text checkpoint where it is one."""
WRAPPERS = {"gemma3", "gemma4", "qwen3_5", "qwen3_5_moe"}
ESTIMATED = ("qwen3-8b", "qwen3-30b-a3b")
"""Of these, gradient_checkpointing: auto stays, which takes a second or more; of the others it is full."""
FROZEN = {
    "glm-4.5-air-8gpu": ("mlp",),
    "gpt-oss-120b-8gpu": ("mlp",),
    "gpt-oss-20b": ("mlp",),
    "nemotron-3-nano-30b-a3b-2gpu": ("experts", "gate"),
    "qwen3-30b-a3b": ("mlp.gate.",),
    "qwen3.5-35b-a3b-4gpu": ("mlp.experts", "mlp.gate.", "shared_expert_gate"),
}
"""Parts of names of parameters that get no adapter, as the comments of mixtures of experts say."""
TEMPLATES = {
    "gemma-4-e4b": "gemma4_v5",
    "glm-4.5-air-8gpu": "glm4moe",
    "gpt-oss-120b-8gpu": "gptoss",
    "gpt-oss-20b": "gptoss",
    "nemotron-3-nano-30b-a3b-2gpu": "nemotron_3_nano",
    "qwen3.5-35b-a3b-4gpu": "qwen3_5_think",
    "qwen3.5-9b": "qwen3_5_think",
}
"""TRL's copies of the templates."""
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 28,
    "num_position_embeddings": 16,
}


def save_tiny(kind: str, folder: Path) -> None:
    """The architecture's released config, made as small as the probe makes it, and the towers smaller still."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    config = next(small_configs(config_of(kind)))()
    text = config.get_text_config()
    for part in {id(config): config, id(text): text}.values():
        part.vocab_size = part.vocab_size_per_layer_input = len(tokenizer)
        part.pad_token_id = part.bos_token_id = None
        part.eos_token_id = tokenizer.eos_token_id
    text.max_position_embeddings = 131072
    for tower in (getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
        for key, value in _TOWER.items():
            if tower is not None and isinstance(getattr(tower, key, None), int):
                setattr(tower, key, text.hidden_size if key == "out_hidden_size" else value)
    auto = transformers.AutoModelForImageTextToText if kind in WRAPPERS else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by its `model_type`."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_tiny(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with (QUICKSTART / "train.jsonl").open(encoding="utf-8") as lines:
        file.write_text("".join(next(lines) for _ in range(2)))
    return file


def test_every_recipe_is_tried_here() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == {*RECIPES, "quickstart"}


def test_the_table_of_recipes_names_the_model_of_each() -> None:
    rows = re.findall(r"^\| \[`(.+)`\]\(\1\.yaml\) \| `?(.+?)`? \|", (ROOT / "recipes" / "README.md").read_text(), re.M)
    named = {name: load_recipe(ROOT / "recipes" / f"{name}.yaml").model.name_or_path for name in RECIPES}
    assert {name: model for name, model in rows if name != "quickstart"} == named
    assert len(rows) == len(named) + 1


def test_the_templates_know_their_arguments() -> None:
    arguments = {name: load_recipe(ROOT / "recipes" / f"{name}.yaml").template for name in RECIPES}
    assert {name for name, given in arguments.items() if given} - {*TEMPLATES} == {"smollm3-3b"}  # TRL has no copy
    trl = importlib.util.find_spec("trl")
    if trl is None or not trl.submodule_search_locations:
        pytest.skip("trl is not installed")
    for name, copy in TEMPLATES.items():
        text = (Path(trl.submodule_search_locations[0]) / "chat_templates" / f"{copy}.jinja").read_text()
        assert [argument for argument in arguments[name] if not re.search(rf"\b{argument}\b", text)] == [], name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_a_step(name: str, model: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = {
        "model.name_or_path": model(RECIPES[name]),
        "model.dtype": "float32",
        "data.train": rows,
        "training.output_dir": run,
        "training.max_steps": 1,
        "training.conversations_per_step": 2,
    }
    if name not in ESTIMATED:
        overrides["training.gradient_checkpointing"] = "full"
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"{key}={value}" for key, value in overrides.items()])
    loss = train(recipe).loss
    assert loss is not None
    assert math.isfinite(loss)
    assert json.loads((run / "environment.json").read_text())["strategy"]["taken"] == "single_pass"
    adapter = load_file(run / "adapter_model.safetensors")
    assert [key for key, tensor in adapter.items() if "lora_B" in key and not tensor.any()] == [], "it did not learn"
    assert [key for key in adapter for part in FROZEN.get(name, ()) if part in key] == []
    config = json.loads((run / "adapter_config.json").read_text())
    assert recipe.lora is not None
    assert config["r"] == recipe.lora.r
    asked = recipe.lora.target_parameters or []
    assert config["target_parameters"] in (None, asked) or set(asked) <= set(config["target_parameters"])
    assert any(".experts." in key for key in adapter) == (name == "qwen3-30b-a3b")
