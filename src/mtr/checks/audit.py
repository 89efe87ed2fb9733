"""What a chat template does to conversations, and what training with it would lose.

    findings (by sentinels)  +  sample conversations, rendered as in training  +  the rows of a recipe  ->  report

Every claim comes from rendering with this template, these arguments and this date; no model is known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from mtr.chat.findings import Findings
from mtr.chat.rendering import Renderer
from mtr.chat.turn import CHOSEN, INLINE_HISTORY, Turn
from mtr.checks.data_report import DataReport
from mtr.data.parsing import parse_row

_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Count coins.",
        "parameters": {"type": "object", "properties": {"who": {"type": "string", "description": "Whose."}}},
    },
}


def _user(content: str = "How many coins?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str = "Seven coins.", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _calls(*whose: str, **keys: Any) -> dict[str, Any]:
    calls = [
        {"id": f"count000{n}", "type": "function", "function": {"name": "count", "arguments": {"who": who}}}
        for n, who in enumerate(whose)
    ]
    return {"role": "assistant", "tool_calls": calls, **keys}


def _result(number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"count000{number}", "name": "count", "content": "7"}


_THOUGHT = {"reasoning_content": "Three and four."}
_LOOP = [_user(), _calls("Ana", reasoning_content="Ask for Ana."), _result(), _answer(**_THOUGHT)]
_INLINE = "<think>\nThree and four.\n</think>\n\nSeven coins."
KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "turns with thinking": ([_user(), _answer(**_THOUGHT), _user("And Ben?"), _answer(**_THOUGHT)], False),
    "turns with inline thinking": ([_user(), _answer(_INLINE), _user("And Ben?"), _answer(_INLINE)], False),
    "turns without thinking": ([_user(), _answer(), _user("And Ben?"), _answer()], False),
    "thinking in a tool loop": (_LOOP, True),
    "parallel tool calls": ([_user(), _calls("Ana", "Ben"), _result(), _result(1), _answer()], True),
    "text beside a tool call": ([_user(), _calls("Ana", content="Let me ask."), _result(), _answer()], True),
    "a system message": ([{"role": "system", "content": "Count."}, _user(), _answer()], False),
}
"""Common conversations: messages, and whether tool schemas are given. Losing a turn of any of them is a loss."""
ODD_KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "a developer message": ([{"role": "developer", "content": "Count."}, _user(), _answer()], False),
    "an assistant greeting first": ([_answer("Hello."), _user(), _answer()], False),
    "two user messages in a row": ([_user(), _user("And Ben?"), _answer()], False),
    "two assistant messages in a row": ([_user(), _answer("Let me count."), _answer()], False),
}
"""Unusual conversations: shown, but not counted as losses."""


@dataclass(frozen=True)
class Trial:
    """What training would make of a sample conversation."""

    kind: str
    usual: bool
    turns: int
    trained: int
    reasons: tuple[str, ...]
    """Why turns are refused."""
    chosen: tuple[str, ...]
    """Why turns are excluded on purpose: by the data or the recipe."""
    notes: tuple[str, ...]
    """What turns that are trained are missing."""
    forks: bool
    """A turn does not continue the turn before it, so that one pass needs copies."""


@dataclass(frozen=True)
class Report:
    """All that `mtr audit` found."""

    name: str
    arguments: dict[str, Any]
    date: str
    findings: Findings
    trials: tuple[Trial, ...]
    data: DataReport | None

    @property
    def losses(self) -> list[str]:
        """What training would lose: of the data if there is any, else of common conversations."""
        if self.data is not None:
            parts = {**self.data.refused, **self.data.notes, **self.data.unreadable}
            return [text for text in parts if text != INLINE_HISTORY]
        return [
            f"{trial.kind}: {text}"
            for trial in self.trials
            if trial.usual
            for text in (*trial.reasons, *trial.notes)
            if text != INLINE_HISTORY
        ]

    def as_json(self) -> dict[str, Any]:
        """What `mtr audit --json` prints."""
        return {**asdict(self), "losses": self.losses, "passed": not self.losses}


def audit(renderer: Renderer, name: str, data: DataReport | None = None) -> Report:
    """Render the sample conversations, and report on them, the template and the data.

    Args:
        name: of the model or tokenizer, for the report.
        data: from `mtr.checks.audit_rows`.
    """
    trials = [
        _try(renderer, kind, usual, messages, with_tools)
        for usual, kinds in ((True, KINDS), (False, ODD_KINDS))
        for kind, (messages, with_tools) in kinds.items()
    ]
    template = renderer.template
    return Report(name, template.arguments, template.day.isoformat(), renderer.findings, tuple(trials), data)


def _try(renderer: Renderer, kind: str, usual: bool, messages: list[dict[str, Any]], with_tools: bool) -> Trial:
    conversation = parse_row({"messages": messages, "tools": [_TOOL] if with_tools else None}, kind)
    turns = renderer.render(conversation)
    trained = [turn for turn in turns if turn.trained]
    why = list(dict.fromkeys(turn.reason for turn in turns if turn.reason is not None))
    return Trial(
        kind,
        usual,
        turns=len(turns),
        trained=len(trained),
        reasons=tuple(reason for reason in why if reason not in CHOSEN),
        chosen=tuple(reason for reason in why if reason in CHOSEN),
        notes=tuple(dict.fromkeys(note for turn in trained for note in turn.notes)),
        forks=_forks(trained),
    )


def _forks(turns: Sequence[Turn]) -> bool:
    """Whether a turn's prompt does not begin with the turn before it, completion included."""
    for turn, later in pairwise(turns):
        ids = turn.prompt_ids + turn.completion_ids
        if later.prompt_ids[: len(ids)] != ids:
            return True
    return False
