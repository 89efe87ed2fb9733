"""Progress of a run in the terminal, and the summary at its end. Without a terminal, progress is plain lines.

training ━━━━━━━━━━━━━━━╸━━━━━━━━ 80/120  loss 0.1130 █▆▄▃▂▂▁▁▁▁  15 s left
"""

from __future__ import annotations

import math
import signal
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from mtr.console import ASCII_BLOCKS, BLOCKS, console, first_few, labelled, printable, shorten
from mtr.recipe.sections import Recipe
from mtr.training.exact_match import GeneratedTurn
from mtr.training.pace import Pace, sparkline, time_left
from mtr.training.state import RunState

_NARROW = 70
"""Columns of a terminal from which on there is room for the curve of the loss."""


class RunDisplay:
    """What a person sees of a run, on standard error. Silent on all processes but the main one."""

    def __init__(self, recipe: Recipe, num_steps: int, start: int, enabled: bool) -> None:
        self._recipe = recipe
        self._num_steps = num_steps
        self._start = start
        self._pace = Pace(num_steps, start, time.monotonic())
        self._losses: list[float | None] = []
        self._console = console()
        self._console.quiet = not enabled
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=max(self._console.width - 64, 8)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            _TimeLeft(self),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=start, status="")

    def __enter__(self) -> Self:
        self._pace = Pace(self._num_steps, self._start, time.monotonic())
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str, indent: int = 2) -> None:
        """One line in a log; in a terminal, broken between words and indented by so many characters."""
        lines = [printable(text)]
        if self._console.is_terminal and text:
            below = " " * indent  # long words are paths, to be copied
            wrapper = textwrap.TextWrapper(
                self._console.width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
            )
            lines = wrapper.wrap(lines[0])
        for line in lines:
            self._console.print(escape(line))

    def note(self, label: str, text: str) -> None:
        self.say(labelled(label, text), len(labelled("", "")))

    def begin(self, model: Any, adapted: list[str], backends: Sequence[str], process: Any, rows: int | None) -> None:
        """
        Args:
            adapted: names of the modules with LoRA.
            backends: of attention; of several the first pack shows the fastest.
            process: device and number of processes.
            rows: of data.train; None for a stream.
        """
        recipe = self._recipe
        parameters = list(model.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        dtype = str(model.dtype).removeprefix("torch.")
        self.note("model", recipe.model.name_or_path)
        self.note("", f"{total:,} parameters ({dtype}), {trainable:,} trainable")
        if adapted:
            self.note("LoRA", ", ".join(adapted))
            if recipe.lora and recipe.lora.modules_to_save:
                self.note("full weights", f"{', '.join(recipe.lora.modules_to_save)} (lora.modules_to_save)")
        processes = f"{process.num_processes} process{'es' if process.num_processes > 1 else ''}"
        attention = "the model's own" if recipe.sequence.unpacked else " or ".join(backends)
        self.note("device", f"{process.device.type}, {processes}, {attention} attention")
        length = f"{rows:,} rows" if rows is not None else "a stream"
        self.note(
            "data",
            f"{length}, {recipe.training.conversations_per_step} conversations per step, {self._num_steps:,} steps, "
            f"{recipe.sequence.strategy}",
        )
        if recipe.lora and recipe.lora.dropout:
            self.note(
                "note",
                "lora.dropout > 0: turns of a conversation share the dropout mask of their common history, so "
                "single_pass and per_turn agree in expectation, not exactly",
            )

    def stepped(self, line: dict[str, Any]) -> None:
        self._pace.reached(line["step"], time.monotonic())
        self._losses.append(line["loss"])
        loss = "no turn to train" if line["loss"] is None else f"loss {line['loss']:.4f}"
        self._progress.update(self._task, completed=line["step"], status=f"{loss} {self._curve()}".rstrip())
        if not self._console.is_terminal:
            norm = "" if line["grad_norm"] is None else f"  grad norm {line['grad_norm']:.3f}"
            norm += f"  no update: {line['skipped']}" if line.get("skipped") and line["loss"] is not None else ""
            left = f"  {left} left" if (left := self.left()) and line["step"] < self._num_steps else ""
            self.say(
                f"step {line['step']}/{self._num_steps}  {loss}{norm}  lr {line['learning_rate']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  ({line['per_turn_tokens_per_second']:,.0f} per-turn){left}"
            )

    def left(self) -> str:
        """The time until the last step, in words; empty where nothing is known of it."""
        seconds = self._pace.left(time.monotonic())
        return "" if seconds is None else time_left(seconds)

    def _curve(self) -> str:
        """The loss since this process began, where there is room for it."""
        room = min(self._console.width // 4 - 8, 40)
        if self._console.width < _NARROW:
            return ""
        return sparkline(self._losses, room, BLOCKS if self._console.encoding.startswith("utf") else ASCII_BLOCKS)

    def evaluated(self, line: dict[str, Any]) -> None:
        sources = line.get("eval_loss_by_source", {})
        apart = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in sources.items())})" if sources else ""
        self.say(f"step {line['step']}/{self._num_steps}  eval loss {line['eval_loss']:.4f}{apart}")

    def generated(self, step: int, turns: Sequence[GeneratedTurn]) -> None:
        right = sum(turn.exact_match for turn in turns)
        conversations = len({turn.conversation for turn in turns})
        self.say(
            f"step {step}: {right} of {len(turns)} held-out turns answered exactly "
            f"({right / max(len(turns), 1):.1%}) in {conversations} conversations generated turn by turn"
        )
        for turn in turns[:2]:
            wanted = turn.reference if turn.answer is None else turn.answer
            verdict = "right" if turn.exact_match else f"wrong, expected {shorten(wanted, 60)!r}"
            row = turn.conversation.rsplit("/", 1)[-1]  # without the folders of its file
            self.say(f"  {row}, turn {turn.turn}: {shorten(turn.response, 80)!r} ({verdict})")

    def end(self, state: RunState) -> None:
        """The summary."""
        self.say("")
        if state.stopped_by:
            name = signal.Signals(state.stopped_by).name
            self.say(f"stopped by {name} after step {state.steps}; continue with --resume")
        for lines in (self._work(state), _left_out(state), _faults(state), self._results(state)):
            for label, text in lines:
                self.note(label, text)

    def _work(self, state: RunState) -> Iterator[tuple[str, str]]:
        counts, seconds = state.counts, max(state.seconds, 1e-9)
        yield (
            "trained",
            f"{counts.conversations:,} conversations, {counts.turns:,} turns, "
            f"{counts.supervised_tokens:,} supervised tokens in {state.steps:,} steps",
        )
        yield (
            "throughput",
            f"{counts.tokens / seconds:,.0f} tokens/s; one pass per turn would need "
            f"{counts.per_turn_tokens / seconds:,.0f} tokens/s for the same work",
        )
        yield "peak memory", f"{state.peak_memory_bytes / 2**30:.1f} GiB"
        if math.isfinite(state.mfu):
            yield "MFU", f"{state.mfu:.0%} of the matmul rate measured on this device"
        if state.data_wait_seconds > 0.02 * seconds:
            yield "data wait", f"{state.data_wait_seconds / seconds:.0%} of the time (see data.num_workers)"
        if state.steps and state.imbalance > 1.01 * state.steps:
            yield "imbalance", f"the busiest process had {state.imbalance / state.steps:.2f} times the mean work"

    def _results(self, state: RunState) -> Iterator[tuple[str, str]]:
        if state.loss is not None:
            evaluation = "" if state.eval_loss is None else f", eval loss {state.eval_loss:.4f}"
            yield "loss", f"{state.loss:.4f} in the last step{evaluation}"
        if len(state.exact_match) == 2:
            before, after = state.exact_match
            yield "held-out", f"{before:.1%} of turns answered exactly before training, {after:.1%} after"
        if state.stopped_by is None:
            yield "adapter" if self._recipe.lora else "model", str(state.output_dir)


