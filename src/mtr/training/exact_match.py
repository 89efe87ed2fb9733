"""A generated turn beside its reference, and whether it is right.

A turn is right when its response equals the reference's. Where a row has an `answer`, the last turn is right when its
response gives that answer: equal, in the last \\boxed{}, or as the last number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GeneratedTurn:
    """One generated turn beside its reference."""

    conversation: str
    turn: int
    thinking: str
    response: str
    reference: str
    answer: str | None = None
    """Of the row, for its last turn."""
    asked: str | None = None
    """What the user and the tools said since the assistant's last message."""

    @property
    def exact_match(self) -> bool:
        if self.answer is not None:
            return gives_answer(self.response, self.answer)
        return self.response == self.reference

    def as_row(self) -> dict[str, Any]:
        row = {**asdict(self), "exact_match": self.exact_match}
        return {key: value for key, value in row.items() if value is not None}


def gives_answer(response: str, answer: str) -> bool:
    """The response is the answer, or its last boxed{} holds it, or, for a number, its last number is equal."""
    response, answer = response.strip(), answer.strip()
    boxed = _BOXED.findall(response)
    if response == answer or (boxed and boxed[-1].strip() == answer):
        return True
    wanted, found = _number(answer), _NUMBER.findall(boxed[-1] if boxed else response)
    return wanted is not None and bool(found) and _number(found[-1]) == wanted


_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _number(text: str) -> float | None:
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def exact_match(generated: Sequence[GeneratedTurn]) -> float:
    """Share of turns, 0 to 1."""
    return sum(turn.exact_match for turn in generated) / max(len(generated), 1)
