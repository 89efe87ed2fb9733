"""What people see: progress and summaries of a run, tables of a bench or a verification, a tree drawn in text.

All of it goes to standard error but what a command was asked to show. Without a terminal progress is plain lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtr.checks.audit import DataReport, Report, explain
from mtr.checks.inspect import Inspection, Segment, segments
from mtr.training.progress import _cut

if TYPE_CHECKING:
    from mtr.tree.layout import Layout


def show_merge(result: dict[str, Any], out: Console) -> None:
    out.print(
        f"merged logits equal the adapter's within {result['difference']:.1e} of the largest one in float32 "
        f"(tolerance {result['tolerance']:.0e}); as {result['dtype']} within {result['after_rounding']:.1e}"
    )
    out.print(f"merged     {result['output']}")


def show_verification(result: dict[str, Any], out: Console) -> None:
    table = Table(title="single pass against one forward per turn", title_justify="left")
    for column in ("", "single pass", "per turn", "relative difference", "tolerance"):
        table.add_column(column, justify="left" if not column else "right")
    difference, tolerance, loss = result["max_relative_difference"], result["tolerance"], result["loss"]
    table.add_row(
        "loss",
        f"{loss['single_pass']:.12f}",
        f"{loss['per_turn']:.12f}",
        f"{difference['loss']:.1e}",
        f"{tolerance['loss']:.0e}",
    )
    name = f"gradients ({result['tensors']} tensors)"
    table.add_row(name, "", "", f"{difference['gradient']:.1e}", f"{tolerance['gradient']:.0e}")
    out.print(table)
    out.print(
        f"{result['conversations']} conversations, {result['turns']} turns, {result['dtype']}, "
        f"attention {result['attention']} on {result['device']}"
    )
    if result["zero_gradients"]:
        out.print(f"zero on both sides: {', '.join(result['zero_gradients'])}")
    out.print(
        "[green]passed[/]" if result["passed"] else "[red]FAILED[/]: one pass is not the same as one pass per turn"
    )


def show_bench(result: dict[str, Any], out: Console) -> None:
    shape, speedup, limit = result["shape"], result["speedup"], result["limit"]
    title = f"forward + backward, {result['repeats']} repeats on {result['device']}"
    table = _table(title, ["", "tokens", "median s", "tokens/s", "equiv/s", "MFU", "GiB", "speed-up"])
    packed = result["cases"][1]["seconds"]["median"]
    for case in result["cases"]:
        name, tokens = f"{case['strategy']} {case['attention']}", f"{case['num_tokens']:,}"
        if "error" in case:
            table.add_row(name, tokens, "-", "-", "-", "-", "-", "-")
            continue
        table.add_row(
            name,
            tokens,
            f"{case['seconds']['median']:.3f}",
            f"{case['tokens_per_second']:,.0f}",
            f"{case['per_turn_equivalent_tokens_per_second']:,.0f}",
            f"{case['mfu']:.0%}",
            f"{case['peak_memory_bytes'] / 2**30:.2f}",
            f"{packed / case['seconds']['median']:.2f}x",
        )
    trl = result.get("trl")
    if trl:
        seconds = trl["seconds"]["forward_backward"]["median"]
        rate = f"{trl['num_tokens'] / seconds:,.0f}"
        name = f"TRL {trl['version']} {trl['attention']}"
        table.add_row(name, f"{trl['num_tokens']:,}", f"{seconds:.3f}", rate, rate, "", "", f"{packed / seconds:.2f}x")
    out.print(table)
    for case in result["cases"]:
        name = f"{case['strategy']} {case['attention']}"
        if "error" in case:
            out.print(f"{name}: {escape(case['error'])}")
            continue
        seconds = case["seconds"]
        out.print(
            f"{name}: {seconds['min']:.3f} to {seconds['max']:.3f} s, {case['conversations_per_second']:.2f} "
            f"conv/s, {case['supervised_tokens_per_second']:,.0f} supervised tokens/s"
        )
    if trl:
        out.print(f"TRL: {trl['seconds']['step']['median']:.3f} s with its optimizer step, {_agreement(trl)}")
    out.print("equiv/s: tokens that one pass per turn would have had to process in the same time")
    out.print(_against(result))
    cut = shape["trees"] - shape["conversations"]
    out.print(
        f"{shape['conversations']} conversations, {shape['turns']} turns, "
        f"{shape['num_supervised_tokens']:,} supervised tokens; losses agree within "
        f"{result['max_relative_loss_difference']:.1e}"
    )
    if cut:
        out.print(f"sequence.max_tokens cut conversations into {shape['trees']} trees, which lowers the limit")
    out.print(
        f"speed-up {_ratio(speedup, 'vs_per_turn_packed')} against packed, "
        f"{_ratio(speedup, 'vs_per_turn_padded')} against padded; limit {limit['flops']:.2f}x by FLOPs, "
        f"{limit['tokens']:.2f}x by tokens"
    )
    out.print(f"{result['figure_of_merit']:.0%} of the FLOP limit against the faster baseline")


def show_sweep(result: dict[str, Any], out: Console) -> None:
    points = result["points"]
    title = f"forward + backward, {points[0]['repeats']} repeats on {result['device']}"
    names = ["turns", "thinking", "tokens", "per turn", "tokens/s", "MFU", "packed", "padded", "limit", "of limit"]
    table = _table(title, [*names, "TRL"] if "trl" in points[0] else names)
    for point in points:
        tokens, one = point["shape"]["num_tokens"], point["cases"][0]
        row = [
            str(point["turns"]),
            str(point["thinking"]),
            f"{tokens['single_pass']:,}",
            f"{tokens['per_turn_packed']:,}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.0%}",
            _ratio(point["speedup"], "vs_per_turn_packed"),
            _ratio(point["speedup"], "vs_per_turn_padded"),
            f"{point['limit']['flops']:.2f}x",
            f"{point['figure_of_merit']:.0%}",
        ]
        table.add_row(*row, *([f"{point['trl']['speedup']:.2f}x"] if "trl" in point else []))
    out.print(table)
    first = points[0]
    out.print(
        f"{first['shape']['conversations']} conversations a shape, user {first['user']} and response "
        f"{first['response']} words"
    )
    for number, strategy in enumerate(("single pass", "packed", "padded")):
        if strategy == "padded" and "vs_per_turn_padded" not in first["speedup"]:
            continue
        kernels = sorted({point["cases"][number]["attention"] for point in points})
        out.print(f"{strategy}: {'' if number == 0 else 'speed-up over per turn, '}attention {', '.join(kernels)}")
    if any(point["shape"]["trees"] > point["shape"]["conversations"] for point in points):
        out.print("sequence.max_tokens cut conversations into several trees, which lowers the limit")
    worst = max(point["max_relative_loss_difference"] for point in points)
    out.print(f"losses agree within {worst:.1e}")
    out.print(_against(result))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _against(result: dict[str, Any]) -> str:
    rate = result["matrix_rate"]
    return f"MFU: of the {rate['flops_per_second'] / 1e12:.3g} TFLOP/s that {rate['dtype']} products reach here"


def _agreement(trl: dict[str, Any]) -> str:
    difference = trl["relative_loss_difference"]
    return "its loss weighs turns otherwise" if difference is None else f"loss within {difference:.1e} of ours"


def _ratio(speedup: dict[str, float], name: str) -> str:
    return f"{speedup[name]:.2f}x" if name in speedup else "-"


def show_audit(report: Report, out: Console) -> None:
    out.print(f"[bold]{escape(report.name)}[/]")
    _show_pairs(explain(report), out)
    out.print("")
    table = Table(title="as training would take it", title_justify="left", box=None, padding=(0, 1))
    for column in ("conversation", "trained", ""):
        table.add_column(column, justify="right" if column == "trained" else "left", no_wrap=column != "")
    for trial in report.trials:
        said = "; ".join((*trial.reasons, *trial.notes, *trial.chosen))
        table.add_row(trial.kind, f"{trial.trained} of {trial.turns}", escape(said))
    out.print(table, soft_wrap=False)
    if report.data is not None:
        out.print("")
        _show_data(report.data, out)
    out.print("")
    what = "the usual kinds of conversation" if report.data is None else "this data"
    verdict = f"training would lose {'something' if report.losses else 'nothing'} of {what}"
    out.print(f"[{'red' if report.losses else 'green'}]{verdict}[/]")


def _show_data(data: DataReport, out: Console) -> None:
    of = "of a stream" if data.of_rows is None else f"of {data.of_rows:,}"
    out.print(f"[bold]data[/]  {data.rows:,} rows {of}: {data.trained:,} of {data.turns:,} turns are trained")
    lines = [
        (what, number, text)
        for what, counts in (("refused", data.refused), ("left out", data.chosen), ("note", data.notes))
        for text, number in counts.items()
    ]
    pairs = [(what, f"{_count(n, 'turn')}: {text} (first: {data.examples[text]})") for what, n, text in lines]
    pairs += [("unreadable", f"{_count(number, 'row')}: {text}") for text, number in data.unreadable.items()]
    _show_pairs(pairs, out)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _show_pairs(pairs: Iterable[tuple[str, str]], out: Console) -> None:
    """Topic and text side by side; a topic that goes on is not repeated."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = None
    for topic, text in pairs:
        table.add_row("" if topic == last else topic, escape(text))
        last = topic
    out.print(table, soft_wrap=False)


