"""A conversation as `mtr inspect` shows it: how many tokens of which role, its trees, and their masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mtr.checks.inspect_rows import ranges
from mtr.checks.inspection import Inspection
from mtr.checks.roles import ROLES, TokenRoles
from mtr.cli.views.inspect_mask import mask_lines
from mtr.cli.views.inspect_style import FILLS, MEANINGS, Style
from mtr.cli.views.inspect_tree import tree_lines
from mtr.cli.views.work import shares, with_unit


def show_inspection(inspection: Inspection, roles: Sequence[TokenRoles], tokenizer: Any, out: Console) -> None:
    """Print what `mtr.checks.inspect.inspect_conversation` returned.

    Args:
        roles: of each layout, as `mtr.checks.roles.token_roles` returns them.
    """
    style = Style(out)
    lines = [*_summary(inspection, style), *_untrained(inspection, style), *_legend(roles, style)]
    for tree, (layout, of) in enumerate(zip(inspection.layouts, roles, strict=True)):
        several = len(inspection.layouts) > 1
        title = f"tree {tree + 1} of {len(inspection.layouts)}: {layout.num_tokens:,} tokens" if several else ""
        lines += [Text(), *([Text(title, "bold")] if several else [])]
        lines += tree_lines(inspection, tree, of, tokenizer, style)
        lines += [Text(), *mask_lines(layout, of, style)]
    for line in lines:
        out.print(line)


def _summary(inspection: Inspection, style: Style) -> Iterator[Text]:
    counts = inspection.num_tokens
    yield Text.assemble((f"row {inspection.index}", "bold"), f"  {style.safe(inspection.conversation.where)}")
    one, apart, trained = (counts[name] for name in ("single_pass", "per_turn", "supervised"))
    yield Text(
        f"tokens: {one:,} in a single pass, {apart:,} per turn ({apart / max(one, 1):.2f}x); "
        f"{trained:,} supervised ({trained / max(one, 1):.0%})"
    )
    flops = inspection.flops
    if flops is not None and (single := sum(flops["single_pass"].values())) > 0:  # not NaN, a turn is trained
        several = sum(flops["per_turn"].values())
        yield Text(
            f"work: {with_unit(single)} in a single pass, {with_unit(several)} per turn ({several / single:.2f}x)\n"
            f"      of the single pass: {shares(flops['single_pass'])}"
        )


def _untrained(inspection: Inspection, style: Style) -> Iterator[Text]:
    """How many turns are trained, why others are not, and what else there is to know of them."""
    turns = inspection.turns
    yield Text(f"turns: {sum(turn.trained for turn in turns)} of {len(turns)} trained")
    remarks: dict[str, list[int]] = {}
    for turn in turns:
        for line in [f"note: {note}" for note in turn.notes] if turn.trained else [f"not trained: {turn.reason}"]:
            remarks.setdefault(line, []).append(turn.turn)
    for line, numbers in remarks.items():
        yield Text(style.safe(f"  turn{'s' if len(numbers) > 1 else ''} {', '.join(ranges(numbers))} {line}"))


def _legend(roles: Sequence[TokenRoles], style: Style) -> Iterator[Text]:
    """The tokens by role, as one bar and in numbers; trained ones have another sign."""
    counts = {
        (role, trained): sum(int(((of.role == role) & ((of.weight > 0) == trained)).sum()) for of in roles)
        for trained in (False, True)
        for role in range(len(ROLES))
    }
    total = sum(counts.values())
    if not total:
        return
    yield Text()
    edges = np.cumsum([0, *counts.values()]) * style.width // total
    bar = Text()
    for (role, trained), width in zip(counts, np.diff(edges).tolist(), strict=True):
        bar.append((style.signs.full if trained else style.signs.light) * width, FILLS[ROLES[role]])
    yield bar
    width = len(f"{max(counts.values()):,}")
    entries = []
    for (role, trained), count in counts.items():
        if count:
            entry = Text.assemble(style.bar(role, trained), " ", style.name(role, trained))
            entry.append(" " * (11 - entry.cell_len)).append(f"{count:>{width},}")
            entries.append(entry.append(f" {count / total:>4.0%}  {MEANINGS[ROLES[role]]}", "dim"))
    yield from _in_columns(entries, style.width)
    yield Text.assemble((f"{style.signs.trained} trained", "bold"), "   ", (f"{style.signs.context} context", "dim"))


def _in_columns(entries: Sequence[Text], width: int) -> Iterator[Text]:
    """The entries side by side where two fit into the width, the first half on the left."""
    widest = max(entry.cell_len for entry in entries)
    half = len(entries) if 2 * widest + 3 > width else (len(entries) + 1) // 2
    for left, right in zip_longest(entries[:half], entries[half:]):
        line = left.copy()
        if right is not None:
            line.append(" " * (widest + 3 - left.cell_len)).append_text(right)
        yield line
