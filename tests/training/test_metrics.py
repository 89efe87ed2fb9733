"""Claims: metrics.jsonl is strict JSON, one object a line, flushed as written; a run that goes on cuts what it will
write again and nothing else; the names are those of the contract.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mtr.files import write_json
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.prepare.counts import Counts
from mtr.training.environment import PACKAGES, environment
from mtr.training.metrics import MetricsFile, throughput, totals

CPU = torch.device("cpu")


def strict(text: str) -> Any:
    """Parsed as JSON that knows no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list[Any]:
    return [strict(line) for line in path.read_text().splitlines()]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=0)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
        assert lines(path)[-1] == {"step": step, "loss": 0.5}
        assert path.read_text().endswith("\n")
    assert len(lines(path)) == 2


def steps_after(path: Path, content: str, last_step: int) -> list[Any]:
    path.write_text(content)
    metrics = MetricsFile(path, last_step)
    metrics.write({"step": "new"})
    return [line["step"] for line in lines(path)]


def line(step: int, **keys: Any) -> str:
    return json.dumps({"step": step, "loss": 1.0, **keys}) + "\n"


@pytest.mark.parametrize(
    ("content", "last_step", "kept"),
    [
        ("", 0, []),
        ("", 5, []),
        (line(1) + line(2) + line(3), 2, [1, 2]),
        (line(1) + line(2), 2, [1, 2]),
        (line(1) + line(2), 0, []),
        (line(2) + line(2, eval_loss=1.0) + line(4) + line(4, eval_loss=1.0), 2, [2, 2]),
        (line(1) + line(2) + '{"step": 3, "lo', 9, [1, 2]),
        (line(1) + '{"step": 2, "loss": 1.0}', 9, [1]),
        (line(1) + '{"step": 2}xx\n', 9, [1]),
        (line(1) + '{"loss": 2}\n5\nnull\n[]\n{"step": null}\n' + line(2), 9, [1, 2]),
        (line(1) + "\n" + line(2), 9, [1, 2]),
    ],
)
def test_a_run_that_goes_on_cuts_what_it_writes_again(
    tmp_path: Path, content: str, last_step: int, kept: list[int]
) -> None:
    assert steps_after(tmp_path / "metrics.jsonl", content, last_step) == [*kept, "new"]


def test_kept_lines_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,   "loss": 1.50}\n{"step": 2}\n')
    MetricsFile(path, last_step=1)
    assert path.read_text() == '{"step":1,   "loss": 1.50}\n'


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [inf, 1.5, {"c": -inf}], "d": (nan, 2), "e": True, "f": "NaN", "g": None}
    wanted = {"a": None, "b": [None, 1.5, {"c": None}], "d": [None, 2], "e": True, "f": "NaN", "g": None}
    assert strict(write_json(None, value)) == wanted
    write_json(tmp_path / "new" / "value.json", value)
    assert strict((tmp_path / "new" / "value.json").read_text()) == wanted
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=0)
    metrics.write({"step": 1, "loss": nan})
    assert lines(path) == [{"step": 1, "loss": None}]


def test_json_without_a_file_is_one_line_and_keeps_other_scripts(tmp_path: Path) -> None:
    text = write_json(None, {"a": ["ü\n", {"b": 1}]})
    assert "\n" not in text
    assert "ü" in text
    write_json(tmp_path / "x.json", {"a": "ü"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'


def test_throughput_has_the_names_of_the_contract() -> None:
    counts = Counts(conversations=2, turns=5, tokens=100, supervised_tokens=40, per_turn_tokens=250, trees=3)
    assert throughput(counts, 0.5) == {
        "num_conversations": 2,
        "num_turns": 5,
        "num_tokens": 100,
        "num_supervised_tokens": 40,
        "num_per_turn_tokens": 250,
        "seconds": 0.5,
        "tokens_per_second": 200.0,
        "supervised_tokens_per_second": 80.0,
        "conversations_per_second": 4.0,
        "per_turn_tokens_per_second": 500.0,
    }


def test_totals_leave_out_what_there_is_none_of() -> None:
    counts = Counts(conversations=2, tokens=100, untrained_turns=Counter(long=1))
    written = strict(write_json(None, totals(counts)))
    assert written == {"conversations": 2, "tokens": 100, "untrained_turns": {"long": 1}}


def test_counts_add_up() -> None:
    one = Counts(1, 2, 3, 4, 5, 6, Counter(a=1), Counter(b=1), Counter(c=1))
    one.add(Counts(10, 20, 30, 40, 50, 60, Counter(a=1, x=2), Counter(y=3), Counter(c=4)))
    assert one == Counts(11, 22, 33, 44, 55, 66, Counter(a=2, x=2), Counter(b=1, y=3), Counter(c=5))


def test_the_environment_says_what_a_run_needs_to_be_repeated() -> None:
    described = environment(7, CPU, 2, "2025-01-31")
    assert described["seed"] == 7
    assert described["num_processes"] == 2
    assert described["date"] == "2025-01-31"
    assert set(described["packages"]) == set(PACKAGES)
    assert described["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert described["cuda"] is None
    strict(write_json(None, described))


def test_peak_memory_is_in_bytes_and_grows() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    held = torch.ones(32 << 20, dtype=torch.float32)
    after = peak_memory(CPU)
    assert 1 << 20 < before < 1 << 40
    assert after - before > 0.7 * held.numel() * 4
