"""What the recipes take of an 80 GB card: weights, gradients, optimizer and the activations of one pack.

    python benchmarks/memory.py [RECIPE ...] [--tokens N] [--card GIB] [--json FILE]

By the storages of fake tensors (`mtr.model.estimate`): no card, no weights and no download are needed, only the shapes
in `benchmarks/shapes`; a recipe that has none there is left out. A recipe fits if weights, gradients and optimizer
leave more than activations / 0.92 free; the rest is for fragmentation. Layers are counted as they are without
torch.compile, which keeps no more.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from mtr.attention.choice import usable_backends
from mtr.attention.model_parts import text_config
from mtr.files import write_json
from mtr.model.checkpointing import MODES
from mtr.recipe.sections import Recipe
from mtr.training.fitting import estimator_of

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CARD = 79.0
"""GiB of an 80 GB H100 that a process can allocate: 79.6, less the CUDA context."""


def shape_of(recipe: Path) -> Path:
    """The folder with the config of a recipe's model."""
    own = recipe.parent / recipe.stem / "base"
    return own if own.exists() else ROOT / "benchmarks" / "shapes" / recipe.stem


def estimate(recipe_file: Path, tokens: int | None = None, card: float = CARD) -> dict[str, Any]:
    """GiB of everything that one process holds.

    Args:
        tokens: of the pack, in place of `sequence.max_tokens`.
        card: GiB that there are.
    """
    recipe = Recipe.model_validate(yaml.safe_load(recipe_file.read_text()))
    config = AutoConfig.from_pretrained(str(shape_of(recipe_file)))
    dtype = getattr(torch, recipe.model.dtype)
    device = torch.device("cuda")
    backends = usable_backends(text_config(config), device, dtype)
    estimator = estimator_of(recipe, config, dtype, backends, device)
    state, weights = estimator.training_state(), estimator.weights()
    tokens = tokens or recipe.sequence.budget
    beside = weights + state.kept
    activations = {mode: estimator.activations(mode, tokens) for mode in MODES}
    fits = [mode for mode in MODES if beside + activations[mode] / estimator.share <= card * GIB]
    return {
        "recipe": recipe_file.name,
        "tokens": tokens,
        "weights": weights / GIB,
        "gradients": state.gradients / GIB,
        "optimizer": state.optimizer / GIB,
        "activations": {mode: size / GIB for mode, size in activations.items()},
        "total": {mode: (beside + size) / GIB for mode, size in activations.items()},
        "card": card,
        "fits": fits,
    }


def described(result: dict[str, Any]) -> str:
    beside = f"weights {result['weights']:.1f}, gradients and optimizer {result['gradients'] + result['optimizer']:.1f}"
    modes = ", ".join(f"{mode} {size:.1f}" for mode, size in result["activations"].items())
    least = next(iter(result["fits"]), None)
    verdict = f"{least} fits, {result['total'][least]:.1f} in all" if least else "nothing fits"
    return (
        f"{result['recipe']}, packs of {result['tokens']:,} tokens, GiB: {beside}; activations {modes}; "
        f"of {result['card']:.1f}: {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(recipe for recipe in (ROOT / "recipes").glob("*.yaml") if shape_of(recipe).exists())
    parser.add_argument("recipes", type=Path, nargs="*", default=known)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--card", type=float, default=CARD)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = [estimate(recipe, options.tokens, options.card) for recipe in options.recipes]
    for result in results:
        print(described(result))
    if options.json:
        write_json(options.json, {"results": results, "torch": torch.__version__})


if __name__ == "__main__":
    main()
