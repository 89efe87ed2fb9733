"""Claims: every kind of LoRA that the recipe offers is exact in one pass, and is what it says; what does not fit is
refused, by its size before memory is taken for it; four bits are refused where they cannot be had.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import Tensors, save_tensors
from support.paths import QUICKSTART
from support.runs import trained_run

from mtr.checks.verify import verify
from mtr.errors import UserError
from mtr.model.loading import load_model
from mtr.model.lora import adapted_modules
from mtr.recipe.loading import load_recipe

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("qwen3", {"use_rslora": True}),
    "dora": ("qwen3", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}}),
    "experts": ("qwen3_moe", {"target_parameters": EXPERTS}),
    "experts of gpt-oss": ("gpt_oss", {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exact(write_recipe: Recipes, models: Callable[..., Path], kind: str) -> None:
    architecture, lora = KINDS[kind]
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(architecture))}, lora=lora))
    result = verify(recipe, conversations=2)
    assert result["passed"], result
    assert result["zero_gradients"] == []


def load(path: Path) -> Any:
    return load_model(load_recipe(path), torch.device("cpu"))


def scalings(model: Any, suffix: str) -> set[float]:
    return {
        m.scaling["default"] for name, m in model.named_modules() if name.endswith(suffix) and hasattr(m, "scaling")
    }


def test_scales_and_ranks_are_the_recipes(write_recipe: Recipes) -> None:
    lora = {"r": 16, "alpha": 32, "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}}
    model = load(write_recipe(lora=lora))
    assert scalings(model, "k_proj") == {8.0}
    assert scalings(model, "q_proj") == {16.0}
    assert scalings(model, "v_proj") == {2.0}
    ranks = {name.split(".")[-4]: p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name}
    assert (ranks["q_proj"], ranks["k_proj"]) == (4, 16)


@pytest.mark.parametrize("start", [True, "olora"])
def test_the_adapter_names_the_revision_of_its_base(tmp_path: Path, start: Any) -> None:
    """PEFT's AutoPeftModel loads the base by it, and the newest one without."""
    model = {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32", "revision": "v1"}
    run = trained_run(tmp_path, model=model, lora={"init_lora_weights": start})
    assert json.loads((run / "adapter_config.json").read_text())["revision"] == "v1"


def test_experts_are_adapted(write_recipe: Recipes, models: Callable[..., Path]) -> None:
    lora = {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}
    model = load(write_recipe(model={"name_or_path": str(models("qwen3_moe"))}, lora=lora))
    adapted = adapted_modules(model)
    assert "model.layers.*.self_attn.q_proj" in adapted
    assert any("mlp.experts" in name for name in adapted), adapted


def test_parameters_that_are_not_there_are_refused(write_recipe: Recipes) -> None:
    with pytest.raises(UserError, match=r"lora\.target_parameters: the model has no parameter 'mlp\.experts\.down'"):
        load(write_recipe(lora={"target_parameters": ["mlp.experts.down"]}))


def test_dropout_does_not_reach_parameters(write_recipe: Recipes) -> None:
    with pytest.raises(UserError, match=r"target_parameters work with lora\.dropout: 0\.0 only"):
        load_recipe(write_recipe(lora={"target_parameters": EXPERTS, "dropout": 0.1}))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 129}, "lora.r: 129 is above 128, the smaller side of the model's largest matrix"),
        ({"r": 60_000}, "lora.r: 60000 is above 128"),
        ({"rank_pattern": {"q_proj": 50_000}}, "lora.rank_pattern: q_proj: 50000 is above 128"),
    ],
)
def test_a_rank_beyond_every_matrix_is_refused(
    write_recipe: Recipes, mtr: Mtr, lora: dict[str, Any], words: str
) -> None:
    code, out, err = mtr("verify", write_recipe(lora=lora), "--conversations", 1)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]


def test_a_rank_as_large_as_the_largest_matrix_is_taken(write_recipe: Recipes) -> None:
    assert scalings(load(write_recipe(lora={"r": 128, "alpha": 128})), "q_proj") == {1.0}


# --- an adapter to start from -----------------------------------------------------------------------------------------

NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another shape": (lambda tensors: {**tensors, NAME: tensors[NAME][:, :7].clone()}, f"has {NAME} with shape [2, 7]"),
    "integers": (lambda tensors: {**tensors, NAME: tensors[NAME].to(torch.int8)}, f"has {NAME} as torch.int8"),
    "one missing": (lambda tensors: {n: t for n, t in tensors.items() if n != NAME}, f"does not adapt {NAME}"),
    "compiled": (lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()}, "adapts more: _orig_mod."),
}


@pytest.fixture
def adapter(write_recipe: Recipes, tmp_path: Path) -> Path:
    load(write_recipe(lora={"r": 2})).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def refused(mtr: Mtr, recipe: Path) -> str:
    code, out, err = mtr("verify", recipe, "--conversations", 1)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(write_recipe: Recipes, mtr: Mtr, adapter: Path, name: str) -> None:
    change, words = ADAPTERS[name]
    file = adapter / "adapter_model.safetensors"
    save_tensors(change(load_file(file)), file)
    line = refused(mtr, write_recipe(lora={"r": 2, "init_from": str(adapter)}))
    assert f"lora.init_from: {adapter} {words}" in line


def test_an_adapter_in_pickle_is_not_opened(write_recipe: Recipes, mtr: Mtr, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    line = refused(mtr, write_recipe(lora={"r": 2, "init_from": str(adapter)}))
    assert "holds its adapter only as pickle (adapter_model.bin)" in line


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "[" * 100_000])
def test_an_adapter_config_that_is_none_is_refused(write_recipe: Recipes, mtr: Mtr, adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert "holds no adapter that can be read" in refused(mtr, write_recipe(lora={"r": 2, "init_from": str(adapter)}))


FOUR_BITS = {"model": {"load_in_4bit": True, "name_or_path": str(QUICKSTART / "base")}}


def test_four_bits_need_a_package_and_a_device(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(**FOUR_BITS))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"load_in_4bit needs bitsandbytes: pip install 'mtr\[qlora\]'"):
            load_model(recipe, torch.device("cuda"), quantise=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="load_in_4bit needs a CUDA device"):
        load_model(recipe, torch.device("cpu"), quantise=True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": None, **FOUR_BITS}, "load_in_4bit needs lora"),
        ({**FOUR_BITS, "training": {"parallel": "fsdp2"}}, "load_in_4bit works with training.parallel: ddp only"),
        ({"sequence": {"on_oom": "split"}, "training": {"parallel": "fsdp2"}}, "on_oom: split works with"),
        ({"training": {"parallel": "fsdp2", "optim": "adafactor"}}, "adafactor works with"),
        ({"training": {"preempt_signal": "SIGKILL"}}, "SIGKILL is no signal that a process can catch"),
        ({"training": {"preempt_signal": ["USR1", "NONE"]}}, "SIGNONE is no signal"),
    ],
)
def test_keys_that_exclude_each_other_say_so(write_recipe: Recipes, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(**sections))
    assert words in str(error.value)


@pytest.mark.gpu
def test_four_bits_train_and_merge(write_recipe: Recipes, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from mtr.training.loop import train
    from mtr.training.merge import merge

    summary = train(load_recipe(write_recipe(**FOUR_BITS, training={"max_steps": 3})))
    assert summary.loss is not None
    assert merge(tmp_path / "run", tmp_path / "merged")["difference"] < 1e-3
