"""Does `mtr plan` predict the speed-up that is measured? Five shapes of conversations, a small model, this device.

    python benchmarks/plan_check.py [--repeats 7] [--json results/plan-check.json]

For each shape (turns; words of user, thinking, response) a recipe with a synthetic conversation is planned, and the
conversation is taken through the model in one pass and in one pass per turn, packed, forward and backward. The two take
turns, so that what slows the machine slows both; the speed-up is the median of the ratios of pairs. Counted tokens and
FLOPs have to be the same on both sides. Nothing else should run on the machine. Exits with 1 if a prediction is off by
more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from make_shape import small_config

from mtr.bench.cases import packed_case
from mtr.bench.runs import set_up
from mtr.bench.setup import Options
from mtr.bench.synthetic import Shape, make_rows
from mtr.bench.timing import take_turns
from mtr.bench.tokenizer import make_tokenizer, make_words
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.sample import first_views
from mtr.files import write_json
from mtr.model.device import device_name
from mtr.plan.planning import plan
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Recipe
from mtr.tree.packing import merge_conversations

SHAPES = (
    Shape(3, 60, 150, 60),
    Shape(8, 60, 150, 60),
    Shape(16, 40, 40, 60),
    Shape(6, 200, 400, 100),
    Shape(12, 150, 20, 60),
)
TOLERANCE = 0.15
VOCABULARY = 2048


def write_recipe(folder: Path, shape: Shape, width: int, layers: int) -> Recipe:
    words = make_words(VOCABULARY)
    small_config(layers, width, VOCABULARY).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    rows = make_rows(words, shape, 1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(folder), "dtype": "float32"},
            "lora": {"r": 8},
            "data": {"train": str(folder / "rows.jsonl")},
            "sequence": {"max_length": max(4096, shape.longest), "max_tokens": max(16384, shape.longest)},
            "training": {"output_dir": "unused", "gradient_checkpointing": False},
        }
    )


def check(shape: Shape, width: int, layers: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), shape, width, layers)
        planned = plan(recipe)
        setup = set_up(recipe, Options(random_weights=True))
        views = first_views(recipe, Builder(recipe, load_renderer(recipe, load_tokenizer(recipe))).turns, 1)
    cases = []
    for strategy in ("single_pass", "per_turn"):
        layouts = merge_conversations(views, strategy, "conversation", recipe.sequence.budget)
        cases.append(packed_case(setup, strategy, layouts, setup.usable[0]))
    for case, work in zip(cases, (planned.single_pass, planned.per_turn), strict=True):
        assert (case.num_tokens, case.flops) == (work.way.tokens, work.total), "counts differ"
    one, apart = take_turns(setup.model, setup.device, cases, repeats)
    ratios = [many / few for few, many in zip(one.seconds, apart.seconds, strict=True)]
    measured = statistics.median(ratios)
    assert planned.expected is not None
    return {
        **vars(shape),
        "tokens": [case.num_tokens for case in cases],
        "limit_by_flops": planned.limit,
        "predicted": planned.expected,
        "measured": measured,
        "ratios": ratios,
        "seconds": [statistics.median(one.seconds), statistics.median(apart.seconds)],
        "off_by": planned.expected / measured - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("mtr").setLevel(logging.ERROR)
    results = []
    for shape in SHAPES:
        result = check(shape, options.width, options.layers, options.repeats)
        results.append(result)
        print(
            f"{shape.in_words}: predicted {result['predicted']:.2f}x, measured {result['measured']:.2f}x "
            f"({min(result['ratios']):.2f} to {max(result['ratios']):.2f}), off by {result['off_by']:+.0%}",
            flush=True,
        )
    if options.json:
        about = {
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "width": options.width,
            "layers": options.layers,
            "repeats": options.repeats,
            "tolerance": TOLERANCE,
        }
        write_json(options.json, {**about, "results": results})
    sys.exit(1 if any(abs(result["off_by"]) > TOLERANCE for result in results) else 0)


if __name__ == "__main__":
    main()
