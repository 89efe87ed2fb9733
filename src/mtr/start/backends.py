"""Which attention backends compute the right thing on this machine: each runs a small tree, forward and backward, and
is compared with a dense mask in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from mtr.attention.choice import activate_flash_attention, choose_backends, usable_backends
from mtr.attention.interface import attend
from mtr.attention.masks import TreeAttention
from mtr.errors import UserError, one_line
from mtr.model.device import pick_device
from mtr.recipe.sections import BACKENDS, Backend
from mtr.start.finding import Finding, shareable
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.mask import FULL, Tree
from mtr.tree.packing import Pack

_HEADS, _SIZE = 2, 64
_TOKENS = 128
"""Also what flex pads packs to a multiple of."""


def check_backends() -> Iterator[Finding]:
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(hidden_size=_HEADS * _SIZE, num_attention_heads=_HEADS, num_hidden_layers=1)
    chosen = usable_backends(config, device, dtype)
    if "varlen" in chosen:
        activate_flash_attention()
    for backend in BACKENDS:
        if backend == "eager":  # the model's own function: it runs wherever the model does
            continue
        try:
            choose_backends(backend, config, device, dtype)
            found = _difference(backend, device, dtype)
        except UserError as error:
            yield Finding("attention", backend, "none", str(error).removeprefix("model.attention: "))
            continue
        except Exception as error:  # a compiler's, a kernel's or a driver's
            text = f"does not run: {type(error).__name__}: {shareable(one_line(error, 300))}"
            yield Finding("attention", backend, "problem" if chosen == [backend] else "none", text)
            continue
        allowed = 3e-2 if dtype == torch.bfloat16 else 1e-4
        text = f"{found:.0e} from the reference in {str(dtype).removeprefix('torch.')}"
        used = ", used by auto" if backend in chosen else ""
        right = Finding("attention", backend, "ok", f"right: {text}{used}", found)
        yield right if found <= allowed else Finding("attention", backend, "problem", f"WRONG: {text}", found)


def _difference(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
    """Of output and gradients from the reference, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, _HEADS, _TOKENS, _SIZE, generator=generator, dtype=torch.float64) for _ in range(4)]
    rounded = [value.to(dtype) for value in inputs]
    wanted = _run("sdpa", [value.double() for value in rounded])
    found = _run(backend, [value.to(device) for value in rounded])
    return max(float((a - b.double().cpu()).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True))


def _run(backend: Backend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    attention = TreeAttention(_tree(query.device), [FULL], backend)
    out = attend(attention, FULL, query, key, value, _SIZE**-0.5)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3].transpose(1, 2))]


def _tree(device: torch.device) -> Tree:
    """A trunk with two branches, padded."""
    ids = np.arange(100)
    views = [
        View(ids[:20], ids[20:50], np.ones(30), 0),
        View(np.concatenate([ids[:20], ids[60:80]]), ids[80:100], np.ones(20), 1),
    ]
    layout = merge(views)
    batch = build_batch(Pack((layout,)), _TOKENS)
    return Tree(batch.subtree_end.to(device), batch.position_ids[0].to(device), batch.parent)
