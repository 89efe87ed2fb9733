"""Claims: a config that contradicts itself or its weights ends with exit code 2 and one line, in seconds and without
memory being taken for it; a tokenizer with ids that the model has no embeddings for is refused before data and weights
are read, unless these tokens never occur; lengths beyond the model's positions are told.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import Tensors, changed_model, tiny_config
from support.paths import QUICKSTART, SHARED
from support.rendering import load as load_tokenizer
from support.rows import conversation_row

from mtr.attention.layers import common_value
from mtr.errors import UserError
from mtr.model.config import check_config, check_length, check_size, check_vocabulary
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.model.weights import stored_tensors

CPU = torch.device("cpu")

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
FULL = "full_attention"
HUGE = 10**9

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads and key heads": ({"num_attention_heads": 3}, "num_attention_heads (3) is no multiple of num_key_value"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0, and has to be above 0"),
    "no heads": ({"num_attention_heads": 0, "num_key_value_heads": None}, "num_attention_heads is 0"),
    "negative layers": ({"num_hidden_layers": -1, "layer_types": None}, "num_hidden_layers` (-1)"),
    "no layers": ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers is 0"),
    "layer types": ({"layer_types": [FULL]}, "(4) must be equal to the number of"),
    "layer types as text": ({"layer_types": FULL}, "layer_types"),
    "vocabulary as text": ({"vocab_size": "688"}, "vocab_size"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size is 0"),
    "negative vocabulary": ({"vocab_size": -5}, "vocab_size is -5"),
    "width as text": ({"hidden_size": "wide"}, "hidden_size"),
    "fractional width": ({"hidden_size": 128.5}, "hidden_size"),
    "odd head": ({"head_dim": 31}, "even rotary dimension"),
    "positions as text": ({"max_position_embeddings": "many"}, "max_position_embeddings"),
    "no positions": ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    "epsilon": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "unknown activation": ({"hidden_act": "nope"}, "describes no model that can be built: KeyError: 'nope'"),
    "unknown RoPE": ({"rope_parameters": {"rope_type": "nope"}}, "KeyError: 'nope'"),
    "unknown dtype": ({"dtype": "nope"}, "no attribute 'nope'"),
    "integer dtype": ({"dtype": "int8"}, "int8"),
    "padding beyond": ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
    "text as quantization": ({"quantization_config": "x"}, "config.json cannot be used"),
    "many layers": (
        {"num_hidden_layers": HUGE, "layer_types": None},
        "num_hidden_layers is above 10,000, and no model has as many",
    ),
    "wide": ({"hidden_size": HUGE}, "and the weights hold 875,904: it belongs to another model"),
    "wider than numbers": ({"hidden_size": 10**16}, "describes no model that can be built"),
    "many words": ({"vocab_size": HUGE}, "and the weights hold 875,904"),
    "wide layers": ({"intermediate_size": HUGE}, "and the weights hold 875,904"),
    "thousand layers": ({"num_hidden_layers": 1000, "layer_types": None}, "and the weights hold 875,904"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_right_is_refused_at_once(
    write_recipe: Recipes, mtr: Mtr, tmp_path: Path, name: str
) -> None:
    changes, words = CONFIGS[name]
    folder = changed_model(QUICKSTART / "base", tmp_path / "model", **changes)
    recipe = write_recipe(model={"name_or_path": str(folder)})
    reset_peak_memory(CPU)
    before, started = peak_memory(CPU), time.process_time()
    code, out, err = mtr("verify", recipe, "--conversations", 1)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert str(folder) in line
    assert words in line
    assert "Traceback" not in err
    assert time.process_time() - started < 30
    assert peak_memory(CPU) - before < 2**30


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"model_type": 3}', '{"hidden_size": NaN}', "\xff\xfe"]
)
def test_a_config_that_is_none_is_refused(write_recipe: Recipes, mtr: Mtr, tmp_path: Path, text: str) -> None:
    folder = changed_model(QUICKSTART / "base", tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    code, _, err = mtr("verify", write_recipe(model={"name_or_path": str(folder)}))
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")


def test_heads_of_an_odd_width_are_refused() -> None:
    config = transformers.PretrainedConfig(hidden_size=10, num_attention_heads=3, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"hidden_size \(10\) is no multiple of num_attention_heads \(3\)"):
        check_config(config)
    config.head_dim = 4
    check_config(config)
    config.layer_types = [FULL] * 3
    with pytest.raises(ValueError, match="layer_types has 3 entries for 2 layers"):
        check_config(config)


def test_without_files_the_machine_is_the_limit() -> None:
    config = tiny_config("qwen3")
    check_size(config, False, {}, itemsize=2, may_miss=False)
    config.intermediate_size = 10**12
    with pytest.raises(UserError, match=r"which cannot fit in the .* GiB of memory of this machine"):
        check_size(config, False, {}, itemsize=2, may_miss=False)
    stored = stored_tensors([QUICKSTART / "base" / "model.safetensors"])
    with pytest.raises(UserError, match="which cannot fit in the"):
        check_size(config, False, stored, itemsize=0.5, may_miss=True)


def test_random_weights_of_a_giant_are_refused(write_recipe: Recipes, mtr: Mtr, tmp_path: Path) -> None:
    folder = changed_model(QUICKSTART / "base", tmp_path / "model", vocab_size=10**12)
    recipe = write_recipe(model={"name_or_path": str(folder)})
    code, _, err = mtr("bench", recipe, "--random-weights", "--conversations", 1)
    assert code == 2
    assert "cannot fit in the" in err.splitlines()[-1]


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def shortened(rows: int, folder: Path) -> Path:
    """The quickstart's model with fewer embeddings; its tokenizer has 673 ids."""

    def cut(tensors: Tensors) -> Tensors:
        return {n: tensor[:rows] if n == "model.embed_tokens.weight" else tensor for n, tensor in tensors.items()}

    return changed_model(QUICKSTART / "base", folder, cut, vocab_size=rows)


