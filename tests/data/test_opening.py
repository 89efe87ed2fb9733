"""Claims: rows that are held out for evaluation are never trained on; which ones is a function of the seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.sources import generate, many, opened

from mtr.data.mixture import Mixture
from mtr.data.opening import open_training_data, split_data
from mtr.errors import UserError
from mtr.recipe.sections import DataSection


def divided(path: Path, seed: int = 1, **keys: Any) -> tuple[Mixture, Mixture]:
    data, held_back = open_training_data(DataSection.model_validate({"train": str(path), **keys}), seed)
    assert isinstance(data, Mixture)
    assert held_back is not None
    return data, held_back


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_held_back_is_never_trained(tmp_path: Path, shuffle: bool) -> None:
    train, held_back = divided(many(tmp_path), eval_fraction=0.1)
    assert (train.num_rows, held_back.num_rows) == (90, 10)
    evaluated = set(held_back.epoch(0, 1, shuffle).tolist())
    assert len(evaluated) == 10
    for epoch in range(3):
        assert sorted({*train.epoch(epoch, 1, shuffle).tolist()} | evaluated) == list(range(100))
        assert not {*train.epoch(epoch, 1, shuffle).tolist()} & evaluated


def test_the_share_is_a_function_of_the_seed(tmp_path: Path) -> None:
    def rows(seed: int) -> list[int]:
        return [int(i) for i in divided(many(tmp_path), seed, eval_fraction=0.2)[1].epoch(0, 1, shuffle=False)]

    assert rows(1) == rows(1) != rows(2)


def test_a_group_is_held_back_whole(tmp_path: Path) -> None:
    train, held_back = divided(many(tmp_path, group=8), eval_fraction=0.1, group_by="question")
    questions = [{i // 8 for i in part.epoch(0, 1, shuffle=True).tolist()} for part in (train, held_back)]
    assert not questions[0] & questions[1]
    assert questions[0] | questions[1] == set(range(13))
    assert held_back.num_rows in (12, 16)


def test_weights_hold_for_what_is_left(tmp_path: Path) -> None:
    train, _ = divided(many(tmp_path), eval_fraction=0.1)
    source = replace(train.sources[0], weight=2.0)
    assert Counter(Counter(replace(train, sources=(source,)).epoch(0, 1, shuffle=True).tolist()).values()) == {2: 90}
    with pytest.raises(UserError, match="leaves nothing to train on"):
        split_data(opened(many(tmp_path, count=1)), 0.5, 1)


def test_a_stream_cannot_be_divided_or_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": 0, "count": 3})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    for keys in ({"eval_fraction": 0.1}, {"group_by": "id"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(keys))}: a Hub stream .* set data.streaming to false"):
            open_training_data(DataSection.model_validate({"train": "org/name", **keys}), 1)
