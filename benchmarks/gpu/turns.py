"""Single pass against one pass per turn, packed and padded, by the number of turns."""

from __future__ import annotations

import functools

from gpu.results import Case, Measured, Results
from gpu.setting import MODELS, Bench, Size, first_that_fits
from mtr.bench.runs import measure as time_cases
from mtr.bench.synthetic import Shape, make_views
from mtr.recipe.sections import Checkpointing

TREES = 8
"""Conversations of one turn, or as many fewer as they have turns."""
MODES: tuple[Checkpointing, ...] = ("products", "selective", "full")
"""The first that fits is used."""


def run(results: Results, size: Size) -> None:
    bench = Bench(size)
    for name in MODELS:
        for number in size.turns:
            case: Case = {"model": name, "turns": number, "words": list(size.shape)}
            results.run(case, functools.partial(measure, bench, size, name, number))
        bench.close()


def measure(bench: Bench, size: Size, name: str, number: int) -> Measured:
    longest = max(size.turns)
    _, thinking, response = size.shape
    room = Shape(longest, *size.shape).longest + longest * (thinking + response + 8)
    own = bench.open(name, room, all_backends=True)
    views = make_views(Shape(number, *size.shape), max(1, TREES // number), own.vocabulary)
    timed = functools.partial(time_cases, own, views, pad_id=0, repeats=size.repeats)
    return {"matrix_rate": own.matrix_rate, **first_that_fits(own.model, MODES, timed)}
