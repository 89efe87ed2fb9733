"""Claims: of a checkpoint for images and text the class that it names is loaded, as strictly as any other; only what
text passes is trained or adapted; one pass over a tree is exact inside the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.image_text import IMAGE_TEXT, image_text_config, save_image_text
from support.models import changed_model, tiny_config
from support.paths import QUICKSTART

from mtr.attention.model_parts import decoder, freeze_idle, idle_parts, output_embeddings
from mtr.errors import UserError
from mtr.model.auto_class import auto_class
from mtr.model.loading import load_config, load_model
from mtr.model.lora import adapted_modules, add_lora
from mtr.model.probe import TOLERANCE, judge, probe
from mtr.model.shrink import shrink
from mtr.model.tree_model import TreeModel
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import LoraSection
from mtr.training.fitting import estimator_of

Recipes = Callable[..., Path]
CPU = torch.device("cpu")
TOWERS = {
    "qwen3_vl": {"model.visual"},
    "qwen3_5": {"model.visual"},
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
}


def mllama() -> Any:
    """Its decoder has layers that look at images only."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    return transformers.MllamaConfig(text_config=text, vision_config=vision)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return auto_class(config).from_config(config)


@pytest.fixture
def recipe_of(write_recipe: Recipes, tmp_path: Path) -> Callable[..., Any]:
    def make(kind: str, tensors: Any = None, **sections: Any) -> Any:
        save_image_text(kind, QUICKSTART / "base", tmp_path / "model")
        folder = tmp_path / "model"
        if tensors is not None:
            folder = changed_model(folder, tmp_path / "changed", tensors)
        return load_recipe(write_recipe(model={"name_or_path": str(folder), "dtype": "float32"}, **sections))

    return make


# --- the class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named", "taken"),
    [
        ("Qwen3Config", "Qwen3ForCausalLM", "CausalLM"),
        ("Qwen3Config", None, "CausalLM"),
        ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "ImageTextToText"),
        ("Qwen3_5Config", None, "ImageTextToText"),
        ("Qwen3_5Config", "Qwen3_5ForCausalLM", "CausalLM"),
        ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", "CausalLM"),
        ("Mistral3Config", "Mistral3ForConditionalGeneration", "ImageTextToText"),
        ("Llama4Config", "Llama4ForConditionalGeneration", "ImageTextToText"),
        ("VoxtralConfig", "VoxtralForConditionalGeneration", "MultimodalLM"),
        ("BertConfig", "BertForNextSentencePrediction", "CausalLM"),
    ],
)
def test_the_class_that_a_config_names_is_taken(config: str, named: str | None, taken: str) -> None:
    made = getattr(transformers, config)()
    made.architectures = [named] if named else None
    assert auto_class(made) is getattr(transformers, f"AutoModelFor{taken}")


