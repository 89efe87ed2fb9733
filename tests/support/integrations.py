"""Trees for other trainers, and their arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml

import mtr
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from support.paths import QUICKSTART

STEPS, PER_STEP, RATE, WARMUP = 20, 4, 5e-3, 2
LORA = {"r": 8, "alpha": 16}


def quickstart_rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """The first rows of the quickstart's data; `changes` go into each assistant message of every second row."""
    with (QUICKSTART / "train.jsonl").open() as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    for row in rows[::2] if changes else []:
        row["messages"] = [{**m, **changes} if m["role"] == "assistant" else m for m in row["messages"]]
    return rows


def dataset(rows: Sequence[Any], **options: Any) -> datasets.Dataset:
    """Trees of rows, without a word and without a cache."""
    made = mtr.TreeBuilder(str(QUICKSTART / "base"), **options)(columns(rows))
    return datasets.Dataset.from_dict(made)


def columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def adapted(model: Any) -> Any:
    """With LoRA that starts as that of a recipe with seed 1."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear"),
    )


def arguments(kind: Any, folder: Path, accumulation: int = 1, **options: Any) -> Any:
    """TrainingArguments or SFTConfig with the schedule of `mtr_losses`."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "optim": "adamw_torch",
        "per_device_train_batch_size": PER_STEP // accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
    }
    if kind is not transformers.TrainingArguments:
        given |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return kind(**{**given, **options})


def losses(trainer: Any) -> list[float]:
    """Of each step."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def mtr_losses(
    model: Path, write_rows: Callable[..., Path], rows: Sequence[Any], lora: bool, **sections: Any
) -> list[float]:
    """Of each step of `mtr train`, in the order of the rows."""
    data = write_rows(list(rows))
    raw = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": LORA if lora else None,
        "data": {"train": str(data), "shuffle": False, "num_workers": 0},
        "training": {
            "output_dir": str(data.parent / "run"),
            "max_steps": STEPS,
            "conversations_per_step": PER_STEP,
            "learning_rate": RATE,
            "warmup_steps": WARMUP,
            "gradient_checkpointing": False,
            "seed": 1,
        },
        **sections,
    }
    recipe = data.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    train(load_recipe(recipe))
    lines = map(json.loads, (data.parent / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "grad_norm" in line]
