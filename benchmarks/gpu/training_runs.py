"""`mtr train` on a model with random weights: everything that a run does, on folders that look like a user's."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu.results import Measured, clear_memory
from gpu.setting import Size
from mtr.bench.synthetic import Shape, make_rows
from mtr.bench.tokenizer import SPECIAL, TEMPLATE
from mtr.model.device import pick_device
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train

STEPS = 2
ROWS = 6
HELD_OUT = 2
BYTES = 5
"""Tokens of a word and the space after it: the tokenizer has one for each byte."""
WORDS = [f"w{number:03}" for number in range(1000)]


def train_model(folder: Path, recipe: Path, shape: Shape, *overrides: str, steps: int = STEPS) -> Measured:
    """Two steps and an evaluation with a recipe, its model and data replaced.

    Args:
        folder: of the model, from `write_model`; the data and the run are put beside it.
        shape: of the conversations, in tokens.

    Returns:
        What the run wrote of its steps.

    Raises:
        AssertionError: a loss is not finite.
        UserError: as `train`.
    """
    work = folder.parent
    parts = (max(1, words // BYTES) for words in (shape.user, shape.thinking, shape.response))
    made = make_rows(WORDS, Shape(shape.turns, *parts), ROWS * steps + HELD_OUT)
    rows = [json.dumps(row) + "\n" for row in made]
    (work / "train.jsonl").write_text("".join(rows[HELD_OUT:]))
    (work / "eval.jsonl").write_text("".join(rows[:HELD_OUT]))
    data = [f"data.{part}={work / part}.jsonl" for part in ("train", "eval")]
    training = [f"training.output_dir={work / 'run'}", f"training.max_steps={steps}", "training.logging_steps=1"]
    training.append(f"training.conversations_per_step={ROWS}")
    asked = load_recipe(recipe, [f"model.name_or_path={folder}", *data, *training, *overrides])
    state = train(asked, overwrite=True)
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    losses = [line["loss"] for line in trained]
    assert len(losses) == steps, f"{len(losses)} steps were logged"
    assert evaluated, "nothing was evaluated"
    assert all(loss is not None and math.isfinite(loss) for loss in losses + evaluated), (losses, evaluated)
    last = trained[-1]
    return {
        "losses": losses,
        "eval_losses": evaluated,
        "num_tokens": last["num_tokens"],
        "first_seconds": trained[0]["seconds"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens_per_second"],
        "mfu": last["mfu"],
        "peak_memory_bytes": state.peak_memory_bytes,
    }


def write_model(config: dict[str, Any], size: Size, seed: int = 0) -> Path:
    """A folder with random weights, made on the device, and a tokenizer."""
    import transformers

    folder = Path(tempfile.mkdtemp(prefix="mtr-gpu-")) / "model"
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
    loaded = transformers.AutoConfig.for_model(config["model_type"], **values)
    torch.manual_seed(seed)
    dtype = torch.float32 if size.rehearsal else torch.bfloat16
    with pick_device():
        model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=dtype)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    del model
    clear_memory()
    return folder


def _byte_tokenizer() -> Any:
    """Of the class that transformers takes for Qwen2, whatever a folder says; other models take it as well."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    entries = [*SPECIAL, "<|endoftext|>", "<think>", "</think>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: number for number, entry in enumerate(entries)}, merges=[], eos_token=SPECIAL[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
