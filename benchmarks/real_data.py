"""What does one pass save on real conversations? Counts a folder of data with a folder of tokenizers, for one model.

    python benchmarks/real_data.py DATA TOKENIZERS [--model CONFIG] [--json FILE] [--markdown FILE]

Each *.jsonl file of DATA is rendered with the chat template of each tokenizer, merged and counted as training does it
(`mtr.plan`): tokens, FLOPs and the limit of the speed-up over one pass per turn. The model is on the meta device: only
its config is needed, with a vocabulary as large as the tokenizer's. No conversation is cut or dropped for its length.
The last column also merges what the conversations of a step share (`sequence.merge: step`), in packs of 32,768 tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from mtr.files import write_json
from mtr.plan.planning import plan
from mtr.recipe.sections import Recipe

ROOT = Path(__file__).resolve().parents[1]
MERGED = 32768
"""sequence.max_tokens where the conversations of a step are merged."""
HISTORY = {"kept": "kept", "dropped": "dropped", "mixed": "partly kept", "single": "one turn"}


def counted(data: Path, tokenizer: Path, model: Path, longest: int) -> dict[str, Any]:
    """One file with one tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(tokenizer, folder)
        config = AutoConfig.from_pretrained(model)
        config.vocab_size = max(config.vocab_size, len(AutoTokenizer.from_pretrained(folder)))
        config.save_pretrained(folder)
        recipe = Recipe.model_validate(
            {
                "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
                "lora": {"r": 16},
                "data": {"train": str(data), "on_bad_row": "skip", "shuffle": False},
                "sequence": {"max_length": longest, "max_tokens": longest},
                "training": {"output_dir": "unused"},
            }
        )
        known = plan(recipe).as_json()
        merged = plan(recipe.replace(sequence={"merge": "step", "max_length": MERGED, "max_tokens": MERGED})).as_json()
    assert merged["turns"] == known["turns"], f"turns of {data.name} are longer than {MERGED} tokens: raise MERGED"
    kept = ("rows", "conversations", "turns", "untrained_turns", "num_tokens", "pairs", "flops", "history")
    ways = known["num_tokens"]
    return {
        "data": data.stem,
        "tokenizer": tokenizer.name,
        **{name: known[name] for name in kept},
        "turns_continued": known["turns_continued"],
        "tokens_limit": ways["per_turn"] / ways["single_pass"],
        "flops_limit": known["speedup_limit"],
        "speedup_expected": known["speedup_expected"],
        "merged": {
            "max_tokens": MERGED,
            "num_tokens": merged["num_tokens"]["single_pass"],
            "flops_limit": known["flops"]["per_turn"] / merged["flops"]["single_pass"],
        },
        "tokens_by_role": known["tokens_by_role"],
        "longest_conversation": known["lengths"]["conversation"]["maximum"],
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| data | template | turns | supervised | tokens, one pass | tokens, per turn | fewer tokens | fewer FLOPs | "
        "earlier turns | fewer FLOPs, merged |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        tokens = result["num_tokens"]
        lines.append(
            f"| {result['data']} | {result['tokenizer']} | {result['turns']:,} | {tokens['supervised']:,} | "
            f"{tokens['single_pass']:,} | {tokens['per_turn']:,} | {result['tokens_limit']:.2f}x | "
            f"{result['flops_limit']:.2f}x | {HISTORY[result['history']]} | {result['merged']['flops_limit']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of *.jsonl files")
    parser.add_argument("tokenizers", type=Path, help="a folder of tokenizer folders")
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks" / "shapes" / "qwen3-8b")
    parser.add_argument("--longest", type=int, default=2**17, help="sequence.max_length and max_tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    tokenizers = sorted(path.parent for path in options.tokenizers.glob("*/tokenizer_config.json"))
    for data in sorted(options.data.glob("*.jsonl")):
        for tokenizer in tokenizers:
            print(f"{data.name} with {tokenizer.name}", file=sys.stderr)
            results.append(counted(data, tokenizer, options.model, options.longest))
    print(table(results))
    if options.markdown:
        options.markdown.write_text(table(results) + "\n")
    if options.json:
        about = {"model": options.model.name, "lora_r": 16, "longest": options.longest}
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        write_json(options.json, {**about, "versions": versions, "results": json.loads(json.dumps(results))})


if __name__ == "__main__":
    main()
