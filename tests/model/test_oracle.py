"""Claims: after loading, every parameter in memory is the tensor of the file, bit for bit in the dtype asked for, with
every kind of model, with LoRA and without, tied, sharded and converted; the parameters that are not in the file
are the tied ones and LoRA's own, each of which is listed.

The files are read here on their own, and fused experts are put together here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.models import EXACT, Tensors, changed_model, save_sharded, tiny_config
from support.paths import QUICKSTART
from torch import Tensor

from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe

Models = Callable[..., Path]
Recipes = Callable[..., Path]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"gemma2", "gemma3", "tied qwen3"}
KINDS = [*EXACT, "tied qwen3"]
LORA: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "whole modules": {"modules_to_save": ["embed_tokens"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


def random_like(tensors: Tensors) -> Tensors:
    """Other values everywhere, in norms too: those are ones in a new model, so a new one would not show."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator).mul(0.1).to(tensor.dtype)
        for name, tensor in sorted(tensors.items())
    }


@pytest.fixture
def folder(models: Models, tmp_path: Path) -> Callable[[str], Path]:
    """`folder("gemma2")` holds a model of this kind with random values in every tensor."""

    def make(kind: str) -> Path:
        source = models(kind.removeprefix("tied "))
        if not kind.startswith("tied "):
            return changed_model(source, tmp_path / "model", random_like)

        def without_head(tensors: Tensors) -> Tensors:
            return {name: tensor for name, tensor in random_like(tensors).items() if name != HEAD}

        return changed_model(source, tmp_path / "model", without_head, tie_word_embeddings=True)

    return make


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def file_tensors(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The hash of each tensor under the name that the model has for it."""
    stored: Tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            stored |= {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    return {name: digest(tensor) for name, tensor in fuse_experts(stored).items()}


def fuse_experts(stored: Tensors) -> Tensors:
    """One matrix per expert and kind becomes one tensor for all experts, gate above up."""
    fused = {name: tensor for name, tensor in stored.items() if ".experts.0." not in name}
    for name in stored:
        if found := re.fullmatch(r"(.*\.experts)\.0\.down_proj\.weight", name):
            count = sum(name.startswith(f"{found[1]}.") and "down_proj" in name for name in stored)
            kinds = ("gate_proj", "up_proj", "down_proj")
            gate, up, down = ([fused.pop(n, stored[n]) for n in each(found[1], kind, count)] for kind in kinds)
            fused[f"{found[1]}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
            fused[f"{found[1]}.down_proj"] = torch.stack(down)
    return fused


def each(experts: str, kind: str, count: int) -> list[str]:
    return [f"{experts}.{number}.{kind}.weight" for number in range(count)]


def compare(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """Names of the parameters that are in the file, that are its embeddings under another name, and that are not."""
    stored = file_tensors(folder, dtype)
    found: dict[str, list[str]] = {"equal": [], "tied": [], "different": [], "fresh": []}
    for name, tensor in model.state_dict().items():
        plain = re.sub(r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.default", "", name)
        if plain in stored:
            found["equal" if digest(tensor) == stored[plain] else "different"].append(plain)
        elif plain == HEAD and digest(tensor) == stored[EMBEDDINGS]:
            found["tied"].append(plain)
        else:
            found["fresh"].append(plain)
    assert stored.keys() == set(found["equal"] + found["different"]), "a tensor of the file is nowhere in memory"
    return found


def load(recipe: Path) -> Any:
    return load_model(load_recipe(recipe), torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_the_files(write_recipe: Recipes, folder: Callable[[str], Path], kind: str) -> None:
    path = folder(kind)
    model = load(write_recipe(model={"name_or_path": str(path)}, lora=None))
    found = compare(model, path)
    assert (found["different"], found["fresh"]) == ([], [])
    assert found["tied"] == ([HEAD] if kind in TIED else [])
    if kind in TIED:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


ADAPTED = [(kind, "all linear layers") for kind in KINDS]
ADAPTED += [("qwen3", "whole modules"), ("qwen3_moe", "experts"), ("gpt_oss", "experts")]


@pytest.mark.parametrize(("kind", "lora"), ADAPTED)
def test_under_lora_only_the_adapter_is_new(
    write_recipe: Recipes, folder: Callable[[str], Path], kind: str, lora: str
) -> None:
    path = folder(kind)
    model = load(write_recipe(model={"name_or_path": str(path)}, lora={"r": 2, **LORA[lora]}))
    found = compare(model, path)
    assert found["different"] == []
    assert found["tied"] == ([HEAD] if kind in TIED else [])
    trained = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    assert {re.sub(r"\.base_layer", "", name) for name in trained if ".lora_" in name} == set(found["fresh"])
    assert all(re.search(r"\.lora_[AB]\.default\.weight$", name) for name in found["fresh"])
    assert found["fresh"]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_shards_are_read_whole(write_recipe: Recipes, folder: Callable[[str], Path], kind: str) -> None:
    path = folder(kind)
    with safe_open(str(path / "model.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_sharded(tensors, path, shards=3)
    found = compare(load(write_recipe(model={"name_or_path": str(path)}, lora=None)), path)
    assert (found["different"], found["fresh"], found["tied"]) == ([], [], [])


@pytest.mark.parametrize(("asked", "dtype"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_weights_in_bfloat16_keep_their_values(write_recipe: Recipes, asked: str, dtype: torch.dtype) -> None:
    base = QUICKSTART / "base"
    found = compare(load(write_recipe(model={"name_or_path": str(base), "dtype": asked}, lora=None)), base, dtype)
    assert (found["different"], found["fresh"], found["tied"]) == ([], [], [HEAD])


def test_a_head_of_its_own_beside_a_config_that_ties_it_stays_its_own(
    write_recipe: Recipes, models: Models, tmp_path: Path
) -> None:
    path = changed_model(models("qwen3"), tmp_path / "model", random_like, tie_word_embeddings=True)
    found = compare(load(write_recipe(model={"name_or_path": str(path)}, lora=None)), path)
    assert (found["different"], found["fresh"], found["tied"]) == ([], [], [])
    assert HEAD in found["equal"]


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Values of four bits in MXFP4; 32 of them share a power of two."""


def test_four_bit_experts_of_gpt_oss_are_unpacked_exactly(
    write_recipe: Recipes, models: Models, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = tiny_config("gpt_oss", **sizes, vocab_size=688)
    dense = AutoModelForCausalLM.from_config(config).state_dict()
    packed, wanted = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in dense.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        experts, rows, columns = tensor.shape[0], tensor.shape[2], tensor.shape[1]
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(-2)
        wanted[name] = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    changes = {**sizes, "layer_types": config.layer_types, "vocab_size": 688}
    changes["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    path = changed_model(models("gpt_oss"), tmp_path / "model", lambda _: packed, **changes)
    memory = load(write_recipe(model={"name_or_path": str(path)}, lora=None)).state_dict()
    assert len(wanted) == 2
    for name, tensor in {**packed, **wanted}.items():
        if not name.endswith(("_blocks", "_scales")):
            assert digest(memory[name].float()) == digest(tensor.float()), name


# --- the oracle can fail ----------------------------------------------------------------------------------------------


def test_the_oracle_notices_a_tensor_of_another_name(
    write_recipe: Recipes, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Plain transformers loads such a file without an error, and starts the parameter anew."""
    from transformers import AutoModelForCausalLM

    name = "model.layers.1.input_layernorm.weight"

    def renamed(tensors: Tensors) -> Tensors:
        return {f"{n}s" if n == name else n: tensor for n, tensor in tensors.items()}

    other = changed_model(folder("qwen3"), tmp_path / "other", renamed)
    model = AutoModelForCausalLM.from_pretrained(str(other), dtype=torch.float32)
    with pytest.raises(AssertionError, match="a tensor of the file is nowhere in memory"):
        compare(model, other)
    found = compare(model, tmp_path / "model")
    assert found["different"] == [name]


def test_the_oracle_notices_one_changed_value(write_recipe: Recipes, folder: Callable[[str], Path]) -> None:
    path = folder("qwen3_moe")
    model = load(write_recipe(model={"name_or_path": str(path)}, lora=None))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with torch.no_grad():
        model.get_parameter(name)[3, -1, -1] += 1e-6
    assert compare(model, path)["different"] == [name]