class _TimeLeft(ProgressColumn):
    """Counts down between two steps."""

    def __init__(self, display: RunDisplay) -> None:
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        left = "" if task.finished else self._display.left()
        return Text(f"{left} left" if left else "", "progress.remaining")


def _left_out(state: RunState) -> Iterator[tuple[str, str]]:
    """Every turn and row that was not trained, by reason."""
    counts = state.counts
    for label, unit, counter in (
        ("not trained", "turns", counts.untrained_turns),
        ("not trained", "rows", counts.untrained_rows),
        ("skipped", "rows", counts.skipped_rows),
        ("note", "turns", counts.notes),
        ("note", "rows", counts.remarks),
    ):
        for reason, number in counter.most_common():
            yield label, f"{number:,} {unit}: {reason}"


def _faults(state: RunState) -> Iterator[tuple[str, str]]:
    if state.empty_steps:
        yield "no update", f"{state.empty_steps:,} steps had no turn to train"
    if state.nonfinite_steps:
        yield "no update", f"{state.nonfinite_steps:,} steps had a loss or gradient that is not finite"
        yield "", f"their rows: {first_few(state.nonfinite_rows)}"
    if state.overflow_steps:
        yield "no update", f"{state.overflow_steps:,} steps had a gradient beyond float16; the loss is scaled by less"
    if state.pack_splits:
        yield "out of memory", f"{state.pack_splits:,} packs did not fit and were split"
    if state.failed_saves:
        yield "warning", f"{state.failed_saves:,} checkpoints could not be written"
