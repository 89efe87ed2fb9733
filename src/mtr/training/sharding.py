"""A model spread over processes, filled from the one process that has its values.

    first process      all tensors in host memory, as transformers reads them
    the other ones     the same modules on the meta device: names, shapes and dtypes, no values
    unit by unit       sent to every device, sharded there, freed

So a device never holds more than its shards and one unit: a decoder layer, or what is outside of the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtr.errors import UserError
from mtr.training.processes import gather_values

Receive = Callable[[Tensor], Tensor]


def placement(process: PartialState, parallel: str) -> torch.device:
    """Where this process puts the weights that it loads: its device, or as above where they will be sharded."""
    if process.num_processes == 1 or parallel == "ddp":
        return torch.device(process.device)
    return torch.device("cpu" if process.is_main_process else "meta")


def shard(model: nn.Module, units: Collection[str], idle: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Fill the model, and shard it in place over all processes.

    Args:
        model: on the CPU of the first process, on the meta device elsewhere. Weights in 16 bits that are trained
            become float32.
        units: names of the classes that are gathered as a whole: decoder layers.
        idle: modules that no forward goes through, so that they are never gathered.

    Raises:
        UserError: the processes have loaded different models.
    """
    _check_same(model, accelerator)
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))

    def receive(tensor: Tensor) -> Tensor:
        return _receive(tensor.detach(), device)

    layers = [module for module in model.modules() if type(module).__name__ in units]
    for module in dict.fromkeys([*layers, *idle]):
        _fill(module, receive)
        fully_shard(module, mesh=mesh)
    _fill(model, receive)
    fully_shard(model, mesh=mesh)


def keep_precision(parameter: nn.Parameter) -> None:
    """Make a weight float32 that is trained in 16 bits: its updates may be smaller than what those can tell apart."""
    if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
        parameter.data = parameter.data.float()


def _fill(unit: nn.Module, receive: Receive) -> None:
    """Replace tensors of a unit by received ones, tied ones by one, but for what is sharded already."""
    filled: dict[int, tuple[Tensor, nn.Parameter]] = {}
    """By id, with the tensor itself, so that the id stays its own."""
    for module in unit.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in filled:
                received = nn.Parameter(receive(parameter), requires_grad=parameter.requires_grad)
                keep_precision(received)
                filled[id(parameter)] = parameter, received
            setattr(module, name, filled[id(parameter)][1])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, receive(buffer))


def _receive(tensor: Tensor, device: torch.device) -> Tensor:
    """The values that the first process has, on the device."""
    here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)
    here = here.contiguous()
    if here.numel():
        broadcast(here.view(-1).view(torch.uint8), src=0)  # as bytes: not every backend knows every dtype
    return here


def _check_same(model: nn.Module, accelerator: Accelerator) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    text = "\n".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors)
    if len(set(gather_values(accelerator, hashlib.sha256(text.encode()).hexdigest()))) > 1:
        raise UserError(
            "model.name_or_path: the processes have loaded models with different tensors; use the same files and the "
            "same version of transformers on all machines"
        )
