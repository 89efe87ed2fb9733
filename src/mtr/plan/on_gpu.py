"""A plan on GPUs: does it fit, with which settings would it, how long does it take, and what does it cost."""

from __future__ import annotations

from collections.abc import Sequence

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
        run, model, recipe = self._plan.run, self._plan.model, self._plan.recipe
        assert made.fit is not None
        problem = None
        if self._needs.dtype.itemsize > 2:
            problem = "time is not estimated in float32: the peak rates are of 16 bits (model.dtype: bfloat16)"
        elif run.flops is None or run.packs is None:
            problem = "time is not known for a stream without training.max_steps"
        elif run.flops.total != run.flops.total:
            problem = "time is not known: the config does not tell how much some layers compute"
        if problem is not None or run.flops is None or run.packs is None:
            return GpuPlan(made.gpu, made.number, made.fit, problem, instead=made.instead, lighter=made.lighter)
        fit = made.instead.fit if made.instead else made.fit
        in_4_bits = recipe.model.load_in_4bit or bool(made.instead and made.instead.changes.get("model.load_in_4bit"))
        setting = Setting(fit.checkpointing, recipe.lora is None, model.routed, in_4_bits)
        time = duration(run.flops, run.packs, model.layers, setting, made.gpu, made.number)
        cost = None
        if price is not None:
            cost = (price * made.number * time.seconds[0] / 3600, price * made.number * time.seconds[1] / 3600)
        return GpuPlan(made.gpu, made.number, made.fit, None, time, cost, made.instead, made.lighter)