def test_code_that_comes_with_a_model_is_taken() -> None:
    config = transformers.Qwen3VLConfig(auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert auto_class(config) is transformers.AutoModelForCausalLM


# --- what text passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_towers_are_found_and_frozen(kind: str) -> None:
    model = model_of(image_text_config(kind))
    assert set(idle_parts(model)) == TOWERS[kind]
    freeze_idle(model)
    inside = {*decoder(model).parameters(), *output_embeddings(model).parameters()}
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == inside


def test_layers_that_look_at_images_only_are_frozen() -> None:
    model = model_of(mllama())
    assert "model.language_model.layers.1" in idle_parts(model)
    freeze_idle(model)
    frozen = {name.split(".")[3] for name, p in decoder(model).named_parameters("a.b") if not p.requires_grad}
    assert frozen == {"1"}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5", "gpt_oss", "bamba"])
def test_a_causal_lm_has_no_towers(kind: str) -> None:
    model = model_of(tiny_config(kind))
    assert idle_parts(model) == {}
    freeze_idle(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_causal_lm_inside_is_seen_through() -> None:
    with torch.device("meta"):
        model = model_of(shrink(transformers.Llama4Config()))
    assert type(decoder(model)).__name__ == "Llama4TextModel"
    assert output_embeddings(model) is model.language_model.lm_head
    assert decoder(decoder(model)) is decoder(model)


# --- one pass over a tree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_a_tree_is_exact_in_the_whole_model(kind: str) -> None:
    assert probe(image_text_config(kind)) < TOLERANCE


GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Glm4vConfig": {"text_config": {"rope_parameters": GLM_ROPE}},
    "Glm4vMoeConfig": {"text_config": {"rope_parameters": GLM_ROPE, "head_dim": 128}},
    "Gemma4Config": {},
    "InternVLConfig": {},
    "Kimi_K25Config": {},
    "LlavaConfig": {},
    "MllamaConfig": {},
    "Qwen2_5_VLConfig": {"text_config": {"rope_parameters": QWEN_ROPE}},
    "SmolVLMConfig": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_exact(family: str) -> None:
    config = getattr(transformers, family)(**FAMILIES[family])
    assert probe(shrink(config)) < TOLERANCE
    assert judge(config, 1024).tree is None


def test_positions_of_text_are_those_of_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other direction: counted along the row, they are not what Qwen-VL's own 3-D positions are."""
    hidden = TreeModel.hidden

    def along_the_row(self: TreeModel, batch: Any) -> Any:
        batch.position_ids[0] = torch.arange(batch.position_ids.shape[1])
        return hidden(self, batch)

    monkeypatch.setattr(TreeModel, "hidden", along_the_row)
    assert probe(image_text_config("qwen3_vl")) > 1e-3


def test_a_factor_of_the_logits_that_the_whole_model_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere's text model scales its logits, and the model for images around it does not."""
    config = shrink(transformers.Cohere2VisionConfig())
    assert config.text_config.logit_scale != 1
    assert probe(config) < TOLERANCE
    monkeypatch.setattr("mtr.model.tree_model._UNSCALED", ())
    assert probe(config) > 0.1


def test_a_model_whose_tokens_see_those_after_them_is_refused(write_recipe: Recipes, tmp_path: Path) -> None:
    transformers.PaliGemmaConfig().save_pretrained(str(tmp_path / "model"))
    recipe = load_recipe(write_recipe(model={"name_or_path": str(tmp_path / "model")}))
    with pytest.raises(UserError, match="use_bidirectional_attention: tokens see those after them"):
        load_config(recipe)


# --- weights ----------------------------------------------------------------------------------------------------------


def without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def test_weights_of_a_tower_have_to_be_there(recipe_of: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"nothing is there for 2 parameters \(model\.visual\.patch_embed"):
        load_model(recipe_of("qwen3_vl", without("visual.patch_embed"), lora=None), CPU)


def test_weights_without_a_place_are_refused(recipe_of: Callable[..., Any]) -> None:
    def more(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"model.visual.more.weight": torch.zeros(2)}

    with pytest.raises(UserError, match=r"no place for 1 tensor \(model\.visual\.more\.weight\)"):
        load_model(recipe_of("qwen3_vl", more, lora=None), CPU)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_towers_count_in_the_memory_of_weights_and_not_in_what_is_gathered(
    recipe_of: Callable[..., Any], kind: str
) -> None:
    recipe = recipe_of(kind, lora=None)
    model = load_model(recipe, CPU)
    estimator = estimator_of(recipe, load_config(recipe), torch.float32, ["segment"], CPU)
    everything = [*model.parameters(), *model.buffers()]
    assert estimator.weights() == sum(tensor.numel() * tensor.element_size() for tensor in everything)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (estimator.training_state().gradients, estimator.gathered()) == (trained, 2 * trained)


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "out_proj", "linear_fc1", "fc1"], r".*\.(q_proj|fc1)"])
@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_an_adapter_is_for_the_text_decoder(kind: str, targets: Any) -> None:
    adapted = add_lora(model_of(image_text_config(kind)), LoraSection(r=2, target_modules=targets), 0)
    assert all(name.startswith("model.language_model.layers.") for name in adapted_modules(adapted))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".language_model." in name for name in trained)
    if targets == "all-linear":
        assert {
            name.rpartition(".")[2] for name in adapted_modules(adapted)
        } == adapted.active_peft_config.target_modules


def test_the_head_may_be_adapted() -> None:
    lora = LoraSection(r=2, target_modules=["q_proj", "lm_head"])
    assert "lm_head" in adapted_modules(add_lora(model_of(image_text_config("qwen3_5")), lora, 0))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["linear_fc1"]}, "^lora: .*excluded"),
        ({"modules_to_save": ["merger"]}, r"^lora\.modules_to_save: merger is in model\.visual\.merger, which text"),
        (
            {"target_parameters": ["pos_embed.weight"]},
            r"^lora\.target_parameters: pos_embed\.weight is in model\.visual",
        ),
        ({"modules_to_save": ["none"]}, r"^lora\.modules_to_save: the model has no module 'none'"),
    ],
)
def test_what_nothing_would_train_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(model_of(image_text_config("qwen3_vl")), LoraSection(r=2, **lora), 0)


def test_an_adapter_of_the_text_part_alone_is_another_ones(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    """Why the named class is loaded: the causal LM that could be cut out of it has other names."""
    recipe = recipe_of("qwen3_5")
    text = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    add_lora(text, LoraSection(r=2), 0).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"lora\.init_from: .* (does not adapt|adapts more)"):
        load_model(recipe.replace(lora={"r": 2, "init_from": str(tmp_path / "adapter")}), CPU)