@pytest.mark.parametrize("command", ["train", "verify", "bench"])
def test_a_vocabulary_that_is_too_small_is_refused_at_the_start(
    write_recipe: Recipes, mtr: Mtr, tmp_path: Path, command: str
) -> None:
    folder = shortened(600, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not read yet")
    for rows in (600, 672):
        shutil.rmtree(folder)
        shortened(rows, folder)
        code, _, err = mtr(command, write_recipe(model={"name_or_path": str(folder)}))
        assert code == 2
        line = err.splitlines()[-1]
        assert line.startswith("error: the tokenizer's token ")
        assert f"has id 672, and the model has embeddings for {rows} ids (vocab_size in config.json)" in line
        assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_just_suffices_is_taken(write_recipe: Recipes, mtr: Mtr, tmp_path: Path) -> None:
    folder = shortened(673, tmp_path / "model")
    code, _, err = mtr("verify", write_recipe(model={"name_or_path": str(folder)}), "--conversations", 1)
    assert code == 0, err


@pytest.fixture
def with_image(tmp_path: Path) -> Path:
    """As text models of a larger family are published: a token for images that has no embedding."""
    folder = shortened(673, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(str(folder))
    return folder


def test_a_token_that_never_occurs_needs_no_embedding(
    write_recipe: Recipes, write_rows: Callable[..., Path], mtr: Mtr, with_image: Path
) -> None:
    model = {"name_or_path": str(with_image)}
    code, _, err = mtr("verify", write_recipe(model=model), "--conversations", 1)
    assert code == 0, err
    assert "the model has no embedding for 1 of the tokenizer's tokens ('<image>'): rows must not hold them" in err
    row = conversation_row(turns=1)
    row["messages"][0]["content"] += " <image>"
    rows = write_rows([conversation_row(turns=1), row])
    for command in ("verify", "train"):
        code, _, err = mtr(command, write_recipe(model=model, data={"train": str(rows), "shuffle": False}))
        assert code == 2
        line = err.splitlines()[-1]
        assert "rows.jsonl" in line
        assert "token id 673, and the model has embeddings for 673 ids only; leave this token out of the row" in line


def test_a_token_of_the_template_needs_an_embedding(write_recipe: Recipes, mtr: Mtr, with_image: Path) -> None:
    template = with_image / "chat_template.jinja"
    template.write_text(template.read_text() + "{#- <image> #}")
    code, _, err = mtr("verify", write_recipe(model={"name_or_path": str(with_image)}))
    assert code == 2
    assert "the tokenizer's token '<image>' has id 673" in err.splitlines()[-1]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real tokenizers")
@pytest.mark.parametrize(
    ("name", "published", "largest"),
    [("qwen3", 151_936, 151_668), ("r1-distill-qwen", 151_936, 151_658), ("gpt-oss", 201_088, 200_018)],
)
def test_real_tokenizers_fit_the_models_that_they_come_with(name: str, published: int, largest: int) -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
    for size in (published, largest + 1):
        assert check_vocabulary(tiny_config("qwen3", vocab_size=size), tokenizer) is None
    with pytest.raises(UserError, match="the tokenizer's token"):
        check_vocabulary(tiny_config("qwen3", vocab_size=150_000), tokenizer)


# --- positions --------------------------------------------------------------------------------------------------------


def test_lengths_beyond_the_positions_are_told(write_recipe: Recipes, mtr: Mtr) -> None:
    words = "sequence.max_length (2000) is beyond the 1024 positions of the model"
    assert words in mtr("train", write_recipe(sequence={"max_length": 2000}, training={"max_steps": 1}))[2]
    for length in (2000, 1024):
        _, _, err = mtr("verify", write_recipe(sequence={"max_length": length}), "--conversations", 1)
        assert (words in err) == (length == 2000)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 800}, 3200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
    ],
)
def test_the_scaling_of_rope_counts(rope: dict[str, Any], limit: int) -> None:
    config = tiny_config("qwen3", max_position_embeddings=1000, rope_parameters={"rope_theta": 10_000.0, **rope})
    assert check_length(config, limit) is None
    assert f"beyond the {limit} positions" in str(check_length(config, limit + 1))


