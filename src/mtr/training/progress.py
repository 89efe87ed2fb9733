"""Progress of a training run in the terminal, and its summary. Without a terminal progress is plain lines."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtr.console import console
from mtr.recipe.sections import Recipe

if TYPE_CHECKING:
    from mtr.training.playing import Played
    from mtr.training.state import Summary


class RunDisplay:
    """Progress of a training run. Silent on all processes but the main one."""

    def __init__(self, recipe: Recipe, num_steps: int, start: int, enabled: bool) -> None:
        self._recipe = recipe
        self._num_steps = num_steps
        self._console = console()
        self._console.quiet = not enabled
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=start, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, model: Any, adapted: list[str], backend: str, state: Any, rows: int | None) -> None:
        recipe = self._recipe
        parameters = list(model.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        self.say(f"model      {recipe.model.name_or_path}")
        self.say(
            f"           {total:,} parameters ({model.dtype}), {trainable:,} trained, attention {backend} "
            f"on {state.device.type}, {state.num_processes} process(es)"
        )
        if adapted:
            self.say(f"LoRA on    {', '.join(adapted)}")
            if recipe.lora and recipe.lora.modules_to_save:
                self.say(f"whole      {', '.join(recipe.lora.modules_to_save)}")
        if recipe.lora and recipe.lora.dropout:
            self.say(
                "note       lora.dropout > 0: a shared trunk shares its dropout mask, so single_pass and per_turn "
                "agree in expectation and not exactly"
            )
        length = f"{rows:,} rows" if rows is not None else "a stream"
        self.say(
            f"data       {length}, {recipe.training.conversations_per_step} conversations a step, "
            f"{self._num_steps:,} steps, {recipe.sequence.strategy}"
        )

    def stepped(self, line: dict[str, Any]) -> None:
        loss = "no turn to train" if line["loss"] is None else f"loss {line['loss']:.4f}"
        self._progress.update(self._task, completed=line["step"], status=loss)
        if not self._console.is_terminal:
            norm = "" if line["grad_norm"] is None else f"  grad norm {line['grad_norm']:.3f}"
            norm += "  no update: not finite" if line.get("skipped") == "not finite" else ""
            self.say(
                f"step {line['step']}/{self._num_steps}  {loss}{norm}  lr {line['learning_rate']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  ({line['per_turn_tokens_per_second']:,.0f} per-turn)"
            )

    def evaluated(self, line: dict[str, Any]) -> None:
        sources = line.get("eval_loss_by_source", {})
        apart = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in sources.items())})" if sources else ""
        self.say(f"step {line['step']}/{self._num_steps}  eval loss {line['eval_loss']:.4f}{apart}")

    def played(self, step: int, played: Sequence[Played]) -> None:
        right = sum(turn.exact_match for turn in played)
        conversations = len({turn.conversation for turn in played})
        self.say(
            f"step {step}: {right} of {len(played)} held-out turns answered exactly "
            f"({right / max(len(played), 1):.1%}), {conversations} conversations played turn by turn"
        )
        for turn in played[:2]:
            wanted = turn.reference if turn.answer is None else turn.answer
            verdict = "right" if turn.exact_match else f"wrong, wanted {_cut(wanted, 60)!r}"
            self.say(f"  {_tail(turn.conversation)}, turn {turn.turn}: {_cut(turn.response, 80)!r} ({verdict})")

    def end(self, summary: Summary) -> None:
        counts, seconds = summary.counts, max(summary.seconds, 1e-9)
        self.say("")
        if summary.stopped_by:
            self.say(f"stopped by {_signal(summary.stopped_by)} after step {summary.steps}; go on with --resume")
        self.say(
            f"trained    {counts.conversations:,} conversations, {counts.turns:,} turns, "
            f"{counts.supervised_tokens:,} supervised tokens in {summary.steps:,} steps"
        )
        self.say(
            f"speed      {counts.tokens / seconds:,.0f} tokens/s; one pass per turn would have had to do "
            f"{counts.per_turn_tokens / seconds:,.0f} tokens/s"
        )
        peak = f"{summary.peak_memory_bytes / 2**30:.1f} GiB of memory at most"
        used = f", {summary.mfu:.0%} of what matrix products reach here" if math.isfinite(summary.mfu) else ""
        self.say(f"device     {peak}{used}")
        if summary.data_wait_seconds > 0.02 * seconds:
            self.say(f"waiting    {summary.data_wait_seconds / seconds:.0%} of the time for data (data.num_workers)")
        if summary.steps and summary.imbalance > 1.01 * summary.steps:
            mean = summary.imbalance / summary.steps
            self.say(f"processes  the busiest one had {mean:.2f} times the mean to do")
        for reason, number in counts.untrained_turns.most_common():
            self.say(f"not trained {number:,} turns: {reason}")
        for reason, number in counts.untrained_rows.most_common():
            self.say(f"not trained {number:,} rows: {reason}")
        for reason, number in counts.skipped_rows.most_common():
            self.say(f"skipped    {number:,} rows: {reason}")
        for note, number in counts.notes.most_common():
            self.say(f"note       {number:,} turns: {note}")
        if summary.empty_steps:
            self.say(f"no update  {summary.empty_steps:,} steps had no turn to train")
        if summary.nonfinite_steps:
            self.say(f"no update  {summary.nonfinite_steps:,} steps had a loss or gradient that is not finite")
            self.say(f"           their rows: {_some(summary.nonfinite_rows)}")
        if summary.pack_splits:
            self.say(f"memory     {summary.pack_splits:,} packs did not fit and were split")
        if summary.failed_saves:
            self.say(f"warning    {summary.failed_saves:,} checkpoints could not be written")
        if summary.loss is not None:
            evaluation = "" if summary.eval_loss is None else f", eval loss {summary.eval_loss:.4f}"
            self.say(f"loss       {summary.loss:.4f} in the last step{evaluation}")
        if len(summary.exact_match) == 2:
            before, after = summary.exact_match
            self.say(f"held out   {before:.1%} of turns answered exactly before training, {after:.1%} after")
        if summary.stopped_by is None:
            kind = "adapter" if self._recipe.lora else "model"
            self.say(f"{kind:<11}{summary.output_dir}")

    def say(self, text: str) -> None:
        self._console.print(escape(text))


def _signal(number: int) -> str:
    return signal.Signals(number).name


def _tail(where: str) -> str:
    """A row's name without the folders of its file."""
    return where.rsplit("/", 1)[-1]


def _some(names: Sequence[str], most: int = 4) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def _cut(text: str, width: int) -> str:
    """On one line, the middle left out."""
    text = text.replace("\n", "⏎")
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]} … {text[-half:]}"
