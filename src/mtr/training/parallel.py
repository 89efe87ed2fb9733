"""A run on several processes: joining them, mixed precision, and the model distributed over them.

ddp    each process holds the whole model; the last backward of a step averages the gradients
fsdp2  each process holds a shard of every tensor; layers are gathered when they are needed
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from torch import nn

from mtr.attention.model_parts import base_model, idle_parts
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel
from mtr.training.sharding import keep_precision, shard

_TIMEOUT = timedelta(hours=2)
"""How long processes wait for one of them: a checkpoint of a large model takes time."""


def start_processes() -> PartialState:
    """Join the processes that a launcher started, or be the only one."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # `parallel` of the recipe decides
    cpu = not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=cpu, timeout=_TIMEOUT) if several else PartialState(cpu=cpu)


def build_accelerator(model: Any, parallel: str, trackers: Sequence[str], project_dir: str) -> Accelerator:
    """An accelerator with mixed precision where 16-bit weights are trained.

    Raises:
        UserError: float16 and fsdp2.
    """
    mixed = "no"
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            mixed = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
    if model.dtype == torch.float16 and torch.cuda.is_available():
        mixed = "fp16"
    if getattr(model, "is_loaded_in_4bit", False):
        mixed = "bf16"
    if mixed == "fp16" and parallel == "fsdp2":
        raise UserError("training.parallel: fsdp2 works with model.dtype bfloat16 or float32, not with float16")
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed,
        log_with=list(trackers) or None,
        project_dir=project_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def distribute(model: TreeModel, accelerator: Accelerator, parallel: str) -> nn.Module:
    """The model as accelerate or FSDP wraps it for the processes of the run, master weights in float32.

    With fsdp2 this is torch's own `fully_shard`, on the CPU as on CUDA, so the tests run what a GPU runs. The model
    has to be where `placement` says.
    """
    prepared: nn.Module
    if accelerator.num_processes > 1 and parallel == "fsdp2":
        prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast, no more
        units = getattr(base_model(model.model), "_no_split_modules", None) or []
        shard(prepared, units, idle_parts(model.model).values(), accelerator)
        return prepared
    for parameter in model.parameters():
        keep_precision(parameter)
    prepared = accelerator.prepare_model(model)
    return prepared
