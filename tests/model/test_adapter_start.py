"""Claims: an adapter that starts as a part of the weights leaves the model as it was; what is saved of it is a plain
adapter for the original weights, of twice the rank and PEFT's own; a checkpoint takes the same part out of them again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtr.errors import UserError
from mtr.model.adapter_start import as_plain_adapter, initial_adapter, twice_the_rank
from mtr.model.lora import add_lora
from mtr.recipe.sections import LoraSection
from mtr.training.checkpoint import save_model

Models = Callable[..., Path]
IDS = torch.arange(3, 40)[None]
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def base(models: Models, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(models("qwen3")), dtype=dtype).eval()


def adapted(models: Models, how: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    section = LoraSection.model_validate({"r": 4, "alpha": 6, "init_lora_weights": how, **lora})
    return add_lora(base(models, dtype), section, seed=0).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.double()
    return found / found.abs().max()


@torch.no_grad()
def train(model: Any) -> None:
    """Made-up updates of some size."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


class NoTokenizer:
    chat_template = None

    def save_pretrained(self, folder: str) -> None: ...


def save(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("mtr.training.checkpoint.save_tokenizer", lambda *_: None)
    save_model(model, NoTokenizer(), folder)
    return folder


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"up_proj": 3}}
SOME = {"modules_to_save": ["norm"], "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("how", "lora"),
    [
        ("pissa", PATTERNS),
        ("pissa", SOME),
        ("pissa_niter_4", {}),
        ("olora", PATTERNS),
        ("orthogonal", PATTERNS),
        ("gaussian", SOME),
    ],
)
def test_the_model_begins_unchanged_and_its_adapter_fits_the_original(
    how: Any, lora: dict[str, Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, model = logits(base(models)), adapted(models, how, **lora)
    torch.testing.assert_close(logits(model), original, atol=2e-6, rtol=0)
    train(model)
    trained = logits(model)
    assert (trained - original).abs().max() > 1e-2, "nothing was trained"
    folder = save(model, tmp_path / "adapter", monkeypatch)
    loaded = PeftModel.from_pretrained(base(models), str(folder)).eval()
    torch.testing.assert_close(logits(loaded), trained, atol=2e-6, rtol=0)
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, atol=5e-6, rtol=0)
    assert logits(model).equal(trained), "saving changed the model"
    assert model.active_peft_config.r == 4, "saving changed its config"


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_is_saved_without_the_part_does_not_fit_the_original(
    how: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other direction: A and B alone belong to what is left of the weights."""
    model = adapted(models, how)
    train(model)
    trained = logits(model)
    model.initial_adapter = {}
    loaded = PeftModel.from_pretrained(base(models), str(save(model, tmp_path / "adapter", monkeypatch))).eval()
    assert (logits(loaded) - trained).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model")
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_start_and_result_are_pefts(how: str, models: Models, tmp_path: Path) -> None:
    """The same A and B as PEFT starts with, and after the same updates the same adapter as PEFT converts."""
    ours = adapted(models, how)
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        init_lora_weights=how,
    )
    theirs = get_peft_model(base(models), config)
    theirs.save_pretrained(str(tmp_path / "initial"))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=0)
    for model in (ours, theirs):
        train(model)
    theirs.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    converted = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    plain = as_plain_adapter(dict(ours.named_parameters()), initial_adapter(ours))
    for name, tensor in converted.items():
        found = plain[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(found, tensor, atol=1e-6, rtol=0)
    with twice_the_rank(ours.active_peft_config):
        assert (ours.active_peft_config.r, ours.active_peft_config.lora_alpha) == (8, 12)


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_takes_the_same_part_out_again(
    how: str, dtype: torch.dtype, models: Models, tmp_path: Path
) -> None:
    """Bit for bit, and without computing it: the part in the checkpoint may come from another machine."""
    model = adapted(models, how, dtype)
    start = initial_adapter(model)
    save_file({f"initial.{name}": tensor for name, tensor in start.items()}, tmp_path / "training_state.safetensors")
    section = LoraSection.model_validate({"r": 4, "alpha": 6, "init_lora_weights": how})
    again = add_lora(base(models, dtype), section, seed=7, checkpoint=tmp_path)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    changed = {f"initial.{name}": 2 * tensor for name, tensor in start.items()}
    save_file(changed, tmp_path / "training_state.safetensors")
    other = add_lora(base(models, dtype), section, seed=7, checkpoint=tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not other.state_dict()[name].equal(model.state_dict()[name]), "the checkpoint was not read"
    changed.popitem()
    save_file(changed, tmp_path / "training_state.safetensors")
    with pytest.raises(UserError, match=r"has no start of .*another recipe's"):
        add_lora(base(models, dtype), section, seed=7, checkpoint=tmp_path)


def test_in_16_bits_the_result_differs_by_the_rounding_of_what_is_left(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(models, "pissa", torch.bfloat16)
    train(model)
    folder = save(model, tmp_path / "adapter", monkeypatch)
    loaded = PeftModel.from_pretrained(base(models, torch.bfloat16), str(folder)).eval()
    difference = (logits(loaded) - logits(model)).abs().max()
    rounding = (logits(base(models, torch.bfloat16)) - logits(base(models))).abs().max()
    assert 0 < difference < 8 * max(float(rounding), 2**-8)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 30}, "k_proj has rank 16 and its adapter 30"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is no plain linear layer"),
    ],
)
def test_a_layer_without_such_a_part_is_named(lora: dict[str, Any], words: str, models: Models) -> None:
    with pytest.raises(UserError, match=words):
        adapted(models, "pissa", **lora)


def test_a_head_that_is_tied_to_the_embeddings_is_refused(models: Models) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(models("qwen3", tie_word_embeddings=True)))
    section = LoraSection(r=4, target_modules=["lm_head"], init_lora_weights="pissa")
    with pytest.raises(UserError, match="lm_head shares its weights with another layer"):
        add_lora(model, section, 0)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_loftq_makes_up_for_a_part_of_what_4_bits_lose(models: Models) -> None:
    from peft.utils.integrations import dequantize_module_weight
    from transformers import BitsAndBytesConfig

    from mtr.model.adapter_start import make_up_for_quantization
    from mtr.model.weights import stored_tensors, weight_files

    folder = models("qwen3")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=four, dtype=torch.float32)
    model = add_lora(quantized, LoraSection(r=8, alpha=12, init_lora_weights="loftq"), 0)
    make_up_for_quantization(model, stored_tensors(weight_files(str(folder), None)))
    assert initial_adapter(model) == {}
    for name, weight in base(models).named_parameters():
        if not name.endswith("proj.weight"):
            continue
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        lost = weight - dequantize_module_weight(layer.base_layer)
        left = lost - 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = torch.linalg.svdvals(lost)[8:].norm()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=0, msg=name)
        assert left.norm() < 0.9 * lost.norm(), name
