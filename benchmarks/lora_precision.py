"""What it changes that LoRA computes in the model's dtype: losses over 200 steps, beside PEFT's own way, on the CPU.

    python benchmarks/lora_precision.py --json benchmarks/results/lora-precision.json

Two models, each trained from several seeds on the data of the quickstart: the quickstart's base, and a tiny Qwen3 with
random weights. Weights of adapters are float32 everywhere.

    float32      a float32 model: the yardstick
    peft         a bfloat16 model, adapters in float32: each input is cast, each output added in float32
    model dtype  a bfloat16 model, adapters in bfloat16: what mtr does

A seed decides LoRA's first values and the order of the data, so runs of one seed differ by rounding alone. The claim:
the mean loss in the model's dtype lies above PEFT's by no more than what PEFT's differs between seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mtr.files import write_json
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe
from mtr.training.environment import environment
from mtr.training.loop import train

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
WAYS = {"float32": "float32", "peft": "bfloat16", "model dtype": "bfloat16"}
"""And the dtype of the model."""
LAST = 20
"""Steps at the end of a run whose mean is its final loss."""


def tiny_qwen3(folder: Path) -> Path:
    """Random weights under the quickstart's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(QUICKSTART / "base", folder)
    config = AutoConfig.from_pretrained(str(folder))
    config.update({"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 512, "num_key_value_heads": 1})
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    return folder


def recipe_for(base: Path, dtype: str, seed: int, steps: int, output: Path) -> Recipe:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    return recipe.replace(
        model={"name_or_path": str(base), "dtype": dtype},
        data={"eval": []},
        generation={"conversations": 0},
        training={
            "output_dir": str(output),
            "max_steps": steps,
            "seed": seed,
            "conversations_per_step": 4,
            "logging_steps": 1,
        },
    )


def losses(base: Path, way: str, seed: int, steps: int) -> list[float]:
    """The loss of each step, in nats."""
    as_peft_does: AbstractContextManager[Any] = nullcontext()
    if way == "peft":
        as_peft_does = mock.patch("mtr.model.adapter_layers.compute_in_model_dtype", return_value=0)
    with tempfile.TemporaryDirectory() as folder, as_peft_does:
        output = Path(folder) / "run"
        train(recipe_for(base, WAYS[way], seed, steps, output))
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found = [line["loss"] for line in lines if "loss" in line]
    assert len(found) == steps, (len(found), steps)
    return found


def compare(base: Path, seeds: range, steps: int) -> dict[str, Any]:
    """Mean and final losses of each way and seed, and whether the claim holds."""
    result: dict[str, Any] = {}
    for way in WAYS:
        runs = [losses(base, way, seed, steps) for seed in seeds]
        result[way] = {
            "first": [run[0] for run in runs],
            "mean": [statistics.fmean(run) for run in runs],
            "final": [statistics.fmean(run[-LAST:]) for run in runs],
        }
        print(way, json.dumps(result[way]), flush=True)
    for name in ("mean", "final"):
        peft, ours = result["peft"][name], result["model dtype"][name]
        result[f"{name}_difference"] = statistics.fmean(ours) - statistics.fmean(peft)
        result[f"{name}_spread_over_seeds"] = max(peft) - min(peft)
        result[f"{name}_no_worse"] = result[f"{name}_difference"] <= result[f"{name}_spread_over_seeds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {"steps": options.steps, "final_steps": LAST}
    with tempfile.TemporaryDirectory() as folder:
        models = {"quickstart": QUICKSTART / "base", "tiny qwen3": tiny_qwen3(Path(folder) / "tiny")}
        for name, base in models.items():
            print(name, flush=True)
            result[name] = compare(base, range(1, options.seeds + 1), options.steps)
    result["environment"] = environment(0, torch.device("cpu"), 1, time.strftime("%Y-%m-%d"))
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
