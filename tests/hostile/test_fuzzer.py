"""Claims: valid recipes, rows, templates and run folders that are damaged at random end in one line with a documented
exit code, or with a right result; a wrong result is noticed. `scripts/hostile_test.py` tries many more.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from support.hostile import Place
from support.rows import conversation_row

from hostile.fuzzing import KINDS, SECTIONS, TEMPLATES
from mtr.chat.rendering import Renderer
from mtr.data.mixture import Mixture

EXAMPLES = 120


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_damaged_it_ends_well(tmp_path: Path, name: str) -> None:
    kind, place = KINDS[name], Place(tmp_path / "place")
    kind.setup(place)

    @settings(
        max_examples=max(6, int(kind.share * EXAMPLES)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def attempt(value: Any) -> None:
        outcome = kind.attempt(place, value)
        assert outcome.problem is None

    attempt()


def lose_a_row(patch: pytest.MonkeyPatch) -> None:
    whole = Mixture.__len__
    patch.setattr(Mixture, "__len__", lambda self: whole(self) - 1)


def lose_a_token(patch: pytest.MonkeyPatch) -> None:
    whole = Renderer.render
    patch.setattr(
        Renderer,
        "render",
        lambda *given: [dataclasses.replace(turn, prompt_ids=turn.prompt_ids[:-1]) for turn in whole(*given)],
    )


def forget_the_date(patch: pytest.MonkeyPatch) -> None:
    from mtr.recipe.loading import load_saved_recipe

    patch.setattr(
        "hostile.fuzzing.load_saved_recipe", lambda path: load_saved_recipe(path).model_copy(update={"date": None})
    )


def train_otherwise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mtr.training.loop.clip_gradients", lambda *given: 1.0)


ROWS_FILE = "".join(json.dumps(conversation_row(turns)) + "\n" for turns in (1, 2)).encode()


@pytest.mark.parametrize(
    ("name", "value", "harm", "problem"),
    [
        ("recipes", (yaml.safe_dump(SECTIONS).encode(), False), forget_the_date, "another recipe"),
        ("rows", (ROWS_FILE, "skip", False), lose_a_row, "2 lines, 1 rows"),
        ("templates", (TEMPLATES[0], False), lose_a_token, "the prompt of turn 0"),
        ("folders", ([("no checkpoint", 3), ("no checkpoint", 2)], "--resume"), train_otherwise, "other weights"),
    ],
)
def test_a_wrong_result_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, harm: Any, problem: str
) -> None:
    kind, place = KINDS[name], Place(tmp_path / "place")
    kind.setup(place)
    assert kind.attempt(place, value).problem is None
    harm(monkeypatch)
    found = kind.attempt(place, value).problem
    assert found is not None
    assert problem in found
