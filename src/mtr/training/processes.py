"""One run on several processes: how the model is spread, how gradients meet, how all stop together.

    ddp    each process holds the whole model; the last backward of a step averages the gradients
    fsdp2  each process holds a share of every tensor; layers are put together when they are needed

Every process takes part in every collective call, whatever it has to do: with ddp a process without a pack runs one
empty backward, with fsdp2 it runs as many packs as the process that has most, empty ones where it has none.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtr.attention.layers import layer_spans
from mtr.attention.model_parts import base_model
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel
from mtr.tree.packing import Cost

_TIMEOUT = timedelta(hours=2)
"""The longest that processes wait for one: a checkpoint of a large model takes its time."""


def start_processes() -> PartialState:
    """Join the processes that a launcher started, or be the only one."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # `parallel` of the recipe decides
    cpu = not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=cpu, timeout=_TIMEOUT) if several else PartialState(cpu=cpu)


def build_accelerator(model: Any, parallel: str, trackers: Sequence[str], project_dir: str) -> Accelerator:
    """Mixed precision where 16-bit weights are trained: their updates are kept in float32.

    Raises:
        UserError: float16 and fsdp2.
    """
    mixed = "no"
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            mixed = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
            parameter.data = parameter.data.float()
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


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def spread(model: TreeModel, accelerator: Accelerator, parallel: str) -> nn.Module:
    """The model, ready for the processes there are.

    With fsdp2 this is torch's own `fully_shard`, on the CPU as on CUDA, so what the tests see is what a GPU runs.
    """
    if accelerator.num_processes == 1 or parallel == "ddp":
        prepared: nn.Module = accelerator.prepare_model(model)
        return prepared
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # mixed precision, and nothing else
    whole = set(getattr(base_model(model.model), "_no_split_modules", None) or [])
    for module in model.modules():
        if type(module).__name__ in whole:
            fully_shard(module, mesh=mesh)
    fully_shard(prepared, mesh=mesh)
    return prepared


@contextlib.contextmanager
def gradients_meet(accelerator: Accelerator, model: nn.Module, now: bool) -> Iterator[None]:
    """Whether a backward averages gradients over processes; with fsdp2 each one does."""
    with contextlib.nullcontext() if now else accelerator.no_sync(model):
        yield


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> float:
    """Returns the norm over all processes, before clipping."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm: Any = accelerator.clip_grad_norm_(trainable, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def total(accelerator: Accelerator, value: Tensor) -> float:
    """The sum over all processes."""
    return float(accelerator.reduce(value, reduction="sum"))


def highest(accelerator: Accelerator, value: int) -> int:
    """The same on all processes: the highest that any of them has."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def everyones(accelerator: Accelerator, value: Any) -> list[Any]:
    """What each process has, by process."""
    return [value] if accelerator.num_processes == 1 else list(gather_object([value]))


def cost_of(config: Any, trained_whole: bool) -> Cost:
    """What a layout costs a decoder, from its config: enough to share packs out, not to count FLOPs.

    Args:
        trained_whole: products with frozen weights cost two thirds of those with trained ones, attention does not.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    active = getattr(config, "num_experts_per_tok", None) or 1
    layer = 2 * width * size * (heads + groups) + 3 * width * inner * active
    spans = Counter(span.size or None for span in layer_spans(config))
    layers = spans.total()
    trained = 1.0 if trained_whole else 1.5
    return Cost(
        pair=2 * heads * size / layer * trained,
        target=config.vocab_size * width / (layer * layers),
        spans=tuple((span, number / layers) for span, number in spans.items()),
    )
