"""A small model with LoRA, its layers compiled for CUDA: loss and all gradients, against float64 on the CPU.

Norms, rotations, activations, residuals and LoRA's sums are Inductor's kernels, attention is flex's, and all of them
run in Triton's interpreter. Matrix products are the CPU's, in float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mtr.attention.interface import use_tree_attention
from mtr.model.compiled import compile_layers
from mtr.model.lora import add_lora
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import LoraSection
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import merge
from mtr.tree.packing import Pack
from support.cuda.attention_numbers import Compiled
from support.cuda.host_memory import CUDA
from support.cuda.numerics import Result
from support.hybrids import HYBRIDS
from support.masks import random_chat
from support.models import ARCHITECTURES

KINDS = ("qwen3", "gemma2")
TOLERANCE = 1e-4
_LEAST_KERNELS = 10
"""Of a compiled layer beside attention's: norms, rotations and the rest, forward and backward."""


def compare() -> Iterator[Result]:
    """For each kind of model, over packs of two lengths."""
    for kind in KINDS:
        began = time.perf_counter()
        exact, ours = models(kind)
        use_tree_attention(ours.to(CUDA))
        compile_layers(ours)
        compiled = Compiled()
        with compiled.watched():
            found = [outcome(TreeModel(ours, "flex"), batch.to(CUDA)) for batch in packs()]
        use_tree_attention(exact)
        wanted = [outcome(TreeModel(exact, "segment"), batch) for batch in packs()]
        differences: dict[str, float] = {}
        for one, other in zip(found, wanted, strict=True):
            assert one.keys() == other.keys()
            for name, x in other.items():
                difference = float((one[name] - x).abs().max() / x.abs().max())
                differences[name] = max(difference, differences.get(name, 0.0))
        assert compiled.others >= _LEAST_KERNELS, "the layers ran uncompiled"
        seconds = time.perf_counter() - began
        name = f"{kind} with LoRA, layers compiled"
        yield Result(name, differences, TOLERANCE, seconds, kernels=compiled.attention_kernels)


def models(kind: str) -> tuple[Any, Any]:
    """The same weights and adapters in float64 and in float32."""
    torch.manual_seed(0)
    name, options = {**HYBRIDS, **ARCHITECTURES}[kind]
    config = getattr(transformers, name)(**{**options, "head_dim": 16, "vocab_size": 64})
    config.pad_token_id = None
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in base.named_parameters():
        if parameter.dim() > 1 and not key.endswith("A_log"):
            parameter.data *= 5  # small weights would hide errors of attention
    exact, ours = (
        add_lora(copy.deepcopy(base).to(dtype), LoraSection(r=4), 0) for dtype in (torch.float64, base.dtype)
    )
    for one, other in zip(exact.parameters(), ours.parameters(), strict=True):
        if one.requires_grad:
            values = 0.2 * torch.randn(one.shape)
            one.data, other.data = values.to(one.dtype), values.to(other.dtype)
    return exact.train(), ours.train()


def packs() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [build_batch(Pack((merge(random_chat(rng, 3, size)),)), 128) for size in (12, 25)]


def outcome(model: TreeModel, batch: Batch) -> dict[str, Tensor]:
    """The loss and the gradient of each trainable parameter."""
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert grads, "nothing is trained"
    return {name: x.detach().cpu().double() for name, x in {"loss": loss, **grads}.items()}
