"""Claims: an epoch takes each source as often as its weight says, in an order that is a function of seed and epoch
alone; groups stay together, and within a step where they fit.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import LINES, answers, many, numbered, opened

from mtr.data.mixture import Mixture, fill_steps
from mtr.data.opening import open_training_data
from mtr.errors import UserError
from mtr.recipe.sections import DataSection

# --- mixing -----------------------------------------------------------------------------------------------------------


def two_files(tmp_path: Path, first: float, second: float) -> Mixture:
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(numbered(i))}\n" for i in range(10)))
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(numbered(i))}\n" for i in range(10, 16)))
    return opened(
        {"path": str(tmp_path / "a.jsonl"), "weight": first}, {"path": str(tmp_path / "b.jsonl"), "weight": second}
    )


def test_rows_are_numbered_through_all_sources_in_file_order(tmp_path: Path) -> None:
    data = two_files(tmp_path, 0.5, 2)
    assert len(data) == 16
    assert answers(data) == [f"answer {i}" for i in range(16)]
    assert data.conversation(10).where == f"{tmp_path / 'b.jsonl'}, line 1"
    for index in (16, -1):
        with pytest.raises(UserError, match="the data has 16 rows, counted from 0"):
            data.conversation(index)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("weight", "size"), [(0.5, 5), (1, 10), (2, 20), (2.5, 25), (0.25, 2), (0.07, 1)])
def test_an_epoch_holds_each_source_as_often_as_its_weight_says(
    tmp_path: Path, weight: float, size: int, shuffle: bool
) -> None:
    times = Counter(two_files(tmp_path, weight, 1).epoch(0, 42, shuffle).tolist())
    assert sum(times[i] for i in range(10)) == size
    assert all(int(weight) <= times[i] <= int(weight) + 1 for i in range(10))
    assert [times[i] for i in range(10, 16)] == [1] * 6


def test_without_shuffling_an_epoch_is_in_file_order(tmp_path: Path) -> None:
    assert two_files(tmp_path, 1, 1).epoch(3, 42, shuffle=False).tolist() == list(range(16))
    half = two_files(tmp_path, 0.5, 1).epoch(0, 42, shuffle=False).tolist()
    assert half == sorted(half)


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    data, again = two_files(tmp_path, 1, 1), two_files(tmp_path, 1, 1)
    order = data.epoch(0, 42, shuffle=True)
    assert np.array_equal(order, data.epoch(0, 42, shuffle=True))
    assert np.array_equal(order, again.epoch(0, 42, shuffle=True))
    assert sorted(order) == list(range(16))
    assert order.tolist() != list(range(16))
    assert not np.array_equal(order, data.epoch(1, 42, shuffle=True))
    assert not np.array_equal(order, data.epoch(0, 43, shuffle=True))


def test_a_share_of_a_source_differs_between_epochs(tmp_path: Path) -> None:
    data = two_files(tmp_path, 0.5, 1)
    shares = [frozenset(n for n in data.epoch(epoch, 42, shuffle=True).tolist() if n < 10) for epoch in range(6)]
    assert len(set(shares)) > 1
    assert frozenset().union(*shares) > shares[0]


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_stay_together_and_within_a_step(tmp_path: Path, shuffle: bool) -> None:
    data, _ = open_training_data(
        DataSection.model_validate({"train": str(many(tmp_path, count=96, group=8)), "group_by": "question"}), 1
    )
    assert isinstance(data, Mixture)
    order = data.epoch(0, 42, shuffle, step_size=16)
    assert sorted(order.tolist()) == list(range(96))
    for start in range(0, 96, 8):
        group = order[start : start + 8].tolist()
        assert group == list(range(group[0], group[0] + 8))
    assert np.array_equal(order, data.epoch(0, 42, shuffle, step_size=16))
    assert np.array_equal(order, data.epoch(1, 42, shuffle, step_size=16)) != shuffle


def test_members_that_lie_apart_come_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**numbered(i), "question": f"q{i % 4}"}) + "\n" for i in range(12)) + LINES[0])
    data, _ = open_training_data(DataSection.model_validate({"train": str(path), "group_by": "question"}), 1)
    assert isinstance(data, Mixture)
    order = data.epoch(0, 1, shuffle=False, step_size=6).tolist()
    assert order[:12] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert order[12] == 12, "a row without the column is its own group"


def test_a_source_taken_twice_has_each_group_twice(tmp_path: Path) -> None:
    section = {"train": [{"path": str(many(tmp_path, count=24, group=4)), "weight": 2.5}], "group_by": "question"}
    data, _ = open_training_data(DataSection.model_validate(section), 1)
    assert isinstance(data, Mixture)
    order = data.epoch(0, 1, shuffle=True, step_size=12).tolist()
    assert Counter(Counter(order).values()) == {2: 12, 3: 12}
    for start in range(0, 60, 4):
        assert len({i // 4 for i in order[start : start + 4]}) == 1


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_a_step_ends_inside_a_group_only_where_none_fits(sizes: list[int], step_size: int) -> None:
    groups = [[i] * size for i, size in enumerate(sizes)]
    order = fill_steps(groups, step_size)
    assert Counter(order) == Counter(i for group in groups for i in group)
    assert len([None for i in range(len(order)) if i == 0 or order[i] != order[i - 1]]) == len(sizes), "all adjacent"
    for end in range(step_size, len(order), step_size):
        start = order.index(order[end])
        if end - step_size < start < end:  # a group begins in this step and ends in a later one
            assert all(sizes[i] > end - start for i in set(order[end:])), "another one would have fitted"
