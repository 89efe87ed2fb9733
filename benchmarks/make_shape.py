"""A random model and conversations of one shape, to benchmark on: words are tokens, so the shape is exact.

    python benchmarks/make_shape.py FOLDER --turns 8 --words 60 150 60
    mtr bench FOLDER/recipe.yaml

The model is a randomly initialised Qwen3 of 6 layers and width 512 (or as asked) with a word-level tokenizer of at
most 4,096 entries and a chat template that drops the thinking of earlier turns.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

TEMPLATE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|> ' + m.role + ' ' -}}
{%- if m.reasoning_content and loop.index0 > ns.last -%}
{{- '<think> ' + m.reasoning_content + ' </think> ' -}}
{%- endif -%}
{{- m.content + ' <|im_end|> ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|> assistant ' -}}{%- endif -%}
"""
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    entries = [*SPECIAL, "<think>", "</think>", "user", "assistant", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def make_rows(words: list[str], turns: int, shape: list[int], count: int) -> list[dict[str, object]]:
    """Conversations whose user messages, thinkings and responses have `shape` words each."""
    rng = random.Random(0)
    user, thinking, response = shape

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    rows: list[dict[str, object]] = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        for _ in range(turns):
            messages.append({"role": "user", "content": text(user)})
            answer = {"role": "assistant", "content": text(response)}
            messages.append(answer | ({"reasoning_content": text(thinking)} if thinking else {}))
        rows.append({"messages": messages})
    return rows


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

    words = [f"w{i}" for i in range(arguments.vocabulary - len(SPECIAL) - 4)]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=max(1, arguments.width // 128),
        head_dim=64,
        max_position_embeddings=131072,
    )
    folder: Path = arguments.folder
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    make_tokenizer(words).save_pretrained(folder / "model")
    rows = make_rows(words, arguments.turns, arguments.words, arguments.conversations)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longest = arguments.turns * (arguments.words[0] + arguments.words[2] + 6) + arguments.words[1] + 4
    recipe = {
        "model": {"name_or_path": "model", "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "sequence": {"max_length": longest, "max_tokens": 16384 if longest < 16384 else longest},
        "training": {"output_dir": "run", "gradient_checkpointing": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    print(f"{folder}/recipe.yaml: {arguments.turns} turns of {' + '.join(map(str, arguments.words))} words")


if __name__ == "__main__":
    main()
