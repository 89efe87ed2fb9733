"""A plan on GPUs: does it fit, with which settings would it, how long does it take, and what does it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mtr.errors import UserError
from mtr.model.checkpointing import MODES
from mtr.plan.duration import Setting, duration
from mtr.plan.fit import Fit
from mtr.plan.gpus import Gpu
from mtr.plan.memory import Finder, Needs
from mtr.plan.result import GpuPlan, Plan

_LARGER_PACKS = 1.25
"""Packs of other epochs may be larger than the largest one that was counted."""


def on_gpus(plan: Plan, gpus: Sequence[Gpu], number: int = 1, prices: Sequence[float] = ()) -> tuple[GpuPlan, ...]:
    """
    Args:
        number: of GPUs of a kind that train together.
        prices: of an hour of one GPU, of each of `gpus`; none: cost is not told.
    """
    if plan.model.config is None or plan.model.missing:
        return tuple(GpuPlan(gpu, number, problem=plan.model.missing) for gpu in gpus)
    try:
        imagined = _Imagined(plan, number)
    except UserError as error:
        return tuple(GpuPlan(gpu, number, problem=str(error)) for gpu in gpus)
    each: Sequence[float | None] = prices or [None] * len(gpus)
    return tuple(imagined.on(gpu, price) for gpu, price in zip(gpus, each, strict=True))


class _Imagined:
    """The run of a plan on any GPU."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._needs = Needs(plan.recipe, plan.model.config)
        self._finder = Finder(plan.recipe, plan.model.config)
        budget = plan.recipe.sequence.budget
        counted = 0 if plan.rows.is_sample or plan.recipe.sequence.max_tokens == "auto" else plan.largest_pack
        self._tokens = min(budget, int(_LARGER_PACKS * counted)) if counted else budget

    def on(self, gpu: Gpu, price: float | None) -> GpuPlan:
        try:
            fit = self._needs.on(gpu, self._number, self._tokens)
            instead = None if fit.fits else self._finder.settings_for(gpu, self._number)
            lighter = self._lighter(gpu, fit) if fit.fits else None
        except UserError as error:
            return GpuPlan(gpu, self._number, problem=str(error))
        return self._timed(GpuPlan(gpu, self._number, fit, instead=instead, lighter=lighter), price)

    def _lighter(self, gpu: Gpu, fit: Fit) -> Fit | None:
        """With the least checkpointing that fits, if that is less than the recipe's."""
        for mode in MODES[: MODES.index(fit.checkpointing)]:
            if (other := self._needs.with_mode(mode, gpu, self._number, self._tokens)).fits:
                return other
        return None

    def _timed(self, made: GpuPlan, price: float | None) -> GpuPlan:
        """With time and cost, as far as they can be told; else with the reason."""
        run, model, recipe = self._plan.run, self._plan.model, self._plan.recipe
        assert made.fit is not None
        if made.instead is None and made.fit.in_words == "does not fit":
            return made
        fit, changes = (made.instead.fit, made.instead.changes) if made.instead else (made.fit, {})
        problem = self._untimed(made.gpu, bool(changes))
        if problem is not None or run.flops is None or run.packs is None:
            return replace(made, problem=problem)
        in_4_bits = recipe.model.load_in_4bit or bool(changes.get("model.load_in_4bit"))
        setting = Setting(fit.checkpointing, recipe.lora is None, model.routed, in_4_bits)
        time = duration(run.flops, run.packs, model.layers, setting, made.gpu, made.number)
        cost = None
        if price is not None:
            cost = (price * made.number * time.seconds[0] / 3600, price * made.number * time.seconds[1] / 3600)
        return replace(made, problem=self._left_out(fit), duration=time, cost=cost)

    def _untimed(self, gpu: Gpu, changed: bool) -> str | None:
        """Why time is not told."""
        run, dtype = self._plan.run, self._needs.dtype
        if run.flops is None or run.packs is None:
            return "time is not known for a stream without training.max_steps"
        if run.flops.total != run.flops.total:
            return "time is not known: the config does not tell how much some layers compute"
        if not run.flops.total:
            return "time is not told, as no turn would be trained"
        if changed:  # these are in 16 bits that the GPU has
            return None
        if dtype.itemsize > 2:
            return "time is not estimated in float32: the peak rates are of 16 bits (model.dtype: bfloat16)"
        if dtype == torch.bfloat16 and not gpu.bf16:
            return f"{gpu.name} has no units for bfloat16, so time is not told (model.dtype: float16)"
        return None

    def _left_out(self, fit: Fit) -> str | None:
        """What time leaves out with smaller packs."""
        plan, lengths = self._plan, self._plan.lengths
        largest = plan.largest_pack if plan.recipe.sequence.merge == "step" else lengths["conversation"].maximum
        if not plan.is_single_pass or fit.tokens >= min(largest, self._tokens):
            return None
        return (
            f"packs of {fit.tokens:,} tokens cut what is longer, and some tokens are then computed more than once: "
            "time leaves that out"
        )