def test_rope_of_each_kind_of_layer_counts() -> None:
    config = tiny_config("gemma3", max_position_embeddings=1000)
    assert check_length(config, 1000) is None
    assert "beyond the 1000 positions" in str(check_length(config, 1001))


def test_learned_positions_have_an_end() -> None:
    config = transformers.GPT2Config(n_positions=64)
    assert check_length(config, 64) is None
    with pytest.raises(UserError, match="65 is more than the 64 positions that the model has; lower it"):
        check_length(config, 65)


def test_dynamic_rope_has_no_end() -> None:
    """Its factor is no limit either: it scales as far as a row goes, which is for the strategy to see to."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = tiny_config("llama", max_position_embeddings=64, rope_parameters=rope)
    assert check_length(config, 128) is None
    assert "beyond the 128 positions" in str(check_length(config, 129))


def test_layers_with_heads_of_their_own_are_no_mistake() -> None:
    """Gemma 4's full layers have larger heads, and its config refuses to tell one size for all."""
    config = transformers.Gemma4TextConfig()
    with pytest.raises(RuntimeError):
        _ = config.head_dim
    check_config(config)
    assert common_value(config, "head_dim") == 512
    assert common_value(config, "hidden_size") == config.hidden_size
    assert common_value(config, "no_such_key") is None


def test_an_encoder_decoder_has_no_turns() -> None:
    with pytest.raises(ValueError, match="it is an encoder-decoder"):
        check_config(transformers.T5Config())
