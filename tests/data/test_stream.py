"""Claims: a stream gives every row in an order that is a function of seed and epoch, and names the place of each;
streams are mixed by their weights, and do not mix with files.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from support.sources import LINES, ROWS, generate, refused

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.opening import open_data
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.recipe.sections import DataSection, Source


def stream(*sizes: int, weights: tuple[float, ...] = (1.0, 1.0), buffer: int = 100) -> Stream:
    sources, start = [], 0
    for number, size in enumerate(sizes):
        made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": start, "count": size})
        sources.append((made, f"org/{'ab'[number]}", weights[number]))
        start += size
    return Stream(tuple(sources), (Reader(),) * len(sources), buffer=buffer)


def taken(data: Stream, epoch: int = 0, seed: int = 1, shuffle: bool = True) -> list[str]:
    return [c.messages[-1].content.removeprefix("answer ") for c in conversations_of(data, epoch, seed, shuffle)]


def conversations_of(data: Stream, epoch: int = 0, seed: int = 1, shuffle: bool = True) -> list[Conversation]:
    rows = list(data.rows(epoch, seed, shuffle))
    assert not any(isinstance(row, SkippedRow) for row in rows)
    return [row for row in rows if isinstance(row, Conversation)]


def test_a_stream_gives_every_row_in_order_and_says_where_it_is() -> None:
    conversations = conversations_of(stream(20), shuffle=False)
    assert [c.messages[-1].content for c in conversations] == [f"answer {i}" for i in range(20)]
    assert [c.where for c in conversations] == [f"org/a, row {i + 1}" for i in range(20)]
    assert set(conversations[0].row) == {"id", "messages"}


def test_a_shuffled_stream_keeps_the_place_of_each_row_and_repeats_its_order() -> None:
    conversations = conversations_of(stream(20), shuffle=True)
    order = [int(c.row["id"]) for c in conversations]
    assert [c.where for c in conversations] == [f"org/a, row {i + 1}" for i in order]
    assert order != list(range(20))
    assert sorted(order) == list(range(20))
    assert taken(stream(20)) == [str(i) for i in order]
    assert taken(stream(20), epoch=1) != [str(i) for i in order]
    assert taken(stream(20), seed=7) != [str(i) for i in order]


def test_streams_mix_in_an_order_that_repeats() -> None:
    order = taken(stream(20, 10))
    assert order == taken(stream(20, 10))
    assert set(order) == {str(i) for i in range(30)}
    conversations = conversations_of(stream(20, 10), shuffle=False)
    assert {c.where.split(",")[0] for c in conversations} == {"org/a", "org/b"}


def test_the_weights_of_streams_are_their_shares() -> None:
    def share(weights: tuple[float, float]) -> float:
        first = taken(stream(300, 300, weights=weights), shuffle=False)[:200]
        return sum(int(i) < 300 for i in first) / len(first)

    assert share((9.0, 1.0)) > 0.8
    assert share((1.0, 9.0)) < 0.2


def test_a_bad_row_of_a_stream_is_named() -> None:
    made = datasets.IterableDataset.from_generator(lambda: iter([ROWS[0], {"messages": []}]))
    data = Stream(((made, "org/a", 1.0),), (Reader(),))
    with pytest.raises(UserError, match="org/a, row 2: 'messages' must be a non-empty list"):
        list(data.rows(0, 1, shuffle=False))


def test_a_hub_source_is_streamed_and_does_not_mix_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": 0, "count": 3})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    section = DataSection(train=[Source(path="org/name")])
    data = open_data(section, section.train)
    assert isinstance(data, Stream)
    assert taken(data, shuffle=False) == ["0", "1", "2"]
    (tmp_path / "a.jsonl").write_text(LINES[0])
    assert "Hub streams and local files cannot be mixed; set data.streaming to false" in refused(
        "org/name", tmp_path / "a.jsonl"
    )


def test_a_stream_passes_over_bad_rows_too() -> None:
    made = datasets.IterableDataset.from_generator(lambda: iter([ROWS[0], {"messages": []}, ROWS[1]]))
    data = Stream(((made, "org/a", 1.0),), (Reader(),), Policy(skip_bad=True))
    kinds = [type(row) for row in data.rows(0, 1, shuffle=False)]
    assert kinds == [Conversation, SkippedRow, Conversation]
    assert [c.where for c in data.first(2)] == ["org/a, row 1", "org/a, row 3"]


def test_each_stream_has_the_shape_of_its_first_row() -> None:
    spoken = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": str(i)}]} for i in range(3)]
    asked = [{"prompt": "q", "completion": str(i)} for i in range(3, 6)]
    made = [datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows)) for rows in (spoken, asked)]
    sources = tuple((stream, f"org/{i}", 1.0) for i, stream in enumerate(made))
    assert set(taken(Stream(sources, (Reader(shape=None),) * 2))) == set("012345")
