"""A conversation as `mtr inspect` shows it: its turns, its tree in segments, and the mask between segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from mtr.checks.inspection import Inspection, Segment, segments
from mtr.cli.views.tables import plain_table
from mtr.cli.views.work import shares, with_unit
from mtr.console import printable, shorten

_MOST = 48
"""Segments that the drawing of the mask shows."""


def show_inspection(inspection: Inspection, tokenizer: Any, out: Console) -> None:
    """Print what `mtr.checks.inspect.inspect_conversation` returned."""
    counts = inspection.num_tokens
    out.print(f"[bold]row {inspection.index}[/]  {escape(printable(inspection.conversation.where))}")
    ratio = counts["per_turn"] / max(counts["single_pass"], 1)
    out.print(
        f"tokens: {counts['single_pass']:,} in a single pass, {counts['per_turn']:,} per turn ({ratio:.2f}x); "
        f"{counts['supervised']:,} supervised"
    )
    if inspection.flops is not None:
        _show_work(inspection.flops, out)
    _show_turns(inspection, tokenizer, out)
    for number in range(len(inspection.layouts)):
        _show_tree(inspection, number, tokenizer, out)


def _show_work(flops: dict[str, dict[str, float]], out: Console) -> None:
    one, apart = (sum(flops[strategy].values()) for strategy in ("single_pass", "per_turn"))
    if one > 0:  # not NaN, and there is a turn to train
        out.print(
            f"work: {with_unit(one)} in a single pass, {with_unit(apart)} per turn ({apart / one:.2f}x); "
            f"of the single pass: {shares(flops['single_pass'])}"
        )


def _show_turns(inspection: Inspection, tokenizer: Any, out: Console) -> None:
    width = max(out.width - 44, 30)
    columns = ["turn", "message", "prompt\ntokens", "completion\ntokens", "supervised text"]
    table = plain_table("turns", columns, left=["supervised text"])
    remarks: dict[str, list[int]] = {}
    for turn in inspection.turns:
        text = _line(tokenizer.decode(turn.completion_ids), width) if turn.trained else "not trained"
        sizes = (len(turn.prompt_ids), len(turn.completion_ids))
        table.add_row(str(turn.turn), str(turn.message_index), *map(str, sizes), escape(text))
        for line in [f"note: {note}" for note in turn.notes] if turn.trained else [f"not trained: {turn.reason}"]:
            remarks.setdefault(line, []).append(turn.turn)
    out.print(table)
    for line, numbers in remarks.items():
        out.print(escape(printable(f"turn{'s' if len(numbers) > 1 else ''} {', '.join(_ranges(numbers))} {line}")))


def _line(text: str, width: int) -> str:
    return shorten(printable(text), width)


def _show_tree(inspection: Inspection, tree: int, tokenizer: Any, out: Console) -> None:
    layout = inspection.layouts[tree]
    of = f" {tree + 1} of {len(inspection.layouts)}" if len(inspection.layouts) > 1 else ""
    parts = segments(layout)
    above = [_segment_of(int(layout.parent[part.start]), parts) for part in parts]
    supervised = set(layout.predictor.tolist())
    width = max(out.width - 62, 20)
    columns = ["#", "segment", "tokens", "positions", "attends\nto", "targets", "text"]
    table = plain_table(f"tree{of}: {layout.num_tokens:,} tokens", columns, left=["segment", "attends\nto", "text"])
    for number, (part, depth) in enumerate(zip(parts, _depths(above), strict=True)):
        low, high = layout.position_ids[part.start], layout.position_ids[part.end - 1]
        table.add_row(
            str(number),
            f"{'  ' * depth}{'└ ' if depth else ''}{part.kind} {part.turn}",
            f"{part.start}-{part.end - 1}",
            f"{low}-{high}",
            " ".join(_ranges(_path_to(number, above)[:-1])) or "-",
            str(sum(i in supervised for i in range(part.start, part.end))),
            escape(_line(tokenizer.decode(layout.input_ids[part.start : part.end].tolist()), width)),
        )
    out.print(table)
    out.print("trunk N: context, used first by turn N; branch N: turn N as generated")
    _show_mask(above, out)


def _show_mask(above: Sequence[int | None], out: Console) -> None:
    out.print("mask by segment (row attends to column; ◣ causal, █ all of it):")
    shown = range(min(len(above), _MOST))
    for number in shown:
        visible = set(_path_to(number, above))
        row = "".join("◣" if other == number else "█" if other in visible else "·" for other in shown)
        out.print(f"  {number:>3} {row}")
    if len(above) > _MOST:
        out.print(f"  ... and {len(above) - _MOST} more segments")


def _segment_of(index: int, parts: Sequence[Segment]) -> int | None:
    """The number of the segment that holds a token; None for the root's parent, -1."""
    return next((n for n, part in enumerate(parts) if part.start <= index < part.end), None)


def _depths(above: Sequence[int | None]) -> list[int]:
    """How far to indent each segment: one further than its parent where it leaves the parent's straight line."""
    depths = [0] * len(above)
    for number, parent in enumerate(above):
        if parent is not None:
            forks = above.count(parent) > 1
            depths[number] = depths[parent] + (forks and number != parent + 1)
    return depths


def _path_to(number: int, above: Sequence[int | None]) -> list[int]:
    """Segments from the root down to this one."""
    path = [number]
    while (parent := above[path[-1]]) is not None:
        path.append(parent)
    return path[::-1]


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as ranges: 0 1 2 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
