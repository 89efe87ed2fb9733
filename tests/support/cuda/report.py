"""What the parts found, as tables of 80 columns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from support.cuda.parts import Finished
from support.cuda.waits import KNOWN, ON_PURPOSE

Results = Sequence[dict[str, Any]]


def show(console: Console, part: str, finished: Sequence[Finished]) -> None:
    """A part's table, then what does not hold."""
    seconds = sum(one.seconds for one in finished)
    state = "holds" if all(one.ok for one in finished) else "DOES NOT HOLD"
    console.rule(f"{part}: {state}, {seconds:.0f} s", align="left")
    results = [result for one in finished for result in one.results]
    if results:
        _TABLES[part](console, results)
    for one in finished:
        if one.problem:
            console.print(f"{one.job.part} {one.job.name}: no results", one.problem, sep="\n", markup=False)
    bad = [result for result in results if not result["ok"]]
    for result in bad[:_MOST_SHOWN]:
        console.print(_told(result), markup=False)
    if len(bad) > _MOST_SHOWN:
        console.print(f"... and {len(bad) - _MOST_SHOWN} more")


_MOST_SHOWN = 8


def _told(result: dict[str, Any]) -> str:
    """What does not hold, in few words."""
    values = [result.get(key) for key in ("combination", "shape", "fault", "device", "kind", "case", "name", "arch")]
    names = [" ".join(map(str, value.values())) if isinstance(value, dict) else str(value) for value in values if value]
    waits = [f"{count} x {what} in {where}" for what, where, count in result.get("unwanted") or ()]
    said = [*filter(None, [result.get("problem")]), *waits, *sorted(set(result.get("problems") or ()))]
    return f"! {', '.join(names)}: {'; '.join(said) or 'out of bounds'}"[:600]


def _table(console: Console, columns: Iterable[str], rows: Iterable[Sequence[Any]], left: int = 1) -> None:
    """The first `left` columns are text."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


# --- step -------------------------------------------------------------------------------------------------------------


def steps_in_short(results: Results) -> dict[str, Any]:
    """Combinations counted by device and model, and in full those that do not hold."""
    steps = [result for result in results if "combination" in result]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in steps:
        groups[result["combination"]["device"], result["combination"]["kind"]].append(result)
    waits = Counter[str]()
    for result in steps:
        waits.update({f"{what} in {where}": count for what, where, count in result["synchronizations"]})
    return {
        "combinations": [{"device": key[0], "kind": key[1], **_counts(group)} for key, group in groups.items()]
        + [{"device": "all", "kind": "", **_counts(steps)}],
        "waits": dict(waits),
        "refused_because": dict(Counter(result["skipped"] for result in steps if result["skipped"])),
        "planted": [result for result in results if "fault" in result],
        "not_ok": [result for result in steps if not result["ok"]],
    }


def _counts(group: Results) -> dict[str, int]:
    run = [result for result in group if not result["skipped"]]
    waits = sum(count for result in run for *_, count in result["synchronizations"])
    unwanted = sum(count for result in run for *_, count in result["unwanted"])
    return {
        "run": len(run),
        "refused": len(group) - len(run),
        "failed": sum(result["problem"] is not None for result in run),
        "mixes": sum(result["mixed"] for result in run),
        "waits": waits - unwanted,
        "unwanted": unwanted,
    }


def _step(console: Console, results: Results) -> None:
    found = steps_in_short(results)
    combinations = found["combinations"]
    _table(console, combinations[0], [list(row.values()) for row in combinations], left=2)
    _lines(console, "the host waits for the device", [f"{n} x {site}" for site, n in found["waits"].items()])
    _lines(console, "on purpose", [f"{what}: {why}" for what, why in (ON_PURPOSE | KNOWN).items()])
    _lines(console, "refused", [f"{n} x {reason}" for reason, n in found["refused_because"].items()])
    planted = found["planted"]
    console.print(f"faults planted: {len(planted)}, found: {sum(result['ok'] for result in planted)}")


def _lines(console: Console, title: str, lines: Iterable[str]) -> None:
    console.print(f"{title}:", *(f"- {line}" for line in lines), sep="\n", markup=False)


# --- the other parts --------------------------------------------------------------------------------------------------


def _kernels(console: Console, results: Results) -> None:
    columns = ("shape", "heads", "arch", "pass", "shared", "regs", "stack", "spills", "s")
    rows = [
        (
            result["shape"]["name"],
            result["heads"],
            result["arch"],
            result["direction"],
            f"{result['shared']:,}",
            result["registers"],
            result["stack"],
            result["spills"],
            f"{result['seconds']:.0f}",
        )
        for result in results
    ]
    _table(console, columns, rows, left=4)
    console.print("bytes; a block may take 232,448 of shared memory, a thread 255 registers; spills: stored + loaded")


def _recompiles(console: Console, results: Results) -> None:
    columns = ("model", "kernels", "bound", "layers' graphs", "bound", "past the limit")
    names = ("kind", "kernels", "most_kernels", "graphs", "most_graphs", "past_limit")
    _table(console, columns, [[result[name] for name in names] for result in results])


def _numerics(console: Console, results: Results) -> None:
    columns = ("case", "worst difference", "tolerance", "s")
    rows = [
        (
            result["name"],
            f"{max(result['differences'].values(), default=0.0):.1e}",
            f"{result['tolerance']:.0e}",
            f"{result['seconds']:.0f}",
        )
        for result in results
    ]
    _table(console, columns, rows)
    console.print("of outputs and gradients to the same in float64, relative to the largest element")


def _varlen(console: Console, results: Results) -> None:
    rows = [(result["case"], result["calls"], len(result["problems"])) for result in results]
    _table(console, ("heads", "calls", "problems"), [*rows, ("all", *(sum(row[i] for row in rows) for i in (1, 2)))])


_TABLES = {
    "step": _step,
    "recompiles": _recompiles,
    "kernels": _kernels,
    "numerics": _numerics,
    "recurrent": _numerics,
    "varlen": _varlen,
}
