"""Writes a random model, conversations of one shape, and a recipe for them: for verify, inspect, train or bench.

    python benchmarks/make_shape.py FOLDER --turns 8 --words 60 150 60
    mtr bench FOLDER/recipe.yaml

The model is a randomly initialised Qwen3 with 6 layers and width 512 by default, a word-level tokenizer of at most
4,096 entries, and a chat template that drops the thinking of earlier turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from mtr.bench.synthetic import Shape, make_rows
from mtr.bench.tokenizer import make_tokenizer, make_words


def small_config(layers: int, width: int, vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        max_position_embeddings=131072,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--words", type=int, nargs=3, default=[60, 150, 60], metavar=("USER", "THINKING", "RESPONSE"))
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    arguments = parser.parse_args()

    shape = Shape(arguments.turns, *arguments.words)
    words = make_words(arguments.vocabulary)
    torch.manual_seed(0)
    folder: Path = arguments.folder
    model = AutoModelForCausalLM.from_config(small_config(arguments.layers, arguments.width, arguments.vocabulary))
    model.save_pretrained(folder / "model")
    make_tokenizer(words).save_pretrained(folder / "model")
    rows = make_rows(words, shape, arguments.conversations)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": "model", "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "sequence": {"max_length": shape.longest, "max_tokens": max(16384, shape.longest)},
        "training": {"output_dir": "run", "gradient_checkpointing": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    print(f"{folder}/recipe.yaml: {arguments.turns} turns of {' + '.join(map(str, arguments.words))} words")


if __name__ == "__main__":
    main()
