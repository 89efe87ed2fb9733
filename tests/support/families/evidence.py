"""A tiny random model of a family: loss and every gradient of what is trained, against one plain forward for each turn.

    none    float64 throughout, nothing recomputed         full    the same with gradient checkpointing
    lora    the same with LoRA on all linear layers        float32 as models are computed with
    naive   one causal row instead of the tree, no mask: what ignoring the tree would give

A difference is that of the worst tensor, relative to the largest entry of its gradient.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtr.attention.interface import use_own_attention
from mtr.attention.model_parts import decoder, text_config
from mtr.checks.verify import fill_lora_b
from mtr.errors import UserError
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.float64 import keep_float64
from mtr.model.loading import switch_noise_off
from mtr.model.lora import add_lora
from mtr.model.probe import Verdict, judge, small_configs, small_model
from mtr.model.tree_model import RowModel, TreeModel, use_tree
from mtr.recipe.sections import LoraSection
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

EXACT = 1e-9
"""Largest difference in float64 of what is called exact."""
LONGEST = 1024
"""Tokens of a turn that the verdict is for."""
_ZERO = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of the largest gradient of the model: below it, a tensor's gradient is zero but for rounding."""

Views = list[list[View]]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    loss: float
    gradient: float
    where: str = ""
    """The tensor whose gradient differs most."""
    tensors: int = 0
    """That are trained."""
    zero: list[str] = field(default_factory=list)
    """Those whose gradient is zero in plain passes, too: nothing trains them."""

    @property
    def worst(self) -> float:
        return float(np.max([self.loss, self.gradient]))  # NaN if one is


@dataclass(frozen=True)
class Evidence:
    """Of one family."""

    strategy: str
    """What `sequence.strategy: auto` takes for turns of up to LONGEST tokens."""
    reason: str | None
    """Why it is not one pass."""
    parameters: int = 0
    layers: list[str] = field(default_factory=list)
    """The type of each layer of the small model; empty where its config has no such list."""
    differences: dict[str, Difference] = field(default_factory=dict)
    problem: str | None = None
    """What keeps the verdict from being one: it could not be tried, or the evidence speaks against it."""
    seconds: float = 0.0
    probe_seconds: float = 0.0
    """Of a CPU core, the import of the model's code included."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gather(config: Any, seed: int = 0, cases: Sequence[str] = ("none", "full", "lora", "float32", "naive")) -> Evidence:
    """Try a family.

    Args:
        config: of its real size; a small one is made of it.
        cases: to compute.
    """
    began, used = time.perf_counter(), time.process_time()
    verdict = judge(config, LONGEST)
    probed = time.process_time() - used
    strategy, reason = _strategy(verdict)
    if strategy == "refused":
        return Evidence(strategy, reason, probe_seconds=probed)
    small = _small(config)
    text = text_config(small)
    differences, parameters = {}, 0
    for case in cases:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = _model(small, case)
            if model is None:
                continue
            parameters = sum(p.numel() for p in decoder(model).parameters())
            differences[case] = _difference(model, case, strategy, _views(seed, text.vocab_size))
    return Evidence(
        strategy,
        reason,
        parameters,
        list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []),
        differences,
        _against(differences),
        time.perf_counter() - began,
        probed,
    )


def _small(config: Any) -> Any:
    """The first of the probe's small configs whose model runs, without dropout as `mtr train` has it."""
    problems = []
    for make in small_configs(config):
        small = make()
        try:
            with torch.no_grad(), keep_float64():
                small_model(small)(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except Exception as error:  # of whatever kind, there is another one
            problems.append(error)
            continue
        switch_noise_off(small)
        return small
    raise problems[0]


def _strategy(verdict: Verdict) -> tuple[str, str | None]:
    if verdict.alone is not None:
        return "refused", verdict.alone
    if verdict.tree is None:
        return "single_pass", None
    return ("per_turn" if verdict.packed is None else "per_turn_unpacked"), verdict.tree


def _against(differences: dict[str, Difference]) -> str | None:
    """What speaks against calling a family exact."""
    for case in ("none", "full", "lora"):
        if case in differences and not differences[case].worst <= EXACT:
            found = differences[case]
            return f"{case}: loss differs by {found.loss:.1e}, gradients by {found.gradient:.1e} ({found.where})"
    return None


def _model(small: Any, case: str) -> Any:
    """None if the model has no checkpointing."""
    with torch.no_grad():
        model = small_model(small, dtype=torch.float32 if case == "float32" else torch.float64)
    inside = set(decoder(model).parameters()) | set(model.get_output_embeddings().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in inside and parameter.is_floating_point())
    if case == "lora":
        model = add_lora(model, LoraSection(r=4), 0).to(torch.float64)
        fill_lora_b(model, 0)
    if case == "full":
        try:
            checkpoint_activations(model.train(), "full")
        except UserError:
            return None
    return model


def _difference(model: Any, case: str, strategy: str, views: Views) -> Difference:
    with keep_float64() if case != "float32" else nullcontext():
        if case == "naive":
            ours = _gradients(model, lambda: _naive(model, views))
        elif strategy == "per_turn_unpacked":
            ours = _gradients(model, lambda: _packs(RowModel(model), [[[v]] for group in views for v in group], 1))
        else:
            use_tree(model)
            split = views if strategy == "single_pass" else [[v] for group in views for v in group]
            ours = _gradients(model, lambda: _packs(TreeModel(model, "segment"), [split], 64))
        use_own_attention(model)
        plain = _gradients(model, lambda: _plain(model, views))
    return compared(ours, plain)


def compared(ours: tuple[float, Gradients], plain: tuple[float, Gradients]) -> Difference:
    """The loss and the worst gradient of one, relative to the other."""
    largest = max(float(gradient.abs().max()) for gradient in plain[1].values())
    worst, where, zero = 0.0, "", []
    for name, gradient in plain[1].items():
        scale = float(gradient.abs().max())
        difference = float((ours[1][name] - gradient).abs().max())
        is_zero = scale <= _ZERO[gradient.dtype] * largest
        zero += [name] if is_zero else []
        relative = difference / (largest if is_zero else scale)
        if not (relative <= worst or math.isnan(worst)):
            worst, where = relative, name
    return Difference(abs(ours[0] - plain[0]) / abs(plain[0]), worst, where, len(plain[1]), zero)


def _gradients(model: Any, run: Callable[[], float]) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    loss = run()
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in trained}
    model.zero_grad(set_to_none=True)
    return loss, found


