"""What `mtr plan` found: the data as training takes it, the work of both ways, the run, the GPUs, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mtr.chat.findings import Findings
from mtr.checks.data_report import DataReport
from mtr.model.flops import Flops
from mtr.plan.duration import Duration, expected_speedup
from mtr.plan.fit import Fit, Settings
from mtr.plan.gpus import Gpu
from mtr.plan.lengths import Spread
from mtr.plan.sizes import Model
from mtr.plan.ways import History, Way
from mtr.recipe.sections import Recipe

LITTLE = 1.1
"""A limit below which one pass saves next to nothing."""


@dataclass(frozen=True)
class Rows:
    """Which rows were counted."""

    counted: int
    of_epoch: int | None
    """Rows that an epoch takes; None for a stream that was not read to its end."""
    held_out: int = 0
    """For evaluation, by `data.eval_fraction`."""
    seed: int | None = None
    """Of the draw, if only some of them were counted."""
    streamed: bool = False

    @property
    def is_sample(self) -> bool:
        return self.counted != self.of_epoch


@dataclass(frozen=True)
class Work:
    """One of the two ways: an epoch, or the rows of it that were counted."""

    way: Way
    flops: Flops | None
    """None if the model is not known; NaN in a part whose size its code does not tell."""

    @property
    def total(self) -> float | None:
        return None if self.flops is None else self.flops.total


@dataclass(frozen=True)
class Run:
    """The whole run, in the way that trains, extrapolated where not all rows were counted."""

    steps: int | None
    """None for a stream without `training.max_steps`."""
    steps_per_epoch: int | None
    tokens: int | None
    packs: int | None
    flops: Flops | None


@dataclass(frozen=True)
class GpuPlan:
    gpu: Gpu
    number: int
    """How many of them train together."""
    fit: Fit | None = None
    problem: str | None = None
    """Why there is no estimate of memory or of time, or what it leaves out."""
    duration: Duration | None = None
    cost: tuple[float, float] | None = None
    """Of the run, in the currency of the price."""
    instead: Settings | None = None
    """Where the recipe does not fit, settings that do."""
    lighter: Fit | None = None
    """Where the recipe names a mode of checkpointing, one that recomputes less and fits, too."""


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    """With its strategy decided."""
    model: Model
    findings: Findings
    report: DataReport
    rows: Rows
    conversations: int
    """With a trained turn."""
    unmerged: int
    """Tokens of one pass over each conversation, without what `sequence.merge: step` saves."""
    supervised: int
    """Tokens."""
    single_pass: Work
    per_turn: Work
    history: History
    continued: tuple[int, int]
    """Trained turns that continue the one before as it was generated, and those that do not."""
    lengths: dict[str, Spread]
    stops: dict[str, str]
    """What would end the run, with the first row or turn."""
    warnings: tuple[str, ...]
    """What the tokenizer and sequence.max_length ask of the model beyond what it was made for."""
    largest_pack: int
    roles: dict[str, int]
    """Tokens of one pass, by role."""
    role_rows: int
    """Conversations whose roles were told apart."""
    run: Run
    verdict: tuple[str, ...] = ()
    gpus: tuple[GpuPlan, ...] = ()

    @property
    def turns(self) -> int:
        """Trained ones."""
        return self.report.trained

    @property
    def untrained(self) -> dict[str, int]:
        """Turns by reason, the most common first."""
        found = {**self.report.refused, **self.report.chosen}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def is_single_pass(self) -> bool:
        """Whether training computes a tree in one pass."""
        return self.recipe.sequence.laid_out == "single_pass"

    @property
    def by_flops(self) -> bool:
        total = self.per_turn.total
        return total is not None and total == total  # not NaN

    @property
    def limit(self) -> float | None:
        """FLOPs of one pass per turn over those of one pass; tokens, where FLOPs are not known."""
        one, apart = self.single_pass, self.per_turn
        if not one.way.tokens:
            return None
        if self.by_flops:
            return (apart.total or 0.0) / (one.total or 1.0)
        return apart.way.tokens / one.way.tokens

    @property
    def merged(self) -> float:
        """Tokens of one pass over each conversation, over those with what `sequence.merge: step` merges."""
        return self.unmerged / self.single_pass.way.tokens if self.unmerged else 1.0

    @property
    def expected(self) -> float | None:
        """The speed-up that is to be expected; None where FLOPs are not known."""
        one, apart = self.single_pass.flops, self.per_turn.flops
        return expected_speedup(one, apart) if one and apart and self.by_flops and one.total else None

    def as_json(self) -> dict[str, Any]:
        """What `mtr plan --json` prints."""
        ways = {"single_pass": self.single_pass, "per_turn": self.per_turn}
        return {
            "model": {
                "name_or_path": self.recipe.model.name_or_path,
                "parameters": self.model.parameters,
                "trainable": self.model.trainable,
                "missing": self.model.missing,
            },
            "rows": self.rows.counted,
            "rows_of_epoch": self.rows.of_epoch,
            "rows_held_out": self.rows.held_out,
            "sample_seed": self.rows.seed,
            "skipped_rows": {"filtered": self.report.filtered, "unreadable": self.report.unreadable},
            "conversations": self.conversations,
            "turns": self.turns,
            "untrained_turns": self.untrained,
            "notes": self.report.notes,
            "remarks": self.report.remarks,
            "stops": self.stops,
            "warnings": list(self.warnings),
            "examples": self.report.examples,
            "num_tokens": {name: work.way.tokens for name, work in ways.items()} | {"supervised": self.supervised},
            "tokens_by_role": {"conversations": self.role_rows, "tokens": self.roles},
            "pairs": {name: work.way.pairs for name, work in ways.items()},
            "flops": {name: work.total for name, work in ways.items()},
            "flops_by_part": {name: work.flops and asdict(work.flops) for name, work in ways.items()},
            "trees": {name: work.way.trees for name, work in ways.items()},
            "largest_pack": self.largest_pack,
            "lengths": {name: asdict(spread) for name, spread in self.lengths.items()},
            "history": self.history,
            "template_history": self.findings.history,
            "turns_continued": dict(zip(("yes", "no"), self.continued, strict=True)),
            "strategy": {"taken": self.recipe.sequence.strategy, "reason": self.model.reason},
            "speedup_limit": self.limit,
            "speedup_expected": self.expected,
            "speedup_limit_by": "flops" if self.by_flops else "tokens",
            "run": asdict(self.run) | {"flops": self.run.flops and self.run.flops.total},
            "gpus": [_gpu(plan) for plan in self.gpus],
            "verdict": " ".join(self.verdict),
        }


def _gpu(plan: GpuPlan) -> dict[str, Any]:
    gpu, instead = plan.gpu, plan.instead
    return {
        **asdict(gpu),
        "number": plan.number,
        "memory": plan.fit and _fit(plan.fit),
        "problem": plan.problem,
        "share_of_peak": plan.duration and list(plan.duration.share),
        "seconds": plan.duration and list(plan.duration.seconds),
        "cost": plan.cost and list(plan.cost),
        "instead": instead and {"changes": dict(instead.changes), "memory": _fit(instead.fit)},
        "lighter_checkpointing": plan.lighter and plan.lighter.checkpointing,
    }


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "verdict": fit.in_words,
        "bytes": [fit.low, fit.high],
        "weights": fit.weights,
        "gradients_and_optimizer": fit.state,
        "activations": fit.activations,
        "checkpointing": fit.checkpointing,
        "pack_tokens": fit.tokens,
    }
