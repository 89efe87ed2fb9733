"""The page of `mtr inspect --html`: conversations as trees of tokens, in one file that needs no network.

The page holds the layout in compact arrays and computes in the browser what a token sees, by the rule of
`mtr.tree.mask`. No T x T mask is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtr.checks.inspection import Inspection, segments
from mtr.checks.roles import ROLES
from mtr.console import printable
from mtr.data.conversation import Conversation, SkippedRow
from mtr.files import written_whole
from mtr.pages.shell import asset, page
from mtr.pages.tokens import TokenTexts
from mtr.tree.layout import Layout

if TYPE_CHECKING:
    from mtr.chat.turn import Turn
    from mtr.checks.roles import TokenRoles

Row = tuple[Inspection, Sequence["TokenRoles"]] | SkippedRow

_SCRIPTS = (
    "inspect_tree.js",
    "inspect_sections.js",
    "inspect_rows.js",
    "inspect_flow.js",
    "inspect_outline.js",
    "inspect_mask.js",
    "inspect_detail.js",
    "inspect.js",
)
_MOST_UNTRAINED = 2000
"""Tokens of a completion without loss that the page holds."""


def write_inspect_page(path: Path, rows: Iterable[Row], tokenizer: Any, *, title: str = "mtr inspect") -> None:
    """Write the page of these rows, replacing the file.

    Args:
        rows: inspections with their `token_roles`, and rows that training skips.
        tokenizer: of the recipe's model.

    Raises:
        OSError: it cannot be written.
    """
    text = inspect_page(rows, tokenizer, title=title)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def inspect_page(rows: Iterable[Row], tokenizer: Any, *, title: str = "mtr inspect") -> str:
    """The page as text."""
    texts = TokenTexts(tokenizer)
    described = [_skipped(row) if isinstance(row, SkippedRow) else _row(*row, texts) for row in rows]
    data = {
        "roles": ROLES,
        "rows": described,
        "tokens": {"ids": texts.ids, "texts": texts.texts, "special": texts.special},
    }
    script = "\n".join(asset(name) for name in _SCRIPTS)
    return page(title, asset("inspect.html"), style=asset("inspect.css"), script=script, data=data)


def _skipped(row: SkippedRow) -> dict[str, Any]:
    return {"index": row.row, "where": row.where, "skipped": printable(row.problem or row.reason)}


def _row(inspection: Inspection, roles: Sequence[TokenRoles], texts: TokenTexts) -> dict[str, Any]:
    leaf_of = {
        view.turn: (number, leaf) for number, layout in enumerate(inspection.layouts) for leaf, view in layout.leaves
    }
    return {
        "index": inspection.index,
        "where": printable(inspection.conversation.where),
        "opening": _opening(inspection.conversation),
        "messages": [printable(message.role) for message in inspection.conversation.messages],
        "num_tokens": inspection.num_tokens,
        "flops": inspection.flops and {name: sum(parts.values()) for name, parts in inspection.flops.items()},
        "turns": [_turn(turn, leaf_of.get(turn.turn), texts) for turn in inspection.turns],
        "trees": [_tree(layout, found, texts) for layout, found in zip(inspection.layouts, roles, strict=True)],
    }


def _opening(conversation: Conversation) -> str:
    """The beginning of the first user message, to know the row by."""
    said = next((message.content for message in conversation.messages if message.role == "user"), "")
    line = " ".join(said[:400].split())
    return printable(line if len(line) <= 120 else f"{line[:119]}\u2026")


def _turn(turn: Turn, leaf: tuple[int, int] | None, texts: TokenTexts) -> dict[str, Any]:
    described: dict[str, Any] = {
        "turn": turn.turn,
        "message": turn.message_index,
        "prompt": len(turn.prompt_ids),
        "completion": len(turn.completion_ids),
    }
    if turn.trained and leaf is not None:
        described |= {"tree": leaf[0], "leaf": leaf[1]}
    else:
        shown = turn.completion_ids[:_MOST_UNTRAINED]
        described |= {"reason": printable(turn.reason or ""), "text": texts.text(shown), "shown": len(shown)}
    if turn.notes:
        described["notes"] = [printable(note) for note in turn.notes]
    return described


def _tree(layout: Layout, roles: TokenRoles, texts: TokenTexts) -> dict[str, Any]:
    return {
        "ids": texts.numbers(layout.input_ids),
        "end": runs(layout.subtree_end),
        "position": runs(layout.position_ids, step=1),
        "parent": runs(layout.parent, step=1),
        "role": runs(roles.role),
        "message": runs(roles.message),
        "predictor": layout.predictor.tolist(),
        "target": texts.numbers(layout.target_id),
        "weight": runs(layout.weight),
        "segments": [[part.start, part.end, part.kind, part.turn] for part in segments(layout)],
        "joined": texts.joined(layout.input_ids, layout.parent),
    }


def runs(values: NDArray[Any], step: int = 0) -> list[float]:
    """Values as [first, length, first, length, ...], where each is `step` more than the one before it."""
    if not len(values):
        return []
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values) != step]))
    lengths = np.diff(np.append(starts, len(values)))
    return [number for pair in zip(values[starts].tolist(), lengths.tolist(), strict=True) for number in pair]
