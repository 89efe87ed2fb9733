"""What `mtr bench` and `mtr plan` count, under the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mtr.bench.runs import bench
from mtr.bench.setup import Options
from mtr.bench.timing import Case, Timing
from mtr.plan.planning import plan
from mtr.recipe.sections import Recipe


def without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `mtr bench` count its cases and run none of them."""

    def take_no_turns(model: Any, device: Any, cases: Sequence[Case], repeats: int) -> list[Timing]:
        return [Timing([1.0], loss=1.0) for _ in cases]

    monkeypatch.setattr("mtr.bench.runs.take_turns", take_no_turns)
    monkeypatch.setattr("mtr.bench.runs.device_matrix_rate", lambda *of: {"flops_per_second": 1.0})


def counts_of_bench(recipe: Recipe, random_weights: bool = False) -> dict[str, Any]:
    """Of all conversations of a recipe, under the names of a plan."""
    result = bench(recipe, 10**6, repeats=1, options=Options(padded=False, random_weights=random_weights))
    one, apart = result["cases"][:2]
    shape = result["shape"]
    return {
        "num_tokens": {
            "single_pass": one["num_tokens"],
            "per_turn": apart["num_tokens"],
            "supervised": shape["num_supervised_tokens"],
        },
        "flops": {"single_pass": one["flops"], "per_turn": apart["flops"]},
        "flops_by_part": result["limit"]["by_part"],
        "speedup_limit": result["limit"]["flops"],
        "turns": shape["turns"],
        "conversations": shape["conversations"],
        "trees": shape["trees"],
    }


def counts_of_plan(recipe: Recipe) -> dict[str, Any]:
    found = plan(recipe).as_json()
    kept = ("num_tokens", "flops", "flops_by_part", "speedup_limit", "turns", "conversations")
    return {name: found[name] for name in kept} | {"trees": found["trees"]["single_pass"]}
