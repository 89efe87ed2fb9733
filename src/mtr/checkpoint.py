"""What a run leaves on disk, and how it goes on from there.

    output_dir/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter (all weights where there is no LoRA)
      tokenizer files, chat_template.jinja             as they came with the model
      recipe.yaml, environment.json, metrics.jsonl
      checkpoint-20/                                   the same weights, optimizer and schedule

There is no random state to save: each step seeds its own (see `mtr.train`). A checkpoint is written under another
name, flushed to the disk and renamed, so one that has its name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mtr.errors import UserError

_WRITTEN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "metrics.jsonl",
    "rejects.jsonl",
    "generations.jsonl",
)
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The adapter (or the whole model) with its tokenizer and the original chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-{step}` whole or not at all, and remove those beyond `keep`."""
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, tokenizer, partial)
    tensors, plain = _split_tensors(optimizer.state_dict())
    trainable = {f"parameter.{n}": p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file({**tensors, **_unshared(trainable)}, str(partial / "training_state.safetensors"))
    whole = {**state, "step": step, "optimizer": plain, "schedule": schedule.state_dict()}
    (partial / "training_state.json").write_text(json.dumps(whole))
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(output_dir)
    if keep is not None:
        for _, old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def remove_run(output_dir: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for folder in [*(path for _, path in _checkpoints(output_dir)), *output_dir.glob(".checkpoint-*.partial")]:
        shutil.rmtree(folder)
    for pattern in _WRITTEN:
        for path in output_dir.glob(pattern):
            if path.is_file():
                path.unlink()


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    match = _NAME.search(folder.name)
    assert match is not None
    return int(match[1])


def newest_checkpoint(output_dir: Path) -> Path | None:
    found = _checkpoints(output_dir)
    return found[-1][1] if found else None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """Put everything back as it was; returns the state that was saved with it.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    state: dict[str, Any] = json.loads((folder / "training_state.json").read_text())
    with safe_open(str(folder / "training_state.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    parameters = {f"parameter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name for name in tensors if name.startswith("parameter.")}
    if set(parameters) != saved:
        strange = sorted(set(parameters) ^ saved)[:3]
        raise UserError(f"{folder}: does not fit the model (for example {', '.join(strange)}); is it another recipe's?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(_join_tensors(tensors, state.pop("optimizer")))
    schedule.load_state_dict(state.pop("schedule"))
    return state


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.search(p.name)) and p.is_dir()]
    return sorted(found)


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors by name, and the rest as JSON."""
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().contiguous()
            else:
                plain[f"optimizer.{index}.{key}"] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _join_tensors(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    entries = {name: value for name, value in tensors.items() if name.startswith("optimizer.")}
    for name, value in {**entries, **saved["state"]}.items():
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": saved["param_groups"]}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied weights)."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
