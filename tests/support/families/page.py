"""The results as a page of the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from support.families.catalogue import FAMILIES, HEADINGS, Family
from support.families.evidence import EXACT, LONGEST

Row = dict[str, Any]
Rows = dict[str, Row]

_INTRO = """# Which models are exact

**{counts}**

{summary}
{named}

For each family, a small random model of its architecture, with every kind of layer of its config, computes a pack of
two trees: forks inside chunks, branches off branches, a branch of one token, padding. Its loss and the gradient of
every trained tensor are compared with one plain forward pass of the model's own code for each turn. A figure is the
largest difference, relative to the largest entry of the tensor's gradient.

- **float64**: the worst of three runs: all weights, the same with gradient checkpointing, and LoRA on all linear
  layers. Casts to float32 in the model's code are kept out (`src/mtr/model/float64.py`), so an exact model has rounding
  only. Exact means at most {exact}.
- **float32**: all weights, computed as the model's code has it. What is above 1e-6 is rounding that its layers enlarge.
- **tree ignored**: the same row as one causal sequence. This is what the comparison shows where something is wrong.

Made by `scripts/support_table` in {minutes} minutes on {cores} CPU cores, with {versions}, on {date}; not to be edited
by hand. All figures, sizes and times are in [models.json](../benchmarks/results/models.json).

