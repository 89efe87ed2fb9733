"""How much faster is one pass on real conversations? Times a folder of data with a folder of tokenizers, here.

    python benchmarks/real_speed.py DATA TOKENIZERS [--conversations N] [--repeats N] [--json FILE] [--markdown FILE]

As `mtr bench` does it: the first conversations of each *.jsonl file, rendered with the chat template of each tokenizer,
forward and backward in one pass and packed per turn. The model is a small random Qwen3 with LoRA. Ids are taken
modulo 4,096, a vocabulary with which the output head has the share of the work that it has in a large model. Nothing
else should run beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from make_shape import small_config
from transformers import AutoTokenizer

from mtr.bench.runs import measure, set_up
from mtr.bench.setup import Options
from mtr.chat.loading import load_renderer
from mtr.checks.sample import first_views
from mtr.files import write_json
from mtr.model.device import device_name
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Recipe
from mtr.tree.layout import View

VOCABULARY = 4096


def timed(data: Path, tokenizer: Path, conversations: int, repeats: int) -> dict[str, Any]:
    """One file with one tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        small_config(layers=6, width=256, vocabulary=VOCABULARY).save_pretrained(name)
        recipe = Recipe.model_validate(
            {
                "model": {"name_or_path": str(tokenizer), "dtype": "float32"},
                "data": {"train": str(data), "on_bad_row": "skip", "shuffle": False},
                "sequence": {"max_length": 2**15, "max_tokens": 2**15},
                "training": {"output_dir": "unused", "gradient_checkpointing": False},
            }
        )
        builder = Builder(recipe, load_renderer(recipe, AutoTokenizer.from_pretrained(tokenizer)))
        views = [[_small(view) for view in turns] for turns in first_views(recipe, builder.turns, conversations)]
        model = recipe.replace(model={"name_or_path": name})
        measured = measure(set_up(model, Options(random_weights=True, padded=False)), views, 0, repeats)
    return {"data": data.stem, "tokenizer": tokenizer.name, **measured}


def _small(view: View) -> View:
    return View(view.prompt_ids % VOCABULARY, view.completion_ids % VOCABULARY, view.weights, view.turn)


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| data | template | conversations | turns | speed-up, measured | limit |", "|---|---|---|---|---|---|"]
    for result in results:
        shape, speedup, limit = result["shape"], result["speedup"], result["limit"]
        lines.append(
            f"| {result['data']} | {result['tokenizer']} | {shape['conversations']} | {shape['turns']} | "
            f"{speedup['vs_per_turn_packed']:.2f}x | {limit['flops']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of *.jsonl files")
    parser.add_argument("tokenizers", type=Path, help="a folder of tokenizer folders")
    parser.add_argument("--conversations", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results: list[dict[str, Any]] = []
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    device = device_name(torch.device("cpu"))
    for data in sorted(options.data.glob("*.jsonl")):
        for tokenizer in sorted(path.parent for path in options.tokenizers.glob("*/tokenizer_config.json")):
            print(f"{data.name} with {tokenizer.name}", file=sys.stderr)
            results.append(timed(data, tokenizer, options.conversations, options.repeats))
            if options.json:  # what there is, should the rest be cut short
                write_json(options.json, {"versions": versions, "device": device, "results": results})
    print(table(results))
    if options.markdown:
        options.markdown.write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
