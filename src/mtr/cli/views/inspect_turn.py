"""One turn in full: the prompt that inference is fed, and the completion that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from mtr.chat.added_tokens import AddedTokens, any_of
from mtr.checks.inspection import Inspection
from mtr.checks.roles import ROLES, TurnTokens
from mtr.cli.views.inspect_style import COLOURS, Style
from mtr.cli.views.tables import count

_NARROW = 60
"""Columns of a terminal from which on there is room for the names of the roles."""


def show_turn(inspection: Inspection, tokens: TurnTokens, tokenizer: Any, out: Console) -> None:
    """Print what `mtr.checks.roles.turn_tokens` returned."""
    style, turn = Style(out), tokens.turn
    where = style.safe(inspection.conversation.where)
    name = f"row {inspection.index}, turn {turn.turn} of {len(inspection.turns)}, message {turn.message_index}"
    out.print(Text.assemble((name, "bold"), f"  {where}"))
    if turn.reason is not None:
        out.print(Text(style.safe(f"not trained: {turn.reason}"), "bold"))
    for note in turn.notes:
        out.print(Text(style.safe(f"note: {note}")))
    drawing = _Drawing(tokenizer, style, out)
    out.print()
    if tokens.refused:
        out.print(Text(style.safe(f"no prompt: {tokens.refused}")))
        return
    prompt, completion = (count(len(ids), "token") for ids in (tokens.prompt_ids, tokens.completion_ids))
    out.print(Text(f"prompt: {prompt}, what inference is fed", "bold"))
    for line in drawing.lines(tokens.prompt_ids, tokens.prompt_roles, trained=False):
        out.print(line)
    if turn.trained:
        out.print()
        out.print(Text(f"completion: {completion}, trained, each with weight {tokens.weight:g}", "bold"))
        for line in drawing.lines(tokens.completion_ids, tokens.completion_roles, tokens.weight > 0):
            out.print(line)


def describe_turn(inspection: Inspection, tokens: TurnTokens, tokenizer: Any) -> dict[str, Any]:
    """What `mtr inspect --turn N --json` prints."""
    turn = tokens.turn
    described: dict[str, Any] = {"index": inspection.index, "turn": turn.turn, "message_index": turn.message_index}
    described |= {"trained": turn.trained} | ({"reason": turn.reason} if turn.reason is not None else {})
    described |= {"notes": list(turn.notes)} if turn.notes else {}
    for name, ids, roles in (
        ("prompt", tokens.prompt_ids, tokens.prompt_roles),
        ("completion", tokens.completion_ids, tokens.completion_roles),
    ):
        described[name] = {
            "text": tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            "ids": list(ids),
            "roles": [ROLES[role] for role in roles.tolist()],
        }
    return described | {"weight": tokens.weight}


class _Drawing:
    def __init__(self, tokenizer: Any, style: Style, out: Console) -> None:
        self._tokenizer = tokenizer
        self._style = style
        self._out = out
        self._special = any_of(AddedTokens(tokenizer).special)

    def lines(self, ids: Sequence[int], roles: NDArray[np.int8], trained: bool) -> Iterator[Text]:
        """The text of these tokens, wrapped, each line behind the sign of the role that it begins with."""
        lines: list[tuple[int, Text]] = []
        for role, text in self._runs(ids, roles):
            for number, piece in enumerate(text.split("\n", allow_blank=True)):
                if number > 0 or not lines:
                    lines.append((role, Text()))
                if not lines[-1][1]:
                    lines[-1] = role, lines[-1][1]
                lines[-1][1].append_text(piece)
        if len(lines) > 1 and not lines[-1][1]:  # it ends in a line break, which would not be seen
            del lines[-1]
            lines[-1][1].append(self._style.signs.line_break, "dim")
        for number, (role, line) in enumerate(lines):
            new = number == 0 or lines[number - 1][0] != role
            yield from self._wrapped(line, role, trained, new)

    def _runs(self, ids: Sequence[int], roles: NDArray[np.int8]) -> Iterator[tuple[int, Text]]:
        cuts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(ids)]
        for start, end in pairwise(cuts):
            if start < end:
                text = self._tokenizer.decode(
                    list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                shown = Text(self._style.safe(text), COLOURS[ROLES[int(roles[start])]])
                shown.highlight_regex(self._special, "dim")
                yield int(roles[start]), shown

    def _wrapped(self, line: Text, role: int, trained: bool, new: bool) -> Iterator[Text]:
        """
        Args:
            new: name the role.
        """
        named = self._style.width >= _NARROW
        for number, part in enumerate(
            line.wrap(self._out, max(self._style.width - (12 if named else 2), 10)) or [Text()]
        ):
            start = Text.assemble(self._style.bar(role, trained), " ")
            if named:
                name = self._style.name(role, trained) if new and number == 0 else Text()
                start.append_text(name).append(" " * (10 - name.cell_len))
            start.append_text(part).rstrip()
            yield start
