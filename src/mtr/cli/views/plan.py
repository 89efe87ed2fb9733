"""A plan as tables, histograms and sentences, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mtr.checks.roles import ROLES
from mtr.cli.views.inspect_style import COLOURS, Style
from mtr.cli.views.tables import count, plain_table
from mtr.cli.views.work import with_unit
from mtr.console import ASCII_BLOCKS, BLOCKS, block
from mtr.plan.fit import Fit
from mtr.plan.lengths import Spread
from mtr.plan.memory import tried
from mtr.plan.result import GpuPlan, Plan

_LENGTHS = {
    "turns": "turns, conversation",
    "conversation": "tokens, conversation",
    "prompt": "tokens, prompt",
    "completion": "tokens, completion",
}
_BAR = 36
"""Cells of the longest bar."""
_WIDEST = 100
"""Columns of a paragraph."""


def show_plan(plan: Plan, out: Console) -> None:
    """Print what `mtr.plan` found."""
    view = _View(plan, out)
    for part in (view.head, view.data, view.losses, view.roles, view.lengths, view.work, view.run, view.gpus):
        part()
    view.verdict()


class _View:
    def __init__(self, plan: Plan, out: Console) -> None:
        self._plan = plan
        self._out = out
        self._style = Style(out)
        self._blocks = BLOCKS if self._style.signs.full == "█" else ASCII_BLOCKS
        self._width = max(40, min(out.width, _WIDEST))

    # --- the data ---

    def head(self) -> None:
        plan, model = self._plan, self._plan.model
        size = f", {_parameters(model.parameters)} parameters" if model.parameters else ""
        if model.parameters and model.trainable < model.parameters:
            size += f", {_parameters(model.trainable)} trained"
        self._out.print(f"[bold]{escape(self._style.safe(plan.recipe.model.name_or_path))}[/]{size}")
        if model.missing:
            self._say(f"{model.missing}.")
        for warning in plan.warnings:
            self._say(f"{warning}.")

    def data(self) -> None:
        plan, rows, report = self._plan, self._plan.rows, self._plan.report
        self._out.print("")
        of_epoch = "of a stream" if rows.of_epoch is None else f"of the {rows.of_epoch:,} of an epoch"
        counted = f"{rows.counted:,}, all of an epoch"
        if rows.is_sample:
            drawn = "" if rows.seed is None else f", drawn at random (training.seed {rows.seed})"
            counted = f"{rows.counted:,} {of_epoch}{drawn}: a sample"
        held = f"; {rows.held_out:,} more are held out" if rows.held_out else ""
        skipped = sum(report.filtered.values()) + sum(report.unreadable.values())
        pairs = [("rows", f"{counted}{held}")]
        if skipped:
            pairs.append(("skipped", f"{count(skipped, 'row')}, see below"))
        untrained = sum(plan.untrained.values())
        conversations = count(plan.conversations, "conversation")
        left = f"{untrained:,} of them not trained (see below)" if untrained else "all of them trained"
        turns = f"{report.turns:,}, {left}; {conversations} with a trained one"
        pairs.append(("turns", turns if report.turns else "none"))
        if plan.unmerged:
            share, of = plan.supervised / plan.unmerged, "of one pass over each conversation"
            pairs.append(("supervised", f"{plan.supervised:,} of {plan.unmerged:,} tokens {of} ({share:.0%})"))
        pairs.append(("history", _history(plan)))
        for label, text in pairs:
            self._fact(label, text)

    def losses(self) -> None:
        report, plan = self._plan.report, self._plan
        groups = {
            "would stop the run": {f"{setting}: {where}": 0 for setting, where in plan.stops.items()},
            "turns that are not trained": report.refused,
            "turns left out on purpose": report.chosen,
            "trained turns with a note": report.notes,
            "rows that cannot be read": report.unreadable,
            "rows left out by data.filter": report.filtered,
            "rows with a remark": report.remarks,
        }
        cut = plan.single_pass.way.trees - plan.conversations
        if plan.is_single_pass and plan.recipe.sequence.merge == "conversation" and cut > 0:
            budget = plan.recipe.sequence.budget
            groups["conversations cut"] = {f"trees more than conversations: sequence.max_tokens ({budget:,})": cut}
        for title, found in groups.items():
            if found:
                of = f", {sum(found.values()):,} in all" if found is report.unreadable else ""  # each has its own text
                self._out.print(f"\n[bold]{title}[/]{of}")
            for text, number in list(found.items())[:6]:
                example = report.examples.get(text)
                where = f" (first: {example})" if example else ""
                self._say(f"{text}{where}", f"{number:>8,}  " if number else "  ")
            if len(found) > 6:
                self._out.print(f"          and {len(found) - 6} more reasons (--json has all)")

    def roles(self) -> None:
        plan = self._plan
        total = sum(plan.roles.values())
        if not total:
            return
        every = plan.role_rows == plan.conversations
        of = "" if every else f", by {count(plan.role_rows, 'conversation')}"
        table = plain_table(f"\n[bold]tokens of one pass by role[/]{of}", ["", "", "", ""], left=["", " "])
        table.show_header = False
        largest = max(plan.roles.values())
        for number, name in enumerate(ROLES):
            tokens = plan.roles[name]
            bar = self._style.signs.full * max(round(_BAR * tokens / largest), 1 if tokens else 0)
            trained = name in ("thinking", "response")
            label = Text(f"{name}{', trained' if trained else ''}", COLOURS[ROLES[number]])
            table.add_row(label, f"{tokens:,}", f"{tokens / total:.0%}", Text(bar, COLOURS[ROLES[number]]))
        table.columns[0].justify = table.columns[3].justify = "left"
        table.columns[1].justify = table.columns[2].justify = "right"
        self._out.print(table)

    def lengths(self) -> None:
        if not self._plan.lengths:
            return
        table = plain_table("\n[bold]lengths[/]", ["", "least", "median", "95 %", "most", "least to most"], left=[""])
        table.columns[-1].justify = "left"
        for name, text in _LENGTHS.items():
            if (spread := self._plan.lengths.get(name)) is not None:
                ranks = (spread.minimum, spread.median, spread.percentile_95, spread.maximum)
                table.add_row(text, *(f"{rank:,}" for rank in ranks), self._histogram(spread))
        self._out.print(table)

    def _histogram(self, spread: Spread) -> str:
        most = max(spread.counts)
        return "".join(block(n / most, self._blocks) if n else " " for n in spread.counts)

    # --- the work ---

    def work(self) -> None:
        plan = self._plan
        one, apart = plan.single_pass, plan.per_turn
        if not one.way.tokens:
            return
        title = "the rows that were counted" if plan.rows.is_sample else "one epoch"
        table = plain_table(f"\n[bold]{title}[/]", ["", "one pass", "one per turn", "ratio"], left=[""])
        for name, few, many in (
            ("tokens", one.way.tokens, apart.way.tokens),
            ("query-key pairs", one.way.pairs, apart.way.pairs),
            ("trees, or sequences", one.way.trees, apart.way.trees),
        ):
            table.add_row(name, f"{few:,}", f"{many:,}", f"{many / few:.2f}x")
        if plan.by_flops and one.total and apart.total:
            table.add_row("FLOPs", with_unit(one.total), with_unit(apart.total), f"{apart.total / one.total:.2f}x")
        self._out.print(table)

    def run(self) -> None:
        plan, run = self._plan, self._plan.run
        if run.steps is None or not run.tokens or run.packs is None:
            return
        per_step = plan.recipe.training.conversations_per_step
        number = run.steps / run.steps_per_epoch if run.steps_per_epoch else 0.0
        epochs = f" ({'one epoch' if number == 1 else f'{number:.3g} epochs'})" if number else ""
        flops = f", {with_unit(run.flops.total)}" if run.flops and plan.by_flops else ""
        way = "one pass over each conversation" if plan.is_single_pass else "one pass for each turn"
        text = (
            f"{count(run.steps, 'step')} of {count(per_step, 'row')}{epochs}, {way}: {run.tokens:,} tokens in "
            f"{count(run.packs, 'pack')}{flops}"
        )
        self._out.print("")
        self._fact("run", f"{text}{', extrapolated from the sample' if plan.rows.is_sample else ''}")

    # --- GPUs ---

    def gpus(self) -> None:
        plan = self._plan
        found = [gpu for gpu in plan.gpus if gpu.fit is not None]
        if found:
            self._out.print(self._gpu_table(found))
        for line in (*_advice(plan, found), *_assumptions(found)):
            self._say(line, "  ")
        problems = dict.fromkeys(gpu.problem for gpu in plan.gpus if gpu.problem and gpu.problem != plan.model.missing)
        for problem in problems:
            self._say(f"{problem}", "  ")

    def _gpu_table(self, found: Sequence[GpuPlan]) -> Table:
        number, priced = found[0].number, any(gpu.cost for gpu in found)
        columns = ["", "GiB of one", "fits", "checkpointing", "time", *(["cost"] if priced else [])]
        on = "one GPU" if number == 1 else f"{number} GPUs"
        title = f"\n[bold]on {on}[/], packs of up to {_pack(found):,} tokens"
        table = plain_table(title, columns, left=["", "fits", "checkpointing"])
        for gpu in found:
            assert gpu.fit is not None
            mark = "*" if gpu.instead else ""
            fits, colour = {"fits": ("yes", "green"), "tight": ("tight", "yellow")}.get(gpu.fit.in_words, ("no", "red"))
            mode = (gpu.instead.fit if gpu.instead else gpu.fit).checkpointing
            table.add_row(
                gpu.gpu.name,
                f"{_gib(gpu.fit)} of {gpu.gpu.memory_gib:.0f}",
                f"[{colour}]{fits}[/]",
                f"{mode}{mark}",
                _time(gpu.duration.seconds) if gpu.duration else "-",
                *([_money(gpu.cost) if gpu.cost else "-"] if priced else []),
            )
        return table

    def verdict(self) -> None:
        self._out.print("\n[bold]verdict[/]")
        self._say(" ".join(self._plan.verdict))

    def _say(self, text: str, before: str = "", style: str = "") -> None:
        """A paragraph that begins with `before`, its other lines indented as far."""
        lines = textwrap.wrap(self._style.safe(text), self._width - len(before), break_on_hyphens=False) or [""]
        self._out.print(Text(before, style), end="")
        self._out.print(Text(f"\n{' ' * len(before)}".join(lines)))

    def _fact(self, label: str, text: str) -> None:
        self._say(text, f"{label:<12}", "bold")


def _pack(found: Sequence[GpuPlan]) -> int:
    return max(gpu.fit.tokens for gpu in found if gpu.fit is not None)


def _history(plan: Plan) -> str:
    yes, no = plan.continued
    return {
        "single": "no conversation has two trained turns",
        "kept": f"kept: each of {yes:,} later turns continues the one before as it was generated",
        "dropped": f"dropped: {no:,} later turns see the one before otherwise than it was generated",
        "mixed": f"mixed: {yes:,} later turns continue the one before as it was generated, {no:,} do not",
    }[plan.history]


def _advice(plan: Plan, found: Sequence[GpuPlan]) -> Iterator[str]:
    """What to change in the recipe, once for all GPUs that it goes for."""
    said: dict[str, list[str]] = {}
    for gpu in found:
        if gpu.instead is not None:
            changes = " ".join(
                f"{key}={_value(value)}" for key, value in gpu.instead.changes.items() if value != _now(plan, key)
            )
            said.setdefault(f"* {{}}: with {changes} ({_gib(gpu.instead.fit)} GiB)", []).append(gpu.gpu.name)
        elif gpu.fit is not None and not gpu.fit.fits:
            *some, last = tried(plan.recipe, gpu.gpu, gpu.number)
            said.setdefault(f"{{}}: {', '.join(some)} and {last} do not make it fit", []).append(gpu.gpu.name)
        if gpu.lighter is not None:
            key = f"training.gradient_checkpointing={gpu.lighter.checkpointing}"
            said.setdefault(f"{{}}: {key} fits, too, and recomputes less", []).append(gpu.gpu.name)
    for text, names in said.items():
        yield text.format(", ".join(names))


def _assumptions(found: Sequence[GpuPlan]) -> Iterator[str]:
    if not found:
        return
    shares: dict[tuple[float, float], list[str]] = {}
    for gpu in found:
        if gpu.duration:
            shares.setdefault(gpu.duration.share, []).append(gpu.gpu.name)
    if shares:
        each = [
            f"{low:.0%} to {high:.0%}" + (f" ({', '.join(names)})" if len(shares) > 1 else "")
            for (low, high), names in shares.items()
        ]
        yield (
            f"time: at {', '.join(each)} of the dense 16-bit peak, recomputation counted, and no less than kernel "
            "launches take; both are assumed, not measured. Without evaluation, generation and start"
        )
    yield "GiB: all tensors that are alive at a time, to these with fragmentation and CUDA's context"


def _now(plan: Plan, key: str) -> object:
    """The value of a key in the recipe."""
    section, _, name = key.partition(".")
    return getattr(getattr(plan.recipe, section), name)


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(fit: Fit) -> str:
    low, high = fit.low / 2**30, fit.high / 2**30
    return f"{low:.1f}-{high:.1f}" if high < 100 else f"{low:.0f}-{high:.0f}"


def _time(seconds: tuple[float, float]) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds[1] >= 2 * size:
            return f"{_short(seconds[0] / size)}-{_short(seconds[1] / size)} {unit}"
    return f"{_short(seconds[0])}-{_short(seconds[1])} s"


def _money(cost: tuple[float, float]) -> str:
    return f"${_cents(cost[0])}-{_cents(cost[1])}"


def _cents(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.1f}"


def _parameters(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
