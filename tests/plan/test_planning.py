"""Claims: a plan says plainly what one pass saves and where it saves nothing, what would stop the run, and what it does
not know; a sample is called one and extrapolated; GPUs get memory, time and cost as ranges.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.rows import conversation_row, copy_tokenizer
from support.templates import CONTENT, template, thinking

from mtr.chat.turn import too_long
from mtr.checks.roles import ROLES
from mtr.plan.counting import STOPS_AT_ID
from mtr.plan.gpus import find_gpu
from mtr.plan.lengths import spread
from mtr.plan.on_gpu import on_gpus
from mtr.plan.planning import STOPS_AT_REACH, plan
from mtr.plan.result import Plan
from mtr.plan.verdict import verdict
from mtr.recipe.loading import load_recipe

Write = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture
def planned(write_recipe: Write, write_rows: Write) -> Callable[..., Plan]:
    def run(rows: list[Any], most: int | None = None, **sections: Any) -> Plan:
        sections["data"] = {"train": str(write_rows(rows)), **sections.get("data", {})}
        found = plan(load_recipe(write_recipe(**sections)), most)
        return replace(found, verdict=verdict(found))

    return run


Planned = Callable[..., Plan]
ROWS = [conversation_row(turns) for turns in (2, 3, 5, 8)] * 5


def words(found: Plan) -> str:
    return " ".join(found.verdict)


# --- verdicts ---


def test_one_pass_pays_where_history_is_dropped(planned: Planned) -> None:
    found = planned(ROWS)
    assert found.limit is not None
    assert found.expected is not None
    assert f"One pass needs {found.limit:.1f} times fewer FLOPs than one pass per turn" in words(found)
    assert f"expect it to be {found.expected:.1f} times faster" in words(found)
    assert "Ordinary training on whole conversations would not be exact" in words(found)


def test_the_plain_verdict_where_history_is_kept(planned: Planned, tmp_path: Path) -> None:
    keeps = copy_tokenizer(tmp_path / "keeps", template(thinking() + CONTENT))
    found = planned(ROWS, model={"name_or_path": str(keeps)})
    assert found.history == "kept"
    assert "the turns of a conversation are one path" in words(found)
    assert "one pass saves nothing over ordinary training" in words(found)
    assert "faster" not in words(found)
    assert found.findings.history == "always"


def test_single_turns_share_nothing(planned: Planned) -> None:
    found = planned([conversation_row(1)] * 3)
    assert (found.history, found.limit) == ("single", 1.0)
    assert "there is no history to share, and one pass is ordinary training" in words(found)


def test_long_thinking_saves_little(planned: Planned) -> None:
    row = conversation_row(2)
    for message in row["messages"][1::2]:
        message["reasoning_content"] = "Seven coins and two coins are nine coins. " * 30
    found = planned([row])
    assert found.limit is not None
    assert 1 < found.limit < 1.1
    assert "One pass needs only 1.0" in words(found)


def test_a_recipe_or_a_model_that_trains_per_turn(planned: Planned, models: Callable[..., Path]) -> None:
    found = planned(ROWS, sequence={"strategy": "per_turn"})
    assert "The recipe trains one turn at a time (sequence.strategy: per_turn)" in words(found)
    assert found.run.tokens == round(found.per_turn.way.tokens * (2 / 5))  # two of an epoch's five steps
    of_model = replace(found, model=replace(found.model, reason="its layers look ahead"))
    assert "This model is trained one turn at a time: its layers look ahead." in " ".join(verdict(of_model))


def test_nothing_to_train(planned: Planned) -> None:
    found = planned([{"messages": [{"role": "assistant", "content": "Hello."}]}])
    assert (found.turns, found.limit) == (0, None)
    assert words(found).startswith("No turn would be trained: no message comes before it")
    assert json.dumps(found.as_json())


def test_what_would_stop_the_run_is_said(planned: Planned, tmp_path: Path) -> None:
    found = planned([*ROWS, {"messages": 3}], sequence={"max_length": 150, "overlong": "error"})
    assert "The run would stop: data.on_bad_row: error (" in words(found)
    assert "The run would stop: sequence.overlong: error (" in words(found)
    assert found.untrained[too_long(150)] > 0
    assert "turns" in words(found)
    small = copy_tokenizer(tmp_path / "small")
    config = json.loads((ROOT / "recipes/quickstart/base/config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    stopped = planned(ROWS, model={"name_or_path": str(small)})
    assert list(stopped.stops) == [STOPS_AT_REACH, STOPS_AT_ID]


# --- what is known, and what is not ---


def test_without_a_config_only_tokens_are_known(planned: Planned, tmp_path: Path) -> None:
    found = planned(ROWS, model={"name_or_path": str(copy_tokenizer(tmp_path / "tokenizer"))})
    known = found.as_json()
    assert known["flops"] == {"single_pass": None, "per_turn": None}
    assert known["speedup_limit_by"] == "tokens"
    assert known["speedup_limit"] == known["num_tokens"]["per_turn"] / known["num_tokens"]["single_pass"]
    assert "has no config.json" in known["model"]["missing"]
    (on_gpu,) = on_gpus(found, [find_gpu("L4")])
    assert (on_gpu.fit, on_gpu.duration) == (None, None)
    assert on_gpu.problem == found.model.missing
    assert "times fewer tokens" in words(found)


def test_a_sample_is_called_one_and_extrapolated(planned: Planned) -> None:
    whole = planned(ROWS, training={"max_steps": None})
    part = planned(ROWS, 8, training={"max_steps": None})
    assert (part.rows.counted, part.rows.of_epoch, part.rows.is_sample, whole.rows.is_sample) == (8, 20, True, False)
    assert part.as_json()["sample_seed"] == part.recipe.training.seed
    assert part.run.steps == whole.run.steps
    assert part.run.tokens == round(part.single_pass.way.tokens * 20 / 8)
    assert part.single_pass.way.tokens < whole.single_pass.way.tokens
    again = planned(ROWS, 8, training={"max_steps": None})
    assert again.as_json() == part.as_json()


def test_roles_hold_every_token_of_one_pass(planned: Planned) -> None:
    found = planned(ROWS)
    assert found.role_rows == found.conversations == 20
    assert list(found.roles) == list(ROLES)
    assert sum(found.roles.values()) == found.single_pass.way.tokens
    assert found.roles["thinking"] + found.roles["response"] == found.supervised
    assert found.roles["copy"] > 0


# --- GPUs ---


def test_memory_time_and_cost_are_ranges(planned: Planned) -> None:
    found = planned(ROWS, model={"dtype": "bfloat16"}, lora={"r": 4}, training={"max_steps": 1000})
    (fast,) = on_gpus(found, [find_gpu("H100 SXM")], prices=[3.0])
    assert fast.fit is not None
    assert fast.duration is not None
    assert fast.cost is not None
    assert fast.fit.low < fast.fit.high
    assert fast.fit.tokens < found.recipe.sequence.budget  # these packs are small
    assert fast.cost == pytest.approx(tuple(3.0 * seconds / 3600 for seconds in fast.duration.seconds))
    assert fast.lighter is not None
    twice = on_gpus(found, [find_gpu("H100 SXM")], 2)[0]
    assert twice.duration is not None
    assert twice.duration.seconds[0] < fast.duration.seconds[0]


def test_time_in_float32_is_not_made_up(planned: Planned) -> None:
    (found,) = on_gpus(planned(ROWS), [find_gpu("H100 SXM")])
    assert found.fit is not None
    assert found.duration is None
    assert "float32" in str(found.problem)


def test_a_spread_has_ranks_and_equal_bins() -> None:
    found = spread([1, 2, 2, 3, 10])
    assert found is not None
    assert (found.minimum, found.median, found.percentile_95, found.maximum) == (1, 2, 10, 10)
    assert found.counts == (1, 2, 1, 0, 0, 0, 0, 0, 0, 1)
    assert sum(spread(list(range(1000))).counts) == 1000  # type: ignore[union-attr]
    assert spread([]) is None
