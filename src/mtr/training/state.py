"""What changes during a run. Checkpoints save it, and what is due next is read from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtr.prepare.counts import Counts


@dataclass
class RunState:
    """How far a run has come, the part before a resume included."""

    output_dir: Path
    steps: int = 0
    epoch: float = 0.0
    empty_steps: int = 0
    """Steps without a turn to train; they made no update."""
    nonfinite_steps: int = 0
    """Steps whose loss or gradient was not finite; they made no update."""
    nonfinite_in_a_row: int = 0
    overflow_steps: int = 0
    """Steps whose gradient left the range of float16; they made no update, and the loss is scaled by less since."""
    scaler: dict[str, Any] | None = None
    """State of the scaler of float16 losses when the state was saved."""
    nonfinite_rows: list[str] = field(default_factory=list)
    """File and row of the conversations of these steps, at most a hundred."""
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    """Spent in steps."""
    data_wait_seconds: float = 0.0
    """Of these, spent waiting for data."""
    flops: float = 0.0
    """Needed work of this process's packs."""
    mfu: float = 0.0
    """Share of the matmul rate measured on this process's device."""
    peak_memory_bytes: int = 0
    imbalance: float = 0.0
    """Sum over the steps of the busiest process's cost over the mean of all."""
    pack_splits: int = 0
    """How often a pack did not fit in memory and was split."""
    failed_saves: int = 0
    loss: float | None = None
    """Of the last step."""
    eval_loss: float | None = None
    eval_loss_by_source: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    """Step of the last evaluation."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    exact_match: list[float] = field(default_factory=list)
    """Share of held-out turns answered exactly, before and after training."""
    metrics_lines: int = 0
    """Of metrics.jsonl when the state was saved; 0 if that is not known."""
    stopped_by: int | None = None
    """The signal that ended the run early."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {**vars(self), "output_dir": str(self.output_dir), "counts": vars(self.counts)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        kept = {key: value for key, value in saved.items() if key in vars(self) and key != "output_dir"}
        counts: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in kept.pop("counts").items()}
        vars(self).update(kept, counts=Counts(**counts), stopped_by=None)


@dataclass(frozen=True)
class Goal:
    """When a run is done."""

    num_steps: int
    patience: int | None = None
    """Evaluations in a row without a lower loss after which it stops early."""

    def is_reached(self, state: RunState) -> bool:
        return state.steps >= self.num_steps or self.is_out_of_patience(state)

    def is_out_of_patience(self, state: RunState) -> bool:
        return self.patience is not None and state.evaluations_without_gain >= self.patience


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step > 0 and step % every == 0
