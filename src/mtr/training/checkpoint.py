"""What a run writes to disk, and how it resumes from there.

    output_dir/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter (all weights where there is no LoRA)
      tokenizer files, chat_template.jinja             as they came with the model
      README.md                                        the model card
      mtr-run.json                                     the marker: what mtr wrote here
      recipe.yaml, environment.json, metrics.jsonl
      checkpoint-20/                                   the same weights, optimizer and schedule
        environment.json                               what the run was made from, to be compared on resuming
        manifest.json                                  run, step, size and SHA-256 of every file in it

There is no random state to save: each step seeds its own (see `mtr.training.loop`). A checkpoint is complete when it
has its name (`mtr.store.checkpoints`), and its manifest tells whether it still is: a damaged one is skipped
and the one before it is used.

Tensors are stored unsharded, so a run may be resumed with another number of processes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mtr.errors import UserError, one_line
from mtr.files import write_json
from mtr.model.adapter_start import PREFIX as INITIAL
from mtr.model.adapter_start import as_plain_adapter, initial_adapter, twice_the_rank
from mtr.store.checkpoints import partial_of, place, remove_partial, rotate, sync
from mtr.store.manifest import write_manifest
from mtr.training.averaging import averaged_weights
from mtr.training.environment import Identity
from mtr.training.optim import restore_schedule
from mtr.training.tokenizer_files import save_tokenizer

TRAINED, AVERAGE = "parameter.", "average."
"""How names in training_state.safetensors begin: weights that are trained, and their averages where those are the
result."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, gathered from all processes; only the main process keeps the tensors."""

    weights: dict[str, Tensor]
    """Trainable parameters by name."""
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    result: dict[str, Tensor] = field(default_factory=dict)
    """What goes into the adapter or model in place of weights: the averages of a schedule-free optimizer."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """What a sharded model has besides, if it is saved whole: frozen parameters and buffers by name."""

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a sharded model is saved with."""
        return self.others | self.weights


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, keep: bool = True, averages: bool = True
) -> Content:
    """A collective call: sharded tensors are gathered.

    Args:
        keep: true on the main process; the others take part and keep nothing.
        averages: false where the model has the weights of the result already.
    """
    besides = _others(model)  # first: it shards again what an evaluation has left gathered
    weights = {name: _whole(p, keep) for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    whole = {"state": _all_whole(state["state"], keep), "param_groups": state["param_groups"]}
    others = {name: _whole(tensor, keep) for name, tensor in besides if name not in weights}
    result = {}
    if keep and averages:
        with averaged_weights(optimizer) as are_others:
            named = model.named_parameters() if are_others else ()
            result = {name: p.detach().clone() for name, p in named if p.requires_grad}
    return Content(weights, whole, schedule.state_dict(), result, others)


def _all_whole(state: dict[Any, Any], keep: bool) -> dict[Any, Any]:
    return {
        key: _whole(value, keep) if isinstance(value, Tensor) else _all_whole(value, keep)
        for key, value in state.items()
        if isinstance(value, (Tensor, dict))
    } | {key: value for key, value in state.items() if not isinstance(value, (Tensor, dict))}


def _others(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors that are saved with a model that is sharded and has no adapter."""
    if hasattr(model, "peft_config") or not any(isinstance(p, DTensor) for p in model.parameters()):
        return []
    saved = model.state_dict().keys()
    return [*model.named_parameters(), *((name, tensor) for name, tensor in model.named_buffers() if name in saved)]


def save_model(model: Any, tokenizer: Any, folder: Path, content: Content | None = None) -> None:
    """The adapter (or the whole model) with its tokenizer and the original chat template.

    Args:
        content: what is saved where the model holds only shards of it, or other weights; None: what the model holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {}
    config: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if content is not None and any(isinstance(p, DTensor) for p in model.parameters()):
        given["state_dict"] = content.saved
    if initial := initial_adapter(model):
        weights = given.get("state_dict") or dict(model.named_parameters()) | (content.result if content else {})
        given["state_dict"] = as_plain_adapter(weights, initial)
        config = twice_the_rank(model.active_peft_config)
    with config, _holding(model, content.result if content else {}):
        model.save_pretrained(str(folder), **given)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, with the path of the base model
    save_tokenizer(tokenizer, folder)


@contextlib.contextmanager
def _holding(model: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it, the model has these weights, whatever saves it."""
    kept = [(p, p.data, weights[name]) for name, p in model.named_parameters() if name in weights]
    try:
        for parameter, _, value in kept:
            parameter.data = value
        yield
    finally:
        for parameter, value, _ in kept:
            parameter.data = value


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    content: Content,
    state: dict[str, Any],
    identity: Identity,
    keep: int | None,
    best: int | None = None,
) -> Path:
    """Write `checkpoint-{step}` completely or not at all, and remove the oldest beyond `keep`.

    Args:
        identity: by which the checkpoint is known to be this run's.
        best: step of a checkpoint that is kept besides the newest ones.
    """
    final = output_dir / f"checkpoint-{step}"
    remove_partial(output_dir)
    partial = partial_of(output_dir, final.name)
    save_model(model, tokenizer, partial, content)
    tensors, plain = _split_tensors(content.optimizer)
    kinds = {TRAINED: content.weights, AVERAGE: content.result, INITIAL: initial_adapter(model)}
    for kind, weights in kinds.items():
        tensors |= {kind + name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(_unshared(tensors), str(partial / "training_state.safetensors"))
    whole = {**state, "step": step, "optimizer": plain, "schedule": content.schedule}
    (partial / "training_state.json").write_text(json.dumps(whole))
    write_json(partial / "environment.json", identity.environment)
    write_manifest(partial, identity.run, step)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    place(partial, final, identity.run)
    rotate(output_dir, step, keep, best, identity.run)
    return final


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """Restore weights, optimizer and schedule; returns the run's state that was saved with them.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    try:
        return _restore(folder, model, optimizer, schedule)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}: cannot be read as a checkpoint ({type(error).__name__}: {one_line(error)}); remove it to "
            "continue from the one before it"
        ) from None


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
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
    restore_schedule(schedule, state.pop("schedule"))
    return state


def load_result(folder: Path, model: nn.Module) -> None:
    """Load what a checkpoint has as its adapter or model.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    with safe_open(str(folder / "training_state.safetensors"), framework="pt") as file:
        has_averages = any(name.startswith(AVERAGE) for name in file.keys())  # noqa: SIM118  (not a dict)
    load_weights(folder, model, AVERAGE if has_averages else TRAINED)


def load_weights(folder: Path, model: nn.Module, kind: str = TRAINED) -> None:
    """Load the trained parameters of a checkpoint into the model.

    Args:
        kind: how the names of the tensors begin.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    parameters = {kind + name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(str(folder / "training_state.safetensors"), framework="pt") as file:
        saved = {name for name in file.keys() if name.startswith(kind)}  # noqa: SIM118  (not a dict)
        if set(parameters) != saved:
            strange = ", ".join(sorted(set(parameters) ^ saved)[:3])
            raise UserError(f"{folder}: does not fit the model (for example {strange}); is it another recipe's?")
        with torch.no_grad():
            for name, parameter in parameters.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    was, now = list(tensor.shape), list(parameter.shape)
                    raise UserError(f"{folder}: {name} has shape {was}, the model's has {now}; is it another recipe's?")
                parameter.copy_(_sharded_like(parameter, tensor))


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


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors by name, and the rest as JSON. What is in a dict has names with `/`."""
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().contiguous()
            else:
                plain[f"optimizer.{index}.{key}"] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _flat(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _join_tensors(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **saved["state"]}.items():
        _, index, path = name.split(".", 2)
        *outer, key = path.split("/")
        entries: dict[str, Any] = state.setdefault(int(index), {})
        for part in outer:
            entries = entries.setdefault(part, {})
        entries[key] = value
    return {"state": state, "param_groups": saved["param_groups"]}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied weights)."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared
