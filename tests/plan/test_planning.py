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
from datasets import IterableDataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from support.paths import ROOT
from support.rows import conversation_row, copy_tokenizer
from support.templates import CONTENT, template, thinking

from mtr.chat.turn import too_long
from mtr.checks.roles import ROLES
from mtr.data.shapes import Reader
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.model.probe import Verdict
from mtr.plan.counting import STOPS_AT_ID
from mtr.plan.gpus import find_gpu
from mtr.plan.lengths import spread
from mtr.plan.memory import Needs, tried
from mtr.plan.on_gpu import on_gpus
from mtr.plan.planning import STOPS_AT_REACH, plan
from mtr.plan.plot import _histogram, _title, _work
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


def with_system(turns: int) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be careful. " * 40}, *conversation_row(turns)["messages"]]}


def test_what_conversations_share_is_said_where_their_turns_are_one_path(planned: Planned, tmp_path: Path) -> None:
    keeps = {"name_or_path": str(copy_tokenizer(tmp_path / "keeps", template(thinking() + CONTENT)))}
    for turns, history in ((1, "single"), (3, "kept")):
        rows = [with_system(turns)] * 5
        merged = planned(rows, model=keeps, sequence={"merge": "step"}, training={"conversations_per_step": 8})
        assert (merged.history, round(merged.merged)) == (history, 5)
        assert "Conversations share prefixes, though: merged, they have 5.0 times fewer tokens" in words(merged)
        assert "saves nothing" not in _title(merged)
        apart = planned(rows, model=keeps)
        assert apart.merged == 1
        assert "share prefixes" not in words(apart)
        assert ("saves nothing" in _title(apart)) == (history == "kept")


def test_packs_that_are_too_small_are_said_to_be(planned: Planned) -> None:
    rows = [with_system(2)] * 5
    lengths = planned(rows).lengths
    longest = lengths["prompt"].maximum + lengths["completion"].maximum
    found = planned(rows, sequence={"max_length": longest, "max_tokens": longest})
    assert found.limit is not None
    assert found.limit < 1.1
    assert "5 conversations are cut into 10 trees to fit sequence.max_tokens" in words(found)
    assert "little of what a turn computes" not in words(found)


def test_a_recipe_that_says_per_turn_where_one_pass_would_not_help(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_turn = {"strategy": "per_turn"}
    found = planned([conversation_row(1)] * 3, sequence=per_turn)
    assert "One pass would save little or nothing: it would need 1.00 times fewer FLOPs." in words(found)
    assert "if the recipe let it (strategy: auto)" in words(planned(ROWS, sequence=per_turn))
    monkeypatch.setattr("mtr.plan.model.judge", lambda *of: Verdict("its layers look ahead", None))
    inexact = planned(ROWS, sequence=per_turn)
    assert "if it were exact for this model, but: its layers look ahead." in words(inexact)
    assert "auto" not in words(inexact)


def test_a_recipe_or_a_model_that_trains_per_turn(planned: Planned, models: Callable[..., Path]) -> None:
    found = planned(ROWS, sequence={"strategy": "per_turn"})
    assert "The recipe trains one turn at a time (sequence.strategy: per_turn)" in words(found)
    assert found.run.tokens == round(found.per_turn.way.tokens * (2 / 5))  # two of an epoch's five steps
    of_model = replace(found, model=replace(found.model, reason="its layers look ahead"))
    assert "This model is trained one turn at a time: its layers look ahead." in " ".join(verdict(of_model))


def test_nothing_to_train(planned: Planned) -> None:
    found = planned([{"messages": [{"role": "assistant", "content": "Hello."}]}])
    assert (found.turns, found.limit) == (0, None)
    assert words(found).startswith("No turn would be trained. 1 of 1 turns (100%) would not be trained")
    assert "no message comes before it" in words(found)
    assert json.dumps(found.as_json())


NO_TURN: dict[str, Any] = {"messages": [{"role": "assistant", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("rows", "data", "said"),
    [
        ([conversation_row(3)] * 5, {"filter": {"max_turns": 2}}, "5 of 5 rows are left out by data.filter"),
        ([{"messages": 3}] * 50 + [NO_TURN], {"on_bad_row": "skip"}, "50 of 51 rows (98%) cannot be read"),
        ([{"messages": 3}] * 4, {}, "The run would stop: data.on_bad_row: error"),
    ],
)
def test_the_reason_why_nothing_is_trained_is_the_one_that_counts(
    planned: Planned, rows: list[Any], data: dict[str, Any], said: str
) -> None:
    found = planned(rows, data=data)
    assert words(found).startswith(f"No turn would be trained. {said}")
    (on_gpu,) = on_gpus(found, [find_gpu("L4")], prices=[1.0])
    assert (on_gpu.duration, on_gpu.cost) == (None, None)


def test_rows_that_are_lost_are_said(planned: Planned) -> None:
    found = planned([*ROWS, {"messages": 3}], data={"on_bad_row": "skip"})
    assert "1 of 21 rows (5%) cannot be read, one of them: " in words(found)
    assert "cannot be read" not in words(planned(ROWS))


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


@pytest.mark.parametrize(
    ("run", "steps", "rows"),
    [
        ({"max_steps": 1}, 1, 16),
        ({"max_steps": 2}, 2, 20),
        ({"max_steps": 5}, 5, 20 + 20 + 16),
        ({"max_steps": None, "num_train_epochs": 0.5}, 1, 16),
    ],
)
def test_a_run_takes_the_rows_of_its_steps(planned: Planned, run: dict[str, Any], steps: int, rows: int) -> None:
    """An epoch of 20 rows has a step of 16 and one of 4."""
    found = planned([conversation_row(2)] * 20, training={"conversations_per_step": 16, **run})
    assert (found.run.steps_per_epoch, found.run.steps) == (2, steps)
    assert found.run.tokens == round(found.single_pass.way.tokens * rows / 20)


def test_roles_hold_every_token_of_one_pass(planned: Planned) -> None:
    found = planned(ROWS)
    assert found.role_rows == found.conversations == 20
    assert list(found.roles) == list(ROLES)
    assert sum(found.roles.values()) == found.single_pass.way.tokens
    assert found.roles["thinking"] + found.roles["response"] == found.supervised
    assert found.roles["copy"] > 0


def bars(axes: Axes) -> list[Rectangle]:
    return [bar for bar in axes.patches if isinstance(bar, Rectangle)]


def test_the_picture_draws_what_there_is(planned: Planned) -> None:
    axes = Figure().add_subplot()
    _work(planned([NO_TURN]), axes)
    assert [bar.get_width() for bar in bars(axes)] == [0.0] * 6
    found = planned(ROWS)
    axes = Figure().add_subplot()
    _work(found, axes)
    one, apart = found.single_pass.way.tokens, found.per_turn.way.tokens
    assert [bar.get_width() for bar in bars(axes)][:2] == [1.0, one / apart]
    for name, values in (("turns", [2, 3, 5, 8]), ("conversation", None)):
        axes = Figure().add_subplot()
        _histogram(found.lengths[name], name, axes)
        filled = [bar for bar in bars(axes) if bar.get_height()]
        assert sum(bar.get_height() for bar in filled) == len(ROWS)
        if values:
            assert [bar.get_center()[0] for bar in filled] == values


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


def test_time_and_cost_are_told_of_what_can_run(planned: Planned) -> None:
    """Not in a dtype that a GPU has no units for, and not where nothing fits."""
    found = planned(ROWS, model={"dtype": "bfloat16"}, lora={"r": 4})
    old, small = find_gpu("T4"), replace(find_gpu("L4"), memory_gib=0.001)
    on_old, on_small = on_gpus(found, [old, small], prices=[1.0, 1.0])
    assert on_old.fit is not None
    assert on_old.fit.fits
    assert "T4 has no units for bfloat16" in str(on_old.problem)
    assert (on_small.fit is not None, on_small.instead) == (True, None)
    assert [(gpu.duration, gpu.cost) for gpu in (on_old, on_small)] == [(None, None)] * 2
    half = planned(ROWS, model={"dtype": "float16"}, lora={"r": 4})
    assert on_gpus(half, [old])[0].duration is not None


def test_smaller_packs_that_cut_conversations_are_said(planned: Planned) -> None:
    sequence = {"max_length": 512, "max_tokens": 1024}
    found = planned([conversation_row(40)] * 4, model={"dtype": "bfloat16"}, lora={"r": 4}, sequence=sequence)
    assert found.lengths["conversation"].maximum > 512
    needs = Needs(found.recipe, found.model.config)
    gpu = replace(find_gpu("L4"), memory_gib=(needs.with_mode("offload", find_gpu("L4"), 1, 512).high + 2**20) / 2**30)
    (on_gpu,) = on_gpus(found, [gpu])
    assert on_gpu.instead is not None
    assert on_gpu.instead.fit.tokens == 512
    assert "packs of 512 tokens cut what is longer" in str(on_gpu.problem)
    assert on_gpus(found, [find_gpu("L4")])[0].problem is None


def test_what_was_tried_is_what_could_be(planned: Planned) -> None:
    lora = planned(ROWS[:1], lora={"r": 4}).recipe
    whole = planned(ROWS[:1], lora=None).recipe
    assert tried(whole, find_gpu("L4")) == ["smaller packs", "more checkpointing"]
    assert tried(lora, find_gpu("L4")) == ["4 bits", "smaller packs", "more checkpointing"]
    assert tried(lora, find_gpu("T4"), 2) == ["FSDP2", "smaller packs", "more checkpointing"]


# --- streams ---


@pytest.fixture
def streamed(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    def run(number: int, most: int | None = None, **training: Any) -> Plan:
        made = IterableDataset.from_generator(lambda: iter(ROWS[:number]))
        data = Stream(((made, "org/a", 1.0),), (Reader(),))
        monkeypatch.setattr("mtr.plan.planning.open_training_data", lambda *of: (data, None))
        return planned(ROWS, most, training={"conversations_per_step": 4, "max_steps": None, **training})

    return run


def test_a_stream_that_ends_is_counted_as_it_is(streamed: Planned) -> None:
    found = streamed(10, max_steps=5)
    assert (found.rows.counted, found.rows.of_epoch, found.conversations) == (10, 10, 10)
    assert found.run.steps_per_epoch == 3
    assert found.run.tokens == round(found.single_pass.way.tokens * (10 + 4 + 4) / 10)
    assert "rows of" not in _title(found)
    part = streamed(10, 4, max_steps=5)
    assert _title(part).endswith(", 4 rows of a stream")
    assert (part.rows.counted, part.rows.of_epoch, part.rows.is_sample) == (4, None, True)
    assert part.run.tokens == round(part.single_pass.way.tokens * 5)


def test_a_stream_without_steps_would_stop_the_run(streamed: Planned) -> None:
    found = streamed(10)
    assert "The run would stop: training.max_steps is missing (of a stream, epochs cannot be counted)." in words(found)
    assert found.run.steps is None
    with pytest.raises(UserError, match="the stream has no rows"):
        streamed(0, max_steps=5)


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
