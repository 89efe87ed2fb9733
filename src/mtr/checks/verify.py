"""Does training equal N plain passes? Compares the loss and every trainable gradient, on the user's model and data.

The other side shares no code with what trains, in one pass or per turn: each turn is a plain sequence, with the model's
own attention, causal mask and logits, and a loss computed here.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of
from mtr.attention.interface import forget_rows, use_own_attention
from mtr.attention.model_parts import base_model, text_config
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.sample import first_views, without_dropout
from mtr.model.config import check_reach, vocabulary_size
from mtr.model.device import pick_device
from mtr.model.float64 import keep_float64
from mtr.model.loading import load_config, load_model
from mtr.model.strategy import decide, decided
from mtr.model.tree_model import TreeModel, lay_out, pack_model
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Recipe
from mtr.tree.batch import build_batch
from mtr.tree.layout import View
from mtr.tree.packing import build_packs, merge_conversations

log = logging.getLogger("mtr")

TOLERANCE = {
    "float64": {"loss": 1e-9, "gradient": 1e-9},
    "float32": {"loss": 1e-4, "gradient": 1e-4},
    "bfloat16": {"loss": 1e-2, "gradient": 5e-2},
    "float16": {"loss": 1e-2, "gradient": 5e-2},
}
"""Largest relative difference by dtype. Where transformers computes norms, softmaxes or states in float32 whatever the
model's dtype, float64 is kept. An error in mask, positions or targets differs by 1e-1 and more; to tell it from
rounding, use float64 or float32."""
_ROUTED = 0.3
"""Tolerance of gradients in 16 bits with routed experts: a router that rounds differently picks another expert."""


def verify(
    recipe: Recipe, conversations: int = 4, dtype: str = "float64", attention: str | None = None
) -> dict[str, Any]:
    """Compare what would be trained with one plain pass per turn, on the first conversations of `data.train`.

    Args:
        conversations: how many of them.
        dtype: of weights and computation, a key of TOLERANCE.
        attention: a backend to test instead of the recipe's.

    Returns:
        What `mtr verify --json` prints.

    Raises:
        UserError: there is no turn to train, or model or data cannot be loaded.
    """
    device = pick_device()
    recipe = without_dropout(recipe)
    if attention:
        recipe = recipe.replace(model={"attention": attention})
    tokenizer = load_tokenizer(recipe)
    config = load_config(recipe)
    for warning in check_reach(config, tokenizer, recipe.sequence.max_length):
        log.warning(warning)
    decision = decide(recipe, config)
    recipe = decided(recipe, decision)
    for note in decision.notes:
        log.warning(note)
    builder = Builder(recipe, load_renderer(recipe, tokenizer), vocabulary=vocabulary_size(config))
    views = first_views(recipe, builder.turns, conversations)
    model = load_model(recipe, device, dtype)
    if dtype == "float64":
        model.double()  # some models keep parameters in float32
    model.train()
    fill_lora_b(model, recipe.training.seed)
    text = text_config(base_model(model).config)
    asked = recipe.model.attention
    backends = [] if decision.unpacked else choose_backends(asked, text, device, model.dtype)
    tree_model = pack_model(model, recipe, backends, fastest)
    weight_sum = sum(float(view.weights.sum()) for group in views for view in group)

    with keep_float64() if dtype == "float64" else contextlib.nullcontext():
        trained_loss, trained = _gradients(model, lambda: _trained(tree_model, recipe, views, weight_sum, device))
        turn_loss, per_turn = _gradients(model, lambda: _per_turn(model, views, weight_sum, device))

    return {
        "conversations": len(views),
        "turns": sum(map(len, views)),
        "dtype": dtype,
        "attention": "of the model itself" if decision.unpacked else tree_model.backends[0],
        "device": str(device),
        "strategy": recipe.sequence.strategy,
        "loss": {"trained": trained_loss, "per_turn": turn_loss},
        **_compared(trained_loss, turn_loss, trained, per_turn, _tolerance(dtype, text)),
    }


def _compared(
    trained_loss: float,
    turn_loss: float,
    trained: dict[str, Tensor],
    per_turn: dict[str, Tensor],
    tolerance: dict[str, float],
) -> dict[str, Any]:
    differences = {name: _relative_difference(trained[name], per_turn[name]) for name in per_turn}
    worst = max((value for value in differences.values() if value is not None), default=0.0)
    loss_difference = abs(trained_loss - turn_loss) / abs(turn_loss)
    return {
        "max_relative_difference": {"loss": loss_difference, "gradient": worst},
        "tolerance": tolerance,
        "tensors": len(differences),
        "zero_gradients": [name for name, value in differences.items() if value is None],
        "passed": loss_difference <= tolerance["loss"] and worst <= tolerance["gradient"],
    }


def _tolerance(dtype: str, config: Any) -> dict[str, float]:
    routed = getattr(config, "num_experts_per_tok", None) and dtype in ("bfloat16", "float16")
    return {**TOLERANCE[dtype], **({"gradient": _ROUTED} if routed else {})}


def fill_lora_b(model: Any, seed: int) -> None:
    """Fill LoRA's B with random numbers: it starts at 0, where the gradients of A vanish and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _gradients(model: Any, run: Callable[[], float]) -> tuple[float, dict[str, Tensor]]:
    """The loss that `run` returns, and the gradients that it leaves on the trainable parameters."""
    model.zero_grad(set_to_none=True)
    loss = run()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return loss, gradients


def _trained(
    tree_model: TreeModel, recipe: Recipe, views: list[list[View]], weight_sum: float, device: torch.device
) -> float:
    lay_out(tree_model.model, recipe)
    budget, strategy = recipe.sequence.budget, recipe.sequence.laid_out
    layouts = merge_conversations(views, strategy, recipe.sequence.merge, budget)
    total = 0.0
    for pack in build_packs(layouts, budget, strategy=strategy)[0]:
        batch = build_batch(pack, pad_to_multiple_of(tree_model.backends))
        loss = tree_model(batch.to(device)) / weight_sum
        loss.backward()
        total += float(loss.detach())
    return total


def _per_turn(model: Any, views: list[list[View]], weight_sum: float, device: torch.device) -> float:
    use_own_attention(model)
    saves_memory = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
    total = 0.0
    for view in (view for group in views for view in group):
        forget_rows(model)
        ids = torch.tensor([*view.prompt_ids.tolist(), *view.completion_ids.tolist()], device=device)
        first = len(view.prompt_ids)
        needed = {"logits_to_keep": len(ids) - first + 1} if saves_memory else {}
        logits = model(input_ids=ids[None], use_cache=False, **needed).logits[0]
        predicted = logits[-(len(ids) - first) - 1 : -1].log_softmax(dim=-1)
        nll = -predicted.gather(1, ids[first:, None])[:, 0]
        loss = (nll * torch.from_numpy(view.weights).to(nll)).sum() / weight_sum
        loss.backward()
        total += float(loss.detach())
    return total


def _relative_difference(one: Tensor, other: Tensor) -> float | None:
    """max|one - other| / max|other|; None if both are zero."""
    scale = float(other.abs().max())
    difference = float((one - other).abs().max())
    if scale == 0.0:
        return None if difference == 0.0 else float("inf")
    return difference / scale
