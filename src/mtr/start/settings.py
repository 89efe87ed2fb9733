"""The settings of a new recipe, chosen from the data, the model and the GPU, with the reason for each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from mtr.checks.data_report import DataReport
from mtr.start.facts import Asked, Fit, Survey
from mtr.start.writing import Block, Line, recipe_text

_STEP = 512
"""max_length is a multiple of it."""
_PACK = 16384
_FEW_ROWS = 100
"""With fewer, none are held out."""
_ALIKE = 256
"""Tokens with which conversations begin alike, from which on they are worth merging."""


def length_of_data(survey: Survey) -> tuple[int, str]:
    """`sequence.max_length` by the rows alone, and why."""
    lengths, positions = survey.report.lengths, survey.positions
    longest = lengths.longest if lengths is not None else None
    if longest is None:
        limit = positions or 32768
        return limit, "no turn could be measured" if lengths is None else "the longest turn is longer than can be used"
    of_rows = "" if survey.all_rows else f" of the {survey.report.rows:,} rows that were looked at"
    wanted = math.ceil(longest * (1.0 if survey.all_rows else 1.25) / _STEP) * _STEP
    median = f", half up to {lengths.median:,}" if lengths is not None and lengths.median else ""
    reason = f"the longest turn{of_rows} has {longest:,} tokens{median}"
    if positions is not None and wanted > positions:
        return positions, f"as far as the model's positions go; {reason}"
    return max(wanted, _STEP), reason


def compose(asked: Asked, survey: Survey, fit: Fit, reason_of_length: str, modeline: str | None) -> str:
    """The text of the recipe."""
    report = survey.report
    rows = report.of_rows if report.of_rows is not None else report.rows
    head = list(_findings(asked, survey, fit, rows))
    blocks = [_model(asked, fit), *_template(survey), _adapter(fit), _data(asked, report, rows)]
    blocks += [_sequence(survey, fit, reason_of_length), *_generation(report, fit), _training(asked, fit, report)]
    return recipe_text(head, blocks, modeline)


def _findings(asked: Asked, survey: Survey, fit: Fit, rows: int) -> Iterator[tuple[str, str]]:
    """What was found, with what training leaves out, so that nobody has to find out later."""
    report = survey.report
    looked_at = "" if survey.all_rows else f" ({report.rows:,} looked at)"
    yield "data", f"{asked.data}: {rows:,} rows{looked_at}, {report.turns:,} turns, {report.trained:,} of them trained"
    for reason, number in report.refused.items():
        yield "", f"not trained: {number:,} turns: {reason} (first: {report.examples.get(reason, '')})"
    for note, number in report.notes.items():
        yield "", f"trained, but incomplete: {number:,} turns: {note}"
    for problem in list(report.unreadable)[:3]:
        yield "", f"cannot be read: {problem}"
    yield "model", f"{asked.model}: {survey.strategy}"
    yield "device", f"{fit.device}{f', {fit.memory}' if fit.memory else ''}"


def _model(asked: Asked, fit: Fit) -> Block:
    lines = [Line("name_or_path", asked.model), Line("dtype", fit.dtype)]
    if fit.method == "qlora":
        lines.append(Line("load_in_4bit", True, f"the frozen weights in 4 bits{fit.reason_of_bits}"))
    return Block("model", lines)


def _template(survey: Survey) -> Iterator[Block]:
    arguments, history = survey.recipe.template, survey.recipe.thinking.history
    if arguments:
        lines = [Line(key, value, "more turns of this data are trained so") for key, value in arguments.items()]
        yield Block("template", lines)
    if history != "as_data":
        yield Block("thinking", [Line("history", history, "earlier thinking goes where the template reads it")])


def _adapter(fit: Fit) -> Block:
    if fit.method == "full":
        return Block("lora", (), "All weights are trained.")
    return Block(
        "lora",
        [
            Line("r", 16),
            Line("alpha", 32),
            Line("target_modules", "all-linear", "every linear layer but the output head"),
        ],
    )


def _data(asked: Asked, report: DataReport, rows: int) -> Block:
    lines = [Line("train", asked.data)]
    if asked.data_format != "auto":
        lines.append(Line("format", asked.data_format))
    if report.unreadable:
        lines.append(Line("on_bad_row", "skip", "rows that cannot be read are counted and listed in rejects.jsonl"))
    comment = f"about {max(1, round(0.05 * rows)):,} of the rows are held out and never trained on"
    if report.of_rows is None:
        comment = "a stream cannot be split: name a file of held-out conversations"
        lines.append(Line("eval", "held-out.jsonl", comment, off=True))
    else:
        lines.append(Line("eval", 0.05, comment, off=not _held_out(report)))
    return Block("data", lines)


def _held_out(report: DataReport) -> int:
    """Rows that are held out: none of a few, and none of a stream."""
    rows = report.of_rows or 0
    return round(0.05 * rows) if rows >= _FEW_ROWS else 0


def _sequence(survey: Survey, fit: Fit, reason_of_length: str) -> Block:
    alike = survey.shared_prefix >= _ALIKE
    begin = (
        f"the conversations that were compared begin with the same {survey.shared_prefix:,} tokens"
        if alike
        else "conversations that begin alike"
    )
    return Block(
        "sequence",
        [
            Line("max_length", fit.max_length, reason_of_length),
            Line("max_tokens", fit.max_tokens, "tokens in one forward and backward; larger trees are cut"),
            Line("merge", "step", f"{begin}{': computed once' if alike else ' share that part, too'}", off=not alike),
        ],
    )


def _generation(report: DataReport, fit: Fit) -> Iterator[Block]:
    if fit.on_cuda or not _held_out(report):
        return
    yield Block(
        "generation",
        [Line("conversations", 8, "held-out conversations that are generated before and after training")],
    )


def _training(asked: Asked, fit: Fit, report: DataReport) -> Block:
    rows = (report.of_rows or report.rows) - _held_out(report)
    per_step = min(16, max(4, rows // 20))
    epochs = 1 if rows >= 10_000 else 2 if rows >= 1_000 else 3
    steps = math.ceil(rows / per_step) * epochs
    how_long = f"about {steps:,} steps"
    if report.of_rows is None:
        epochs, steps = 1, 1000  # these only space the checkpoints
        how_long = "of a stream it is not known how many steps that is; training.max_steps sets it"
    return Block(
        "training",
        [
            Line("output_dir", f"runs/{_name_of_run(asked)}"),
            Line("conversations_per_step", per_step, "one update of the weights; over all processes together"),
            Line("num_train_epochs", epochs, how_long),
            Line("learning_rate", 2e-4 if fit.method != "full" else 1e-5),
            Line("gradient_checkpointing", "auto", "the least recomputation that fits"),
            Line("eval_steps", max(1, steps // 5), "evaluate this often", off=not _held_out(report)),
            Line("save_steps", max(10, steps // 5), "a checkpoint this often; mtr train --resume goes on from it"),
            Line("report_to", "tensorboard", "or wandb, mlflow, trackio, ...", off=True),
        ],
    )


def _name_of_run(asked: Asked) -> str:
    """That of the recipe, or where that says nothing, those of model and data."""
    stem = Path(asked.output).stem
    if stem not in ("recipe", "-"):
        return stem
    words = f"{Path(asked.model).name}-{Path(asked.data).name.split('.')[0]}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.") or "run"
