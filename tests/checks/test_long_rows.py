"""Claims: commands do little more work for a conversation of thousands of turns than for the part of it that can be
trained, and none with the text of a message that is far too long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.work import count_work, short_messages

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return count_work(monkeypatch)


COMMANDS = {
    "audit": (("--json",), 1),
    "inspect": (("--json", "--verify"), 0),
    "train": (("training.max_steps=1", "data.num_workers=0"), 0),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_conversation_of_thousands_of_turns(
    command: str, mtr: Mtr, write_recipe: Write, write_rows: Write, work: dict[str, int]
) -> None:
    options, wanted = COMMANDS[command]
    done = {}
    for turns in (400, 1600):
        rows = write_rows([short_messages(turns)])
        recipe = write_recipe(
            data={"train": str(rows)},
            sequence={"max_length": 512},
            training={"conversations_per_step": 1, "output_dir": str(rows.parent / f"run {turns}")},
        )
        work.update(messages=0, characters=0)
        code, out, err = mtr(command, recipe, *options)
        assert code == wanted
        assert "longer than sequence.max_length (512)" in out + err
        assert work["messages"] < 120_000
        assert work["characters"] < 400_000
        done[turns] = work["messages"]
    assert done[1600] < 3 * done[400]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_a_huge_message_is_not_encoded(
    role: str, overlong: str, mtr: Mtr, write_recipe: Write, write_rows: Write, work: dict[str, int]
) -> None:
    row = short_messages(3)
    next(message for message in row["messages"][2:] if message["role"] == role)["content"] = "coins " * 200_000
    rows = write_rows([row])
    recipe = write_recipe(data={"train": str(rows)}, sequence={"overlong": overlong})
    code, out, err = mtr("inspect", recipe, "--json")
    assert work["characters"] < 200_000
    if overlong == "drop":
        assert out.count('"reason": "longer than sequence.max_length (4096)"') == 2
    else:
        assert (code, err) == (
            2,
            f"error: {rows}, line 1, message 3: the turn is longer than sequence.max_length (4096); raise it, or set "
            "sequence.overlong to drop or truncate\n",
        )
