"""generations.jsonl: held-out conversations played turn by turn, before training and after it, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtr.report.lines import lines_of

MOST_CONVERSATIONS = 60
"""That a report shows, the first ones of the file."""
_MOST_TEXT = 6000
"""Characters of a text; its middle is left out if it is longer."""


@dataclass
class Played:
    """What a run generated before its first step and after its last one."""

    before: dict[str, Any] | None = None
    """Keys: step, turns, right (numbers of turns); None if nothing was generated then."""
    after: dict[str, Any] | None = None
    num_conversations: int = 0
    conversations: list[dict[str, Any]] = field(default_factory=list)
    """The first ones. Keys: where; turns, a list of {turn, asked, reference, before, after}; of before and after:
    thinking, response, right."""
    damaged: int = 0
    """Lines that cannot be read."""


def read_played(path: Path) -> Played:
    """
    Raises:
        UserError: the file cannot be read.
    """
    reader = _Reader()
    for line in lines_of(path, "restore the generations.jsonl of the run, or remove it"):
        reader.take(line)
    return reader.found()


class _Reader:
    """Holds the texts of the conversations that are shown, and of the others only what is right."""

    def __init__(self) -> None:
        self._conversations: dict[str, dict[int, dict[str, Any]]] = {}
        self._shown: set[str] = set()
        self._end = 0
        """The last step after which something was generated."""
        self._damaged = 0

    def take(self, raw: bytes) -> None:
        line = _parse(raw)
        if line is None:
            self._damaged += 1
            return
        step = line["step"]
        if step > self._end:
            for turns in self._conversations.values():
                for turn in turns.values():
                    turn["after"] = None
            self._end = step
        if step not in (0, self._end):
            return
        turns = self._conversations.setdefault(line["conversation"], {})
        turn = turns.setdefault(line["turn"], {"turn": line["turn"], "asked": None, "before": None, "after": None})
        right = line.get("exact_match") is True
        turn["after" if step else "before"] = said = {"thinking": "", "response": "", "right": right}
        if len(self._shown) < MOST_CONVERSATIONS:
            self._shown.add(line["conversation"])
        if line["conversation"] in self._shown:
            said |= {key: _text(line.get(key)) for key in ("thinking", "response")}
            turn |= {key: _text(line[key]) for key in ("asked", "answer") if line.get(key) is not None}
            turn["reference"] = _text(line.get("reference"))

    def found(self) -> Played:
        shown = {where: turns for where, turns in self._conversations.items() if where in self._shown}
        return Played(
            self._counted("before", 0),
            self._counted("after", self._end),
            len(self._conversations),
            [
                {"where": where, "turns": [turns[n] for n in sorted(turns)]}
                for where, turns in zip(_short(list(shown)), shown.values(), strict=True)
            ],
            self._damaged,
        )

    def _counted(self, when: str, step: int) -> dict[str, Any] | None:
        said = [turn[when] for turns in self._conversations.values() for turn in turns.values() if turn[when]]
        return {"step": step, "turns": len(said), "right": sum(one["right"] for one in said)} if said else None


def _short(places: Sequence[str]) -> list[str]:
    """Files and lines without the folders of their files, but for as many as tell all of them apart."""
    parts = [place.replace("\\", "/").split("/") for place in places]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(places)


def _text(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if len(text) <= _MOST_TEXT:
        return text
    half = _MOST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
        is_one = type(line["step"]) is type(line["turn"]) is int and isinstance(line["conversation"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return line if is_one else None


def first_change(conversations: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """A turn that training put right, with the conversation that it is of; else the first one."""
    turns = [(chat["where"], turn) for chat in conversations for turn in chat["turns"]]
    better = (one for one in turns if _right(one[1]["after"]) and not _right(one[1]["before"]))
    return next(better, turns[0] if turns else None)


def _right(said: dict[str, Any] | None) -> bool:
    return said is not None and bool(said["right"])
