"""What speed-up can one pass reach? Counts the limit by tokens and by FLOPs for a model and shapes of conversations.

    python benchmarks/limits.py benchmarks/shapes/qwen3-8b --user 100 --response 200

Nothing is run: the model is on the meta device, and the conversations are counted as trees and as separate turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from mtr.bench.synthetic import Shape, make_views
from mtr.files import write_json
from mtr.model.flops import FlopCounter
from mtr.tree.packing import build_layouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--user", type=int, default=100)
    parser.add_argument("--response", type=int, default=200)
    parser.add_argument("--thinking", type=int, nargs="+", default=[0, 200, 500, 1000, 2000, 4000])
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model))
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    counter = FlopCounter(model)
    points = []
    for thinking in arguments.thinking:
        for turns in arguments.turns:
            (views,) = make_views(Shape(turns, arguments.user, thinking, arguments.response), 1, 4096)
            tree, apart = (build_layouts(views, strategy, 2**20) for strategy in ("single_pass", "per_turn"))
            tokens = [sum(layout.num_tokens for layout in layouts) for layouts in (tree, apart)]
            flops = counter.of_layouts(apart) / counter.of_layouts(tree)
            points.append({"turns": turns, "thinking": thinking, "tokens": tokens[1] / tokens[0], "flops": flops})
    for name in ("tokens", "flops"):
        print(
            f"limit by {name}, user {arguments.user} and response {arguments.response} tokens, {arguments.model.name}"
        )
        print("thinking", *(f"{f'{turns} turns':>9}" for turns in arguments.turns))
        for thinking in arguments.thinking:
            row = [point[name] for point in points if point["thinking"] == thinking]
            print(f"{thinking:>8}", *(f"{value:>8.2f}x" for value in row))
    if arguments.json:
        lengths = {"user": arguments.user, "response": arguments.response}
        write_json(arguments.json, {"model": arguments.model.name, **lengths, "points": points})


if __name__ == "__main__":
    main()
