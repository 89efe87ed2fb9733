"""The tree of a conversation, a line for each run of tokens, in the order in which it is read:

tokens   count
 0-33       34  │ system    Count the apples.
34-60       27  │ prompt    Ana has 14 apples.
                ├─╮ turn 0 sees 61 tokens, generates 30
91-120      30  │ ▌ thinking  Start: 14.
61-90       30  │ copy      Ana has 14 apples now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from mtr.chat.added_tokens import AddedTokens, any_of
from mtr.checks.inspect_outline import Begin, Branch, Run, outline
from mtr.checks.inspect_rows import ranges
from mtr.checks.inspection import Inspection
from mtr.checks.roles import THINKING, TokenRoles
from mtr.cli.views.inspect_style import Style

_DEEPEST = 8
"""Branches within branches that are still indented."""
_NARROW, _WIDE = 60, 120
"""Columns of a terminal from which on there is room for the numbers of the tokens, and for their positions."""


def tree_lines(inspection: Inspection, tree: int, roles: TokenRoles, tokenizer: Any, style: Style) -> Iterator[Text]:
    """The lines of one tree, with a heading."""
    drawing = _Drawing(inspection, tree, tokenizer, style)
    yield drawing.heading()
    for part in outline(inspection, tree, roles):
        yield drawing.run(part) if isinstance(part, Run) else drawing.turns(part)


class _Drawing:
    def __init__(self, inspection: Inspection, tree: int, tokenizer: Any, style: Style) -> None:
        self._turns = {turn.turn: turn for turn in inspection.turns}
        self._messages = inspection.conversation.messages
        self._layout = inspection.layouts[tree]
        self._tokenizer = tokenizer
        self._style = style
        self._special = any_of(AddedTokens(tokenizer).special)
        last = self._layout.num_tokens - 1
        deepest = int(self._layout.position_ids.max(initial=0))
        numbers = 2 * len(str(last)) + 1 if style.width >= _NARROW else 0
        positions = 2 * len(str(deepest)) + 1 if style.width >= _WIDE else 0
        columns = (("tokens", numbers), ("positions", positions), ("count", len(f"{last + 1:,}")))
        self._columns = {name: max(width, len(name)) for name, width in columns if width}

    def heading(self) -> Text:
        return Text(self._gutter({name: name for name in self._columns}).rstrip(), "dim")

    def run(self, run: Run) -> Text:
        positions = self._layout.position_ids
        cells = {
            "tokens": _range(run.start, run.end - 1),
            "positions": _range(int(positions[run.start]), int(positions[run.end - 1])),
            "count": f"{run.end - run.start:,}",
        }
        line = Text.assemble((self._gutter(cells), "dim"), self._guides(run.depth))
        line.append_text(self._style.bar(run.role, run.trained)).append(" ")
        name = self._style.name(run.role, run.trained)
        line.append_text(name).append(" " * (10 - name.cell_len))
        text = self._style.line(self._text(run), self._style.width - line.cell_len)
        return line.append(text, "bold" if run.trained else "dim")

    def turns(self, part: Branch | Begin) -> Text:
        """Where a branch leaves, or a completion begins."""
        signs, numbers = self._style.signs, part.turns if isinstance(part, Branch) else (part.turn,)
        line = Text(self._gutter({}))
        if isinstance(part, Branch):
            line.append_text(self._guides(part.depth - 1)).append(f"{signs.branch} ", "dim")
        else:
            line.append_text(self._guides(part.depth)).append(f"{signs.turn} ", "dim")
        line.append(f"turn{'s' if len(numbers) > 1 else ''} {', '.join(ranges(numbers))}", "bold")
        told = self._told(part)
        return line.append(told, "dim") if line.cell_len + len(told) <= self._style.width else line

    def _told(self, part: Branch | Begin) -> str:
        """What to say of a turn beside its number."""
        if isinstance(part, Begin) or part.state == "begins":
            turn = self._turns[part.turn if isinstance(part, Begin) else part.turns[0]]
            weight = "" if turn.weight == 1 else f", weight {turn.weight:g}"
            return f"  sees {len(turn.prompt_ids):,} tokens, generates {len(turn.completion_ids):,}{weight}"
        if part.state == "goes on":
            return ", the rest of it"
        return ", its context" if len(part.turns) == 1 else ""

    def _gutter(self, cells: dict[str, str]) -> str:
        return "".join(f"{cells.get(name, ''):>{width}}  " for name, width in self._columns.items())

    def _guides(self, depth: int) -> Text:
        return Text(f"{self._style.signs.context} " * min(depth, _DEEPEST), "dim")

    def _text(self, run: Run) -> str:
        """What the tokens say: the message's own text where they have its beginning, else without special tokens."""
        ids = self._layout.input_ids[run.start : min(run.end, run.start + 4 * self._style.width)].tolist()
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False))
        message = self._messages[run.message] if run.message >= 0 else None
        if message is not None and not (message.tool_calls and run.role != THINKING):
            own = (message.thinking if run.role == THINKING else message.content) or ""
            if own.strip() and own.strip()[:40] in text:
                return own
        return self._special.sub(" ", text).strip() or text


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
