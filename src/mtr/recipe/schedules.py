"""Learning-rate schedules under transformers' names, and what each of them may be told in lr_scheduler_kwargs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
KWARGS: dict[Schedule, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
}
"""All that transformers' schedule takes, but num_stable_steps, which is what warmup and decay leave of a run."""

_LR_END = 1e-7
"""Where transformers' polynomial ends, if it is not told."""
_WHOLE = ("timescale",)
_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
_POSITIVE = ("num_cycles", "power", "timescale", "num_decay_steps")
_CURVES = {"warmup_type": ("linear", "cosine", "1-sqrt"), "decay_type": ("linear", "cosine", "1-sqrt")}
_REFUSED = {
    "reduce_lr_on_plateau": "it follows the evaluation loss, so evaluating at other steps or on other data would train "
    "another model; use cosine_with_min_lr or warmup_stable_decay, with training.early_stopping_patience",
    "greedy": "it follows the loss of single steps; use cosine_with_min_lr or warmup_stable_decay",
}
_Value = int | float | str


def as_schedule(value: object) -> object:
    """
    Raises:
        ValueError: a schedule of transformers' that no run of mtr may have; says why.
    """
    if isinstance(value, str) and value in _REFUSED:
        raise ValueError(f"{value} is not offered: {_REFUSED[value]}")
    return "warmup_stable_decay" if value == "wsd" else value


def as_number(value: Any) -> Any:
    """YAML reads `1e-6` and `1.5e6`, without a dot or a sign, as text."""
    is_one = isinstance(value, str) and re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]{1,3}", value)
    return float(value) if is_one else value


def as_kwargs(value: object) -> object:
    """
    Raises:
        ValueError: a value that is neither a finite number nor text.
    """
    if not isinstance(value, dict):
        return value
    for key, one in value.items():
        is_number = isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one)
        if not is_number and not isinstance(one, str):
            raise ValueError(f"lr_scheduler_kwargs.{key}: must be a number")
    return {key: as_number(one) for key, one in value.items()}


def check_schedule(kind: Schedule, kwargs: Mapping[str, _Value], learning_rate: float) -> None:
    """
    Raises:
        ValueError: the schedule takes no such argument, needs another one, or not with this value.
    """
    known = KWARGS[kind]
    for name, value in kwargs.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"lr_scheduler_kwargs: {kind} has no {name}; it {takes}")
        if problem := _problem(kind, name, value):
            raise ValueError(f"lr_scheduler_kwargs.{name}: {problem} (got {value!r})")
    lowest = {**({"lr_end": _LR_END} if kind == "polynomial" else {}), **kwargs}
    for name in ("min_lr", "lr_end"):
        if float(lowest.get(name, 0)) >= learning_rate:
            raise ValueError(f"lr_scheduler_kwargs.{name} ({lowest[name]}) must be below learning_rate")
    if "min_lr" in known and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ValueError(f"{kind} needs min_lr or min_lr_rate in lr_scheduler_kwargs, and not both")
    if "num_decay_steps" in known and "num_decay_steps" not in kwargs:
        raise ValueError(
            f"{kind} needs num_decay_steps in lr_scheduler_kwargs: a number of steps or, below 1, a share of all steps"
        )


def _problem(kind: Schedule, name: str, value: _Value) -> str | None:
    """What is wrong with the value of an argument."""
    if name in _CURVES:
        curves = _CURVES[name]
        return None if value in curves else f"must be {', '.join(curves[:-1])} or {curves[-1]}"
    if isinstance(value, str):
        return "must be a number"
    whole = name in _WHOLE or (name == "num_cycles" and kind == "cosine_with_restarts")
    if whole and value != int(value):
        return "must be a whole number"
    if name in _SHARES and not 0 <= value <= 1:
        return "must be from 0 to 1"
    if value < 0 or (name in _POSITIVE and value == 0):
        return "must be above 0" if name in _POSITIVE else "must not be negative"
    return None
