"""Claims: metrics are read as far as they go, whatever is cut, damaged or written twice; thinning loses no extreme and
keeps a page of a long run small.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.reports import loss_at, train_line, write_metrics, write_run

from mtr.errors import UserError
from mtr.pages.report import report_page
from mtr.prepare.counts import Counts
from mtr.report.metrics import Metrics, number, progress_of, read_metrics
from mtr.report.report import report
from mtr.report.series import thin, thin_axis


def read(path: Path, *lines: Any) -> Metrics:
    """Lines as text, or as values to be written as JSON."""
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return read_metrics(path)


def test_the_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m", 7)
    found = read_metrics(tmp_path / "m")
    assert found.train.step.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.train["loss"].tolist() == [loss_at(step) for step in range(1, 8)]
    assert found.evals.step.tolist() == [5]
    assert found.evals["eval_loss"].tolist() == [loss_at(5) + 0.2]
    assert found.totals["untrained_turns"] == {"longer than sequence.max_length (512)": 14}
    assert (found.damaged, found.repeated, found.is_cut, found.num_skipped) == (0, 0, False, 0)


def test_what_is_cut_damaged_or_no_number_is_left_out_and_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path / "m",
        {"step": 1, "loss": 2.0, "grad_norm": True},
        "nonsense\n",
        "[1]\n",
        {"step": "2", "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": 2, "loss": "low", "mfu": 10**400},
        '{"step": 3, "loss": 1e999}\n',
        '{"step": 4, "lo',
    )
    assert found.train.step.tolist() == [1, 2, 3]
    assert np.isnan(found.train["loss"]).tolist() == [False, True, True]
    assert np.isnan(found.train["grad_norm"]).all()
    assert (found.damaged, found.is_cut) == (4, True)


def test_of_a_step_that_is_there_twice_the_later_line_counts(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    again = [{"step": step, "loss": 10.0 * step} for step in (3, 4, 5)]
    evaluations = [{"step": 4, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0}]
    found = read(tmp_path / "m", *lines, evaluations[0], *again, evaluations[1])
    assert found.train.step.tolist() == [1, 2, 3, 4, 5]
    assert found.train["loss"].tolist() == [1.0, 2.0, 30.0, 40.0, 50.0]
    assert found.evals["eval_loss"].tolist() == [2.0]
    assert found.repeated == 3


def test_steps_without_an_update_are_known_and_those_at_the_end_counted(tmp_path: Path) -> None:
    fine: dict[str, Any] = {"loss": 1.0}
    bad: dict[str, Any] = {"loss": None, "skipped": "not finite"}
    found = read(tmp_path / "m", *({**one, "step": i + 1} for i, one in enumerate([fine, bad, fine, bad, bad])))
    assert found.skipped == [(2, "not finite"), (4, "not finite"), (5, "not finite")]
    assert (found.num_skipped, found.nonfinite_last) == (3, 2)


@pytest.mark.parametrize(
    ("skipped", "last"),
    [
        ([(step, "no turn to train") for step in range(1, 61)] + [(61, "not finite")], 1),  # more than are kept
        ([(3, "not finite"), (7, "not finite"), (8, "not finite")], 2),  # steps 4 to 6 made an update and have no line
        ([(1, "not finite"), (2, "no turn to train")], 0),
    ],
)
def test_only_steps_in_a_row_that_were_not_finite_end_a_run(
    tmp_path: Path, skipped: list[tuple[int, str]], last: int
) -> None:
    found = read(tmp_path / "m", *({"step": step, "loss": None, "skipped": why} for step, why in skipped))
    assert (found.num_skipped, found.nonfinite_last) == (len(skipped), last)


def test_no_file_is_no_step_and_a_file_of_something_else_is_one_error(tmp_path: Path) -> None:
    assert len(read_metrics(tmp_path / "none").train) == 0
    with pytest.raises(UserError, match="none of its 2 lines is one of metrics"):
        read(tmp_path / "m", {"accuracy": 1}, "x\n")
    with pytest.raises(UserError, match="not a file; restore"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 10**400, [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert math.isnan(number(value))
    assert number(3) == 3.0


# --- tokens and time --------------------------------------------------------------------------------------------------


def test_tokens_and_time_are_the_totals_where_lines_have_them(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m", 20, every=5)
    tokens, seconds, is_estimate = progress_of(read_metrics(tmp_path / "m").train)
    assert tokens.tolist() == [5000, 10000, 15000, 20000]
    assert seconds.tolist() == [2.5, 5.0, 7.5, 10.0]
    assert not is_estimate


def test_without_totals_a_line_counts_for_the_steps_before_it_that_have_none(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "num_tokens": 100 * step, "seconds": 1.0} for step in (1, 4, 6)]
    tokens, seconds, is_estimate = progress_of(read(tmp_path / "m", *lines).train)
    assert tokens.tolist() == [100, 1300, 2500]
    assert seconds.tolist() == [1, 4, 6]
    assert is_estimate
    assert not progress_of(read(tmp_path / "m", *({**line, "step": i + 1} for i, line in enumerate(lines))).train)[2]


# --- thinning ---------------------------------------------------------------------------------------------------------


def test_a_short_series_is_as_it_is() -> None:
    step, value = np.array([1.0, 2.0, 4.0]), np.array([0.5, np.nan, 0.25])
    assert thin(step, value) == {"step": [1, 4], "value": [0.5, 0.25]}
    assert thin(step, np.full(3, np.nan)) is None


@pytest.mark.parametrize("length", [401, 1000, 12_345])
def test_thinning_keeps_every_extreme_and_the_last_step(length: int) -> None:
    step = np.arange(1.0, length + 1)
    value = np.random.default_rng(0).normal(size=length)
    value[length // 2], value[length // 3] = 50.0, -50.0
    found = thin(step, value)
    assert found is not None
    assert len(found["step"]) == len(found["value"]) == 400
    assert (max(found["high"]), min(found["low"])) == (50.0, -50.0)
    assert length < 800 or max(found["value"]) < 50.0  # the mean alone would lose it
    assert found["step"][-1] == length
    columns = zip(found["low"], found["value"], found["high"], strict=True)
    assert all(low <= mean <= high for low, mean, high in columns)


def test_a_thinned_series_tells_its_ends_and_extremes_by_their_own_steps() -> None:
    value = np.linspace(5.0, 1.0, 10_000)
    value[[1234, 7777]] = 9.0, 0.5
    found = thin(np.arange(1.0, 10_001), value)
    assert found is not None
    assert [found[name] for name in ("first", "last", "lowest", "highest")] == [
        [1, 5.0],
        [10_000, 1.0],
        [7778, 0.5],
        [1235, 9.0],
    ]


def test_an_axis_keeps_its_ends() -> None:
    step = np.arange(1.0, 2001)
    thinned, tokens = thin_axis(step, 10 * step)
    assert (thinned[0], thinned[-1], len(thinned)) == (1, 2000, 400)
    assert tokens == [10 * one for one in thinned]
    assert thin_axis(np.array([]), np.array([])) == [[], []]


def test_a_hundred_thousand_steps_are_read_in_seconds_and_make_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", 1, max_steps=100_000)
    line = json.dumps(train_line(7, Counts(tokens=1)))
    written = (line.replace('"step": 7,', f'"step": {step},', 1) for step in range(1, 100_001))
    (run / "metrics.jsonl").write_text("\n".join(written) + "\n")
    began = time.process_time()
    html = report_page(report([run]))
    assert time.process_time() - began < 20  # about 2 on two cores
    assert len(html) < 300_000