def _packs(tree_model: TreeModel, packs: list[Views], multiple: int) -> float:
    total = 0.0
    for groups in packs:
        loss: Tensor = tree_model(build_batch(Pack(tuple(merge(group) for group in groups)), multiple))
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def _plain(model: Any, views: Views) -> float:
    total = 0.0
    for view in (view for group in views for view in group):
        ids, first = torch.from_numpy(view.ids), len(view.prompt_ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total += _backward(logits[first - 1 : -1], ids[first:], torch.from_numpy(view.weights))
    return total


def _naive(model: Any, views: Views) -> float:
    """The row of each tree as one causal sequence, its targets predicted as if nothing had forked."""
    use_own_attention(model)
    total = 0.0
    for group in views:
        batch: Batch = build_batch(Pack((merge(group),)))
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
        total += _backward(logits[batch.predictor], batch.target_id, batch.weight)
    return total


def _backward(logits: Tensor, target: Tensor, weight: Tensor) -> float:
    nll = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    loss = (nll * weight.to(nll)).sum()
    torch.autograd.backward(loss)
    return float(loss.detach())


def _views(seed: int, vocabulary: int) -> Views:
    """Two trees: a chat whose turns leave branches, and turns that fork anywhere, with a branch of one token."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> Any:
        return rng.integers(0, vocabulary, size)

    def view(prompt: Any, completion: Any) -> View:
        return View(prompt, completion, rng.random(len(completion)) + 0.1)

    chat, history = [], text(20)
    for _ in range(3):
        history = np.concatenate([history, text(9)])
        thinking, answer = text(17), text(8)
        chat.append(view(history, np.concatenate([thinking, answer])))
        history = np.concatenate([history, answer])
    trunk = text(75)
    bush = [view(trunk[:5], trunk[5:])]
    for share, size in ((33, 40), (64, 1), (12, 3)):
        path = np.concatenate([trunk[:share], text(size)])
        bush.append(view(path[: share - 4], path[share - 4 :]))
    twig = np.concatenate([bush[1].ids[:50], text(11)])
    return [chat, [*bush, view(twig[:40], twig[40:])]]
