"""Loads models as a process of a run with `parallel: fsdp2` does, and compares them with those of one process.

`python -m support.sharded FOLDER RECIPE...` under torch's launcher; each process writes FOLDER/RANK.json: for each
recipe where its weights were, the most bytes of tensors that were whole at a time, and what differs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

import mtr.training.sharding
from mtr.attention.interface import use_tree_attention
from mtr.cli.session import quiet_libraries
from mtr.model.loading import load_model
from mtr.model.tree_model import TreeModel
from mtr.recipe.loading import load_recipe
from mtr.training.parallel import build_accelerator, distribute, start_processes
from mtr.training.sharding import placement
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

RANK = int(os.environ["RANK"])


class Whole:
    """Follows the memory of tensors that are received whole."""

    def __init__(self) -> None:
        self.most = 0
        self._held: list[tuple[Any, int]] = []
        self._receive = mtr.training.sharding._receive

    def __enter__(self) -> Whole:
        mtr.training.sharding._receive = self.receive
        return self

    def __exit__(self, *_: object) -> None:
        mtr.training.sharding._receive = self._receive

    def receive(self, tensor: Tensor, device: torch.device) -> Tensor:
        received = self._receive(tensor, device)
        storage = received.untyped_storage()
        self._held = [held for held in self._held if not held[0].expired()]
        self._held.append((StorageWeakRef(storage), storage.nbytes()))  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._held))
        return received


def tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def loss_of(model: nn.Module) -> float:
    ids = np.arange(1, 40) % 64
    loss = model(build_batch(Pack((merge([View(ids[:20], ids[20:], np.ones(19))]),))))
    loss.backward()
    return float(loss.detach())


def compare(path: Path, process: Any) -> dict[str, Any]:
    recipe = load_recipe(path)
    model = load_model(recipe, process.device, placement=placement(process, "fsdp2"))
    places = sorted({tensor.device.type for tensor in tensors(model).values()})
    use_tree_attention(model)
    AcceleratorState._reset_state()
    accelerator = build_accelerator(model, "fsdp2", (), "")
    with Whole() as whole:
        distributed = distribute(TreeModel(model, "segment"), accelerator, "fsdp2")

    alone = load_model(recipe, torch.device("cpu"))
    use_tree_attention(alone)
    expected, differing = tensors(alone), []
    for name, tensor in tensors(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        wanted = expected.pop(name)
        if tensor.requires_grad and (tensor.dtype != torch.float32 or wanted.requires_grad is False):
            differing.append(f"{name} is no master weight")
        if not torch.equal(full.detach().to(wanted.dtype), wanted.detach()):
            differing.append(name)
    losses = [loss_of(each) for each in (distributed, TreeModel(alone, "segment"))] if recipe.lora else [0.0, 0.0]
    return {
        "places": places,
        "most_whole": whole.most,
        "whole": sum(tensor.numel() * tensor.element_size() for tensor in tensors(alone).values()),
        "differing": [*differing, *expected],
        "losses": losses,
    }


def main() -> None:
    quiet_libraries()
    folder, *recipes = map(Path, sys.argv[1:])
    process = start_processes()
    report = {recipe.stem: compare(recipe, process) for recipe in recipes}
    (folder / f"{RANK}.json").write_text(json.dumps(report))
    process.destroy_process_group()


if __name__ == "__main__":
    main()