def show_inspection(inspection: Inspection, tokenizer: Any, out: Console) -> None:
    counts = inspection.num_tokens
    out.print(f"[bold]row {inspection.index}[/]  {escape(inspection.conversation.where)}")
    saved = counts["per_turn"] / max(counts["single_pass"], 1)
    out.print(
        f"single pass {counts['single_pass']:,} tokens, per turn {counts['per_turn']:,} ({saved:.2f}x), "
        f"supervised {counts['supervised']:,}"
    )
    width = max(out.width - 44, 30)
    table = Table(title="turns", title_justify="left", box=None, padding=(0, 1))
    for column in ("turn", "message", "prompt", "completion", "supervised text"):
        table.add_column(column, justify="left" if "text" in column else "right", no_wrap=True)
    for turn in inspection.turns:
        text = _cut(tokenizer.decode(turn.completion_ids), width) if turn.trained else "not trained"
        sizes = (len(turn.prompt_ids), len(turn.completion_ids))
        table.add_row(str(turn.turn), str(turn.message_index), *map(str, sizes), escape(text))
    out.print(table)
    said: dict[str, list[int]] = {}
    for turn in inspection.turns:
        lines = [f"note: {note}" for note in turn.notes] if turn.trained else [f"not trained: {turn.reason}"]
        for line in lines:
            said.setdefault(line, []).append(turn.turn)
    for line, numbers in said.items():
        out.print(escape(f"turn{'s' if len(numbers) > 1 else ''} {_ranges(numbers).replace(' ', ', ')} {line}"))
    for number, layout in enumerate(inspection.layouts):
        of = f" {number + 1} of {len(inspection.layouts)}" if len(inspection.layouts) > 1 else ""
        _show_tree(layout, tokenizer, out, of)