A model need not be on this page. What a run takes is found out when it starts, from its own config, by a probe that
compares logits of a small model (`src/mtr/model/probe.py`; {median:.1f} seconds of a core in the median here,
{longest:.1f} at most, with the import of the model's code). `mtr verify` compares loss and gradients of the model
itself.
"""

_PER_TURN = "Trained per turn"
_PER_TURN_TEXT = """
`sequence.strategy: auto` trains these turn by turn, for turns of up to {longest:,} tokens, and says so. With **one turn
a row**, the model's own code computes each turn, so the figures are those of its own rounding. Why not in one pass:
"""
_REASONS = (
    ("by their place in the row", "Some layers choose or merge keys by their place in the row: indexers, compression."),
    ("transformers' attention interface", "Attention is in the model's own code, and takes no mask from elsewhere."),
    ("does not hand keyword arguments on", "Layers do not hand on to attention what it is called with."),
    ("over a tree than turn by turn", "Found by trying it: a small model computes other logits over a tree."),
)
"""Words in a verdict's reason, and what the page says for all families whose reason has them."""
_NOT_TRAINED_TEXT = """
`mtr` refuses these: what they compute for a token depends on the tokens after it, so they would see what they predict.
"""


def page(results: Row) -> str:
    rows: Rows = results["families"]
    families = [family for family in FAMILIES if family.name in rows]
    exact = [family for family in families if _is_exact(rows[family.name])]
    packages = [f"{name} {version}" for name, version in results["versions"].items()]
    text = _INTRO.format(
        counts=_counts(rows),
        summary=_summary(exact, rows),
        named=_named(exact, rows),
        exact=_figure(EXACT),
        minutes=math.ceil(results["seconds"] / 60),
        cores=results["cores"],
        versions=f"{', '.join(packages[:-1])} and {packages[-1]}",
        date=results["date"],
        median=statistics.median(row.get("probe_seconds", 0.0) for row in rows.values()),
        longest=max(row.get("probe_seconds", 0.0) for row in rows.values()),
    )
    for heading in HEADINGS:
        columns = ("family", "known as", "float64", "float32", "tree ignored")
        listed = [_exact_row(family, rows[family.name]) for family in exact if family.heading == heading]
        text += f"\n## {heading}\n\n{_table(columns, listed)}" if listed else ""
    text += _per_turn([family for family in families if _is_per_turn(rows[family.name])], rows)
    text += _not_trained([family for family in families if _is_refused(rows[family.name])], rows)
    return text + _remarks(families, rows)


def _is_exact(row: Row) -> bool:
    return row["strategy"] == "single_pass" and not row["problem"]


def _is_per_turn(row: Row) -> bool:
    return row["strategy"].startswith("per_turn") and not row["problem"]


def _is_refused(row: Row) -> bool:
    return row["strategy"] == "refused" and not row["problem"]


def _counts(rows: Rows) -> str:
    exact, apart = (sum(map(kind, rows.values())) for kind in (_is_exact, _is_per_turn))
    rest = len(rows) - exact - apart
    others = f", {rest} not trained" if rest else ""
    return f"{len(rows)} families: {exact} exact in one pass, {apart} trained per turn{others}."


# --- what is exact ----------------------------------------------------------------------------------------------------


def _summary(exact: Sequence[Family], rows: Rows) -> str:
    """The worst of each column, by heading."""
    lines = []
    for heading in HEADINGS:
        listed = [rows[family.name] for family in exact if family.heading == heading]
        if listed:
            worst = [max(_all(rows_of, listed)) for rows_of in (_float64, _float32)]
            lines.append((heading, len(listed), *map(_figure, worst), _figure(min(_all(_naive, listed)))))
    columns = ("exact in one pass", "families", "worst in float64", "worst in float32", "least with the tree ignored")
    return _table(columns, lines)


def _named(exact: Sequence[Family], rows: Rows) -> str:
    """Whose figures are the worst."""
    slow = sorted(exact, key=lambda family: -max(_float32(rows[family.name]), default=0.0))[:3]
    least = sorted(exact, key=lambda family: -max(_float64(rows[family.name]), default=0.0))[:3]
    ends = []
    for title, listed, figures in (("float64", least, _float64), ("float32", slow, _float32)):
        named = [f"`{family.name}` {_figure(max(figures(rows[family.name])))}" for family in listed]
        ends.append(f"{', '.join(named)} in {title}")
    return f"Farthest off: {'; '.join(ends)}."


def _exact_row(family: Family, row: Row) -> tuple[str, ...]:
    columns = (_float64(row), _float32(row), _naive(row))
    return (f"`{family.name}`", family.known, *(_figure(max(column)) if column else "" for column in columns))


# --- what is not ------------------------------------------------------------------------------------------------------


def _per_turn(listed: Sequence[Family], rows: Rows) -> str:
    text = f"\n## {_PER_TURN}\n{_PER_TURN_TEXT.format(longest=LONGEST)}\n"
    by_reason: dict[str, list[str]] = {}
    for family in listed:
        by_reason.setdefault(_reason(rows[family.name]), []).append(f"`{family.name}`")
    text += "".join(f"- {reason} {', '.join(names)}\n" for reason, names in by_reason.items())
    names = {"per_turn": "turns share a row", "per_turn_unpacked": "one turn a row"}
    table = [
        (f"`{family.name}`", family.known, names[row["strategy"]], _figure(max(_float64(row))))
        for family in listed
        for row in [rows[family.name]]
    ]
    return f"{text}\n{_table(('family', 'known as', 'how', 'float64'), table)}"


def _reason(row: Row) -> str:
    said = str(row["reason"])
    return next((ours for words, ours in _REASONS if words in said), f"{_escaped(said)}.")


def _not_trained(listed: Sequence[Family], rows: Rows) -> str:
    if not listed:
        return ""
    table = [(f"`{family.name}`", family.known, _escaped(str(rows[family.name]["reason"]))) for family in listed]
    return f"\n## Not trained\n{_NOT_TRAINED_TEXT}\n{_table(('family', 'known as', 'found'), table)}"


def _remarks(families: Sequence[Family], rows: Rows) -> str:
    """What a user of these families should know."""
    found = []
    shown = [(family.name, rows[family.name]) for family in families if rows[family.name]["differences"]]
    if plain := [f"`{name}`" for name, row in shown if "full" not in row["differences"]]:
        found.append(f"Without gradient checkpointing in their own code: {', '.join(plain)}.")
    dead = {name: row["differences"]["lora"] for name, row in shown if row["differences"].get("lora", {}).get("zero")}
    if dead:
        some = ", ".join(f"`{name}` ({len(lora['zero'])} of {lora['tensors']})" for name, lora in dead.items())
        found.append(f"LoRA tensors that no gradient reaches, in plain passes either: {some}.")
    if problems := [f"`{name}` ({_escaped(row['problem'])})" for name, row in rows.items() if row["problem"]]:
        found.append(f"**Not shown to be exact**: {', '.join(problems)}.")
    return "\n## Remarks\n\n" + "".join(f"- {remark}\n" for remark in found) if found else ""


# --- cells ------------------------------------------------------------------------------------------------------------


def _float64(row: Row) -> list[float]:
    return _figures(row, ("none", "full", "lora"))


def _float32(row: Row) -> list[float]:
    return _figures(row, ("float32",))


def _naive(row: Row) -> list[float]:
    return _figures(row, ("naive",))


def _figures(row: Row, cases: Iterable[str]) -> list[float]:
    found = [row["differences"][case] for case in cases if case in row["differences"]]
    return [max(one["loss"], one["gradient"]) for one in found]


def _all(figures: Any, rows: Iterable[Row]) -> list[float]:
    return [figure for row in rows for figure in figures(row)]


def _figure(value: float) -> str:
    """1e-15, 2e-6, 0.4, 12"""
    if value == 0 or value >= 0.1:
        return f"{value:.1g}" if value < 10 else f"{value:.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")
