"""The results of `mtr bench` as tables, one of cases or one of a sweep, and what their columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from mtr.cli.views.tables import count, plain_table
from mtr.cli.views.work import shares
from mtr.console import printable


def show_bench(result: dict[str, Any], out: Console) -> None:
    """Print what `mtr.bench.runs.bench` returned."""
    _show_cases(result, out)
    _show_rates(result["cases"], out)
    if trl := result.get("trl"):
        out.print(f"TRL: {trl['seconds']['step']['median']:.3f} s with its optimizer step, {_agreement(trl)}")
    out.print("per-turn tokens/s: tokens of one pass per turn / seconds of the case")
    out.print(_mfu(result))
    _show_outcome(result, out)


def _show_cases(result: dict[str, Any], out: Console) -> None:
    packed = result["cases"][1]["seconds"]["median"]
    columns = [
        "",
        "tokens",
        "median\nseconds",
        "tokens/s",
        "per-turn\ntokens/s",
        "MFU",
        "peak\nGiB",
        "speed-up\nvs packed",
    ]
    table = plain_table(_title(result["repeats"], result["device"]), columns, left=[""], dense=True)
    for case in result["cases"]:
        name, tokens = _name(case), f"{case['num_tokens']:,}"
        if "error" in case:
            table.add_row(name, tokens, *["-"] * 6)
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
    if trl := result.get("trl"):
        seconds = trl["seconds"]["forward_backward"]["median"]
        rate = f"{trl['num_tokens'] / seconds:,.0f}"
        name = f"TRL {trl['version']} {trl['attention']}"
        table.add_row(name, f"{trl['num_tokens']:,}", f"{seconds:.3f}", rate, rate, "", "", f"{packed / seconds:.2f}x")
    out.print(table)


def _show_rates(cases: Sequence[dict[str, Any]], out: Console) -> None:
    for case in cases:
        if "error" in case:
            out.print(f"{_name(case)}: {escape(printable(case['error']))}")
            continue
        seconds = case["seconds"]
        out.print(
            f"{_name(case)}: {seconds['min']:.3f} to {seconds['max']:.3f} s, {case['conversations_per_second']:.2f} "
            f"conv/s, {case['supervised_tokens_per_second']:,.0f} supervised tokens/s"
        )


def _show_outcome(result: dict[str, Any], out: Console) -> None:
    shape, speedup, limit = result["shape"], result["speedup"], result["limit"]
    out.print(
        f"{count(shape['conversations'], 'conversation')}, {count(shape['turns'], 'turn')}, "
        f"{count(shape['num_supervised_tokens'], 'supervised token')}"
    )
    out.print(f"losses differ by at most {result['max_relative_loss_difference']:.1e} (relative)")
    if shape["trees"] > shape["conversations"]:
        out.print(f"sequence.max_tokens cut conversations into {shape['trees']} trees, which lowers the limit")
    out.print(
        f"speed-up of the single pass: {_ratio(speedup, 'vs_per_turn_packed')} vs packed, "
        f"{_ratio(speedup, 'vs_per_turn_padded')} vs padded"
    )
    out.print(f"limit: {limit['flops']:.2f}x by FLOPs, {limit['tokens']:.2f}x by tokens")
    out.print(f"FLOPs of the single pass: {shares(limit['by_part']['single_pass'])}")
    out.print(f"reached: {result['figure_of_merit']:.0%} of the FLOP limit against the faster baseline")


def show_sweep(result: dict[str, Any], out: Console) -> None:
    """Print what `mtr.bench.runs.sweep` returned."""
    points = result["points"]
    columns = ["turns", "thinking\nwords", "tokens,\none pass", "tokens,\nper turn", "tokens/s", "MFU"]
    columns += ["vs\npacked", "vs\npadded", "limit", "of\nlimit"]
    with_trl = "trl" in points[0]
    title = _title(points[0]["repeats"], result["device"])
    table = plain_table(title, [*columns, "vs\nTRL"] if with_trl else columns, dense=True)
    for point in points:
        table.add_row(*_point(point), *([f"{point['trl']['speedup']:.2f}x"] if with_trl else []))
    out.print(table)
    first = points[0]
    out.print(
        f"{count(first['shape']['conversations'], 'conversation')} per shape; "
        f"{count(first['user'], 'word')} per user message, {first['response']:,} per response"
    )
    for number, strategy in enumerate(("single pass", "packed", "padded")):
        if strategy == "padded" and "vs_per_turn_padded" not in first["speedup"]:
            continue
        kernels = ", ".join(sorted({point["cases"][number]["attention"] for point in points}))
        what = "" if number == 0 else f"vs {strategy}: speed-up over one pass per turn, {strategy}, "
        out.print(f"{what or 'single pass: '}attention {kernels}")
    if with_trl:
        out.print(f"vs TRL: speed-up over TRL {first['trl']['version']}, attention {first['trl']['attention']}")
    out.print("limit: speed-up by FLOPs; of limit: reached against the faster baseline")
    if any(point["shape"]["trees"] > point["shape"]["conversations"] for point in points):
        out.print("sequence.max_tokens cut conversations into several trees, which lowers the limit")
    worst = max(point["max_relative_loss_difference"] for point in points)
    out.print(f"losses differ by at most {worst:.1e} (relative)")
    out.print(_mfu(result))


def _point(point: dict[str, Any]) -> list[str]:
    tokens, one = point["shape"]["num_tokens"], point["cases"][0]
    return [
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


def _name(case: dict[str, Any]) -> str:
    return f"{case['strategy']} {case['attention']}"


def _title(repeats: int, device: str) -> str:
    return f"forward + backward, {count(repeats, 'repeat')} on {device}"


def _mfu(result: dict[str, Any]) -> str:
    rate = result["matrix_rate"]
    reached = f"{rate['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return f"MFU: share of the {reached} that {rate['dtype']} matmuls reach on this device"


def _agreement(trl: dict[str, Any]) -> str:
    difference = trl["relative_loss_difference"]
    if difference is None:
        return "a loss that weights turns differently"
    return f"loss within {difference:.1e} of the single pass (relative)"


def _ratio(speedup: dict[str, float], name: str) -> str:
    return f"{speedup[name]:.2f}x" if name in speedup else "-"
