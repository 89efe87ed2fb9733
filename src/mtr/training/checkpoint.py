"""What a run writes to disk, and how it resumes from there.

    output_dir/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter (all weights where there is no LoRA)
      tokenizer files, chat_template.jinja             as they came with the model
      README.md                                        the model card
      recipe.yaml, environment.json, metrics.jsonl
      checkpoint-20/                                   the same weights, optimizer and schedule
        manifest.json                                  size and SHA-256 of every file in it

There is no random state to save: each step seeds its own (see `mtr.training.loop`). A checkpoint is written under a
temporary name, flushed to disk and renamed, and renamed again before it is removed, so a folder with its final name was
complete once. The manifest tells whether it still is: a damaged checkpoint is skipped and the one before it is used.

Tensors are stored unsharded, so a run may be resumed with another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

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
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, gathered from all processes; only the main process keeps the tensors."""

    weights: dict[str, Tensor]
    """Trainable parameters by name."""
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, keep: bool = True) -> Content:
    """A collective call: sharded tensors are gathered.

    Args:
        keep: true on the main process; the others take part and keep nothing.
    """
    weights = {name: _whole(p, keep) for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    entries = {
        index: {key: _whole(value, keep) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return Content(weights, {"state": entries, "param_groups": state["param_groups"]}, schedule.state_dict())


def save_model(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The adapter (or the whole model) with its tokenizer and the original chat template.

    Args:
        weights: trainable parameters by name, where the model holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {}
    if weights is not None and any(isinstance(p, DTensor) for p in model.parameters()):
        given["state_dict"] = {name: weights[name] for name in weights}
    model.save_pretrained(str(folder), **given)
    tokenizer.save_pretrained(str(folder))


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    content: Content,
    state: dict[str, Any],
    keep: int | None,
    best: int | None = None,
) -> Path:
    """Write `checkpoint-{step}` completely or not at all, and remove the oldest beyond `keep`.

    Args:
        best: step of a checkpoint that is kept besides the newest ones.
    """
    final = output_dir / f"checkpoint-{step}"
    remove_partial(output_dir)
    partial = output_dir / f".{final.name}.partial"
    save_model(model, tokenizer, partial, content.weights)
    tensors, plain = _split_tensors(content.optimizer)
    weights = {f"parameter.{name}": tensor.detach().contiguous() for name, tensor in content.weights.items()}
    save_file({**tensors, **_unshared(weights)}, str(partial / "training_state.safetensors"))
    whole = {**state, "step": step, "optimizer": plain, "schedule": content.schedule}
    (partial / "training_state.json").write_text(json.dumps(whole))
    (partial / _MANIFEST).write_text(json.dumps({p.name: _fingerprint(p) for p in sorted(partial.iterdir())}, indent=2))
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    if final.exists():
        _remove(final)
    partial.rename(final)
    _sync(output_dir)
    if keep is not None:
        older = [found for found in _checkpoints(output_dir) if found[0] <= step]  # newer ones are damaged
        for number, old in older[:-keep]:
            if number != best:
                _remove(old)
    return final


def remove_partial(output_dir: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for folder in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_run(output_dir: Path) -> None:
    """Remove the files that a run writes, and nothing else."""
    for _, folder in _checkpoints(output_dir)[::-1]:
        _remove(folder)
    remove_partial(output_dir)
    for pattern in _WRITTEN:
        for path in output_dir.glob(pattern):
            if path.is_file():
                path.unlink()


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    match = _NAME.search(folder.name)
    assert match is not None
    return int(match[1])


def find_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint, and what is wrong with each newer one.

    Raises:
        UserError: there are checkpoints, and none is good.
    """
    notes: list[str] = []
    for _, folder in _checkpoints(output_dir)[::-1]:
        damage = find_damage(folder)
        if damage is None:
            return folder, notes
        notes.append(f"{folder.name} is damaged ({damage})")
    if notes:
        raise UserError(
            f"{output_dir}: no good checkpoint: {'; '.join(notes)}. Restore one of them, or start over with --overwrite"
        )
    return None, []


def find_damage(folder: Path) -> str | None:
    """What differs from the manifest; None for a good checkpoint."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return f"it has no readable {_MANIFEST}"
    for name, wanted in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {wanted['bytes']:,}"
        if _fingerprint(path) != wanted:
            return f"the content of {name} has changed"
    return None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """Restore weights, optimizer and schedule; returns the run's state that was saved with them.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    state: dict[str, Any] = json.loads((folder / "training_state.json").read_text())
    load_weights(folder, model)
    with safe_open(str(folder / "training_state.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("optimizer.")}  # noqa: SIM118
    saved = _join_tensors(tensors, state.pop("optimizer"))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                entries[key] = _sharded_like(trained[index], value)
    optimizer.load_state_dict(saved)
    schedule.load_state_dict(state.pop("schedule"))
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the trained parameters of a checkpoint into the model.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    parameters = {f"parameter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(str(folder / "training_state.safetensors"), framework="pt") as file:
        saved = {name for name in file.keys() if name.startswith("parameter.")}  # noqa: SIM118  (not a dict)
        if set(parameters) != saved:
            strange = ", ".join(sorted(set(parameters) ^ saved)[:3])
            raise UserError(f"{folder}: does not fit the model (for example {strange}); is it another recipe's?")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(_sharded_like(parameter, file.get_tensor(name)))


def _whole(tensor: Tensor, keep: bool) -> Tensor:
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if keep else full.new_empty(0)
    return tensor.detach()


def _sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A full tensor, sharded like the parameter if that is sharded."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        moved = value.to(parameter.device)
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def _remove(folder: Path) -> None:
    """Renamed first: an incomplete checkpoint must not have the name of a complete one."""
    renamed = folder.with_name(f".{folder.name}.removed.partial")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)


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
    for name, value in {**tensors, **saved["state"]}.items():
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


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