def _show_tree(layout: Layout, tokenizer: Any, out: Console, of: str) -> None:
    parts = segments(layout)
    first = {part.start: number for number, part in enumerate(parts)}
    above = [_segment_of(int(layout.parent[part.start]), parts) for part in parts]
    depth = [0] * len(parts)
    forks = {a for a in above if above.count(a) > 1}
    for number, a in enumerate(above):
        if a is not None:
            depth[number] = depth[a] + (a in forks and first[parts[number].start] != a + 1)
    supervised = set(layout.predictor.tolist())
    width = max(out.width - 62, 20)
    table = Table(title=f"tree{of}: {layout.num_tokens:,} tokens", title_justify="left", box=None, padding=(0, 1))
    for column in ("#", "segment", "tokens", "positions", "sees", "targets", "text"):
        table.add_column(column, justify="left" if column in ("segment", "sees", "text") else "right", no_wrap=True)
    for number, part in enumerate(parts):
        low, high = layout.position_ids[part.start], layout.position_ids[part.end - 1]
        seen = [str(other) for other in _seen(number, above)[:-1]]
        name = f"{'  ' * depth[number]}{'└ ' if depth[number] else ''}{part.kind} {part.turn}"
        table.add_row(
            str(number),
            name,
            f"{part.start}-{part.end - 1}",
            f"{low}-{high}",
            _ranges([int(s) for s in seen]) or "-",
            str(sum(i in supervised for i in range(part.start, part.end))),
            escape(_cut(tokenizer.decode(layout.input_ids[part.start : part.end].tolist()), width)),
        )
    out.print(table)
    out.print("mask by segment (row sees column):")
    for number in range(min(len(parts), 48)):
        seen_set = set(_seen(number, above))
        row = "".join("◣" if c == number else "█" if c in seen_set else "·" for c in range(min(len(parts), 48)))
        out.print(f"  {number:>3} {row}")
    if len(parts) > 48:
        out.print(f"  ... and {len(parts) - 48} more segments")


def _segment_of(index: int, parts: Sequence[Segment]) -> int | None:
    return next((n for n, part in enumerate(parts) if part.start <= index < part.end), None)


def _seen(number: int, above: Sequence[int | None]) -> list[int]:
    """Segments from the root down to this one."""
    path = [number]
    while (parent := above[path[-1]]) is not None:
        path.append(parent)
    return path[::-1]


def _ranges(numbers: Sequence[int]) -> str:
    text: list[str] = []
    start = previous = None
    for number in [*numbers, None]:
        if start is not None and previous is not None and number != previous + 1:
            text.append(str(start) if start == previous else f"{start}-{previous}")
            start = None
        start = number if start is None else start
        previous = number
    return " ".join(text)
