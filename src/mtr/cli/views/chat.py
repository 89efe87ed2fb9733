"""What `mtr chat` shows: answers as they arrive, thinking dimmed behind a bar or folded, models side by side.

    > Paul has 23 nuts.                  base                       tuned
    │ Start: 23.                         │ Repeat it.               │ Start: 23.
    Paul has 23 nuts now.                Paul has 17 nuts.          Paul has 23 nuts now.

Answers go to standard output and nothing else does; thinking does too where that is a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mtr.cli.views.flow import BAR, Flow, is_terminal
from mtr.console import console, labelled, printable

if TYPE_CHECKING:
    from mtr.model.completions import Sampling
    from mtr.talk.finding import Found
    from mtr.talk.session import Answer, Session

WIDE = 100
"""Columns of a terminal in which two models fit side by side."""
_GAP = 4
_SECONDS = 0.08
"""Between two pictures of what arrives."""
_THINKING, _NAME, _NOTE = "dim", "bold", "dim italic"


class StackedView:
    """One answer below the other, each as it arrives."""

    def __init__(self, out: Console, fold: bool, named: bool = False, loose: bool = False) -> None:
        """
        Args:
            named: with the name of the model above its answer.
            loose: with an empty line after each answer.
        """
        self.fold = fold
        self._out = out
        self._aside = out if is_terminal(out) else console()
        self._named = named
        self._loose = loose
        self._thinking = self._response = Flow(out)
        self._folded = _Counter(self._aside)

    def watch(self, answer: Answer) -> None:
        if answer.completion_tokens == 0 and answer.finish is None:
            self._begin(answer)
        self._show_thinking(answer)
        if answer.response:
            self._end_thinking(answer)
            self._response.show(answer.response)
        if answer.finish is not None:
            self._end_thinking(answer)
            self._response.end()
            if (note := note_on(answer)) is not None:
                self._aside.print(Text(note, _NOTE))
            if self._loose:
                self._out.print()

    def end(self) -> None:
        """Of the answers to a question; each has been completed by itself."""

    def _begin(self, answer: Answer) -> None:
        self._thinking = Flow(self._aside, _THINKING, BAR)
        self._response = Flow(self._out)
        self._thinking_ended = False
        if self._named:
            self._out.print(Text(answer.voice, _NAME))

    def _show_thinking(self, answer: Answer) -> None:
        if not answer.thinking or self._thinking_ended:
            return
        if self.fold:
            self._folded.show(answer.thinking_tokens)
        else:
            self._thinking.show(answer.thinking)

    def _end_thinking(self, answer: Answer) -> None:
        if self._thinking_ended:
            return
        self._thinking_ended = True
        self._folded.end()
        if self.fold and answer.thinking:
            self._aside.print(Text(folded(answer), _THINKING))
        self._thinking.end()

    def show_thinking(self, answers: Sequence[Answer]) -> None:
        """Of answers that were folded."""
        for answer in answers:
            if answer.thinking:
                flow = Flow(self._aside, _THINKING, BAR)
                flow.show(answer.thinking)
                flow.end()
                if self._loose:
                    self._aside.print()


class _Counter:
    """How many tokens were thought so far, while nothing else is shown."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._live: Live | None = None

    def show(self, tokens: int) -> None:
        if not self._out.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self._out, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(Text(f"▸ thinking: {tokens:,} tokens ...", _THINKING), refresh=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class ColumnsView:
    """Two answers side by side; while they arrive, the last lines of what fits on the screen."""

    def __init__(self, out: Console, fold: bool) -> None:
        self.fold = fold
        self._out = out
        self._answers: dict[str, Answer] = {}
        self._live: Live | None = None
        self._drawn = 0.0

    def watch(self, answer: Answer) -> None:
        if answer.voice in self._answers and answer.completion_tokens == 0 and answer.finish is None:
            self._answers = {}
        self._answers[answer.voice] = answer
        if self._live is None and self._out.is_terminal:
            self._live = Live(console=self._out, transient=True, auto_refresh=False)
            self._live.start()
        if self._live is not None and time.monotonic() - self._drawn > _SECONDS:
            self._live.update(_Tail(self._table()), refresh=True)
            self._drawn = time.monotonic()

    def end(self) -> None:
        """Both are complete."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._out.print(self._table(), soft_wrap=False)
        self._out.print()
        self._answers = {}

    def show_thinking(self, answers: Sequence[Answer]) -> None:
        """Of answers that were folded."""
        self.fold, folded_ = False, self.fold
        self._answers = {answer.voice: answer for answer in answers}
        if self._answers:
            self.end()
        self.fold = folded_

    def _table(self) -> Table:
        half = (self._out.width - _GAP - len("^C")) // 2  # which the terminal writes at the end of a line
        table = Table(box=None, show_header=False, padding=0, pad_edge=False)
        columns = [_lines_of(self._answers.get(name), name, half, self.fold) for name in ("base", "tuned")]
        table.add_column(width=half)
        table.add_column(width=_GAP)
        table.add_column(width=half)
        for number in range(max(map(len, columns))):
            left, right = (column[number] if number < len(column) else Text() for column in columns)
            table.add_row(left, "", right)
        return table


class _Tail:
    """The last lines of what would be higher than the screen."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, out: Console, options: object) -> list[Segment]:
        lines = out.render_lines(self._table, pad=False)[-max(out.height - 2, 1) :]
        return [segment for line in lines for segment in (*line, Segment.line())]


def _lines_of(answer: Answer | None, name: str, width: int, fold: bool) -> list[Text]:
    """An answer in a column of this width."""
    lines = [Text(name, _NAME)]
    if answer is None:
        return lines
    if answer.thinking:
        parts = [folded(answer)] if fold else printable(answer.thinking).split("\n")
        for part in parts:
            bar = "" if fold else BAR
            wrapped = Text(part, _THINKING).wrap(_MEASURE, width - len(bar)) or [Text()]
            lines += [Text(bar, _THINKING) + line for line in wrapped]
    for part in printable(answer.response).split("\n") if answer.response else []:
        lines += list(Text(part).wrap(_MEASURE, width)) or [Text()]
    note = note_on(answer) if answer.finish is not None else None
    return [*lines, *(Text(note, _NOTE).wrap(_MEASURE, width) if note else [])]


_MEASURE = Console(width=10_000)


def folded(answer: Answer) -> str:
    return f"▸ thinking: {answer.thinking_tokens:,} token{'' if answer.thinking_tokens == 1 else 's'}"


def note_on(answer: Answer) -> str | None:
    """What is to be said about the end of an answer; None if it ended by itself."""
    if answer.finish == "interrupted":
        return "(stopped)" if answer.is_kept else "(stopped; not kept in the conversation, /retry asks again)"
    if answer.finish == "length":
        cut = f"(cut after {answer.completion_tokens:,} tokens: --max-new-tokens, or the context is full"
        return f"{cut})" if answer.is_kept else f"{cut}; there is no answer, so the question is not kept)"
    return None if answer.response else "(an empty answer)"


def introduction(session: Session, found: Found) -> list[str]:
    """Who answers, how, and how to begin."""
    from mtr.model.device import device_name

    speakers, limits = session.speakers, session.limits
    parameter = next(speakers.model.parameters())
    most = min(limits.max_new_tokens, speakers.positions or limits.max_new_tokens)
    on = f" on {found.base.name}" if found.base and found.adapter is not None else ""
    positions = f", {speakers.positions:,} positions" if speakers.positions is not None else ""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return [
        labelled("model", f"{found.kind} {found.name}{on}"),
        labelled("device", f"{device_name(parameter.device)}, {dtype}{positions}"),
        labelled("answers", f"{drawing(limits.sampling)}, at most {most:,} new tokens"),
        labelled("thinking", HISTORY[speakers.renderer.findings.history]),
        "",
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves",
    ]


HISTORY = {
    "always": "of earlier turns stays in the context",
    "since the last user message": "of earlier turns is dropped when the next question comes",
    "until answered": "of earlier turns is dropped once the question is answered",
    "only the final message": "is in the context of the final message only",
    "never": "of earlier turns is dropped from the context",
}
"""What the template keeps of thinking, in words."""


def drawing(sampling: Sampling) -> str:
    if sampling.is_greedy:
        return "greedy"
    top = f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    return f"temperature {sampling.temperature:g}{top}" + (f", top-k {sampling.top_k}" if sampling.top_k else "")


def show_aside(lines: Sequence[str], err: Console) -> None:
    """Beside the conversation: what is no answer."""
    for line in lines:
        err.print(Text(printable(line), _THINKING), soft_wrap=not is_terminal(err))
    err.print()


def width_of(out: Console) -> int:
    """Columns; few where nobody looks on."""
    return out.width if is_terminal(out) else 0


def standard_output() -> Console:
    return console(sys.stdout)
