"""Timings as the JSON of `mtr bench`: rates, speed-ups, and the limit by arithmetic.

`limit.tokens` is the ratio of tokens that are computed, `limit.flops` that of all the work that is needed (by linear
layers, attention, recurrences and the output head: `limit.by_part`), and `figure_of_merit` the share of `limit.flops`
that the speed-up over the faster baseline reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from mtr.bench.timing import Case, Timing, spread
from mtr.tree.layout import View


@dataclass(frozen=True)
class Work:
    """What the conversations hold; the same for every case."""

    conversations: int
    turns: int
    per_turn_tokens: int
    """Tokens of one sequence per turn, without padding."""
    supervised_tokens: int
    weight_sum: float

    @classmethod
    def of(cls, views: Sequence[Sequence[View]]) -> Self:
        turns = [view for group in views for view in group]
        return cls(
            len(views),
            len(turns),
            sum(view.num_tokens for view in turns),
            sum(len(view.completion_ids) for view in turns),
            sum(float(view.weights.sum()) for view in turns),
        )


def describe(
    work: Work, cases: Sequence[Case], timings: Sequence[Timing], baselines: int, flops_per_second: float
) -> dict[str, Any]:
    """The part of the JSON that follows from the timings.

    Args:
        cases: single_pass, the baselines, and further cases. The first two did not fail.
        baselines: how many baselines there are.
        flops_per_second: that matmuls reach on the device.
    """
    results = [
        _describe_case(case, timing, work, flops_per_second) for case, timing in zip(cases, timings, strict=True)
    ]
    one, packed = cases[:2]
    losses = [result["loss"] for result in results if "loss" in result]
    seconds = results[0]["seconds"]["median"]
    compared = [result for result in results[1 : 1 + baselines] if "seconds" in result]
    speedup = {f"vs_{result['strategy']}": result["seconds"]["median"] / seconds for result in compared}
    limit = {"tokens": packed.num_tokens / one.num_tokens, "flops": packed.flops / one.flops}
    return {
        "shape": {
            "conversations": work.conversations,
            "turns": work.turns,
            "num_tokens": {case.strategy: case.num_tokens for case in cases[: 1 + baselines]},
            "num_supervised_tokens": work.supervised_tokens,
        },
        "repeats": len(timings[0].seconds),
        "cases": results,
        "speedup": speedup,
        "max_relative_loss_difference": (max(losses) - min(losses)) / abs(results[1]["loss"]),
        "limit": limit,
        "figure_of_merit": min(speedup.values()) / limit["flops"],
    }


def _describe_case(case: Case, timing: Timing, work: Work, flops_per_second: float) -> dict[str, Any]:
    described = {
        "strategy": case.strategy,
        "attention": case.attention,
        "num_tokens": case.num_tokens,
        "flops": case.flops,
    }
    if timing.error:
        return described | {"error": timing.error}
    seconds = spread(timing.seconds)
    median = seconds["median"]
    return described | {
        "seconds": seconds,
        "conversations_per_second": work.conversations / median,
        "tokens_per_second": case.num_tokens / median,
        "supervised_tokens_per_second": work.supervised_tokens / median,
        "per_turn_equivalent_tokens_per_second": work.per_turn_tokens / median,
        "flops_per_second": case.flops / median,
        "mfu": case.flops / median / flops_per_second,
        "peak_memory_bytes": timing.memory,
        "loss": timing.loss / work.weight_sum,
    }
