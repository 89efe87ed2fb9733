"""Claims: a recipe may say of a schedule what transformers lets one say, and nothing else; each mistake is named."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_args

import pytest

from mtr.recipe.schedules import KWARGS, Schedule, as_schedule, check_schedule


def test_the_table_is_what_transformers_schedules_take() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as FUNCTIONS
    from transformers.trainer_utils import SchedulerType

    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch"}
    for kind, kwargs in KWARGS.items():
        assert set(inspect.signature(FUNCTIONS[SchedulerType(kind)]).parameters) - ours == set(kwargs), kind
    refused = {"reduce_lr_on_plateau", "greedy"}
    assert set(get_args(Schedule)) | refused == set(KWARGS) | refused == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("cosine", {"num_cycles": 0.5}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 0.0}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0}),
        ("warmup_stable_decay", {"num_decay_steps": 0.1, "warmup_type": "1-sqrt"}),
    ],
)
def test_what_is_right_passes(kind: Any, kwargs: dict[str, Any]) -> None:
    check_schedule(kind, kwargs, 1e-3)


@pytest.mark.parametrize(
    ("kind", "kwargs", "words"),
    [
        ("linear", {"num_cycles": 1}, "linear has no num_cycles; it takes none"),
        ("cosine", {"min_lr": 1e-5}, "cosine has no min_lr; it takes num_cycles"),
        ("cosine", {"num_cycles": "2"}, "num_cycles: must be a number (got '2')"),
        ("cosine_with_min_lr", {"min_lr": "little"}, "min_lr: must be a number (got 'little')"),
        ("cosine", {"num_cycles": 0}, "num_cycles: must be above 0 (got 0)"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "must be a whole number (got 1.5)"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate in lr_scheduler_kwargs, and not both"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "and not both"),
        ("cosine_with_min_lr", {"min_lr": 1e-3}, "lr_scheduler_kwargs.min_lr (0.001) must be below learning_rate"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "must be from 0 to 1"),
        ("polynomial", {"lr_end": 0.1}, "lr_end (0.1) must be below learning_rate"),
        ("polynomial", {"lr_end": 1e-3}, "lr_end (0.001) must be below learning_rate"),
        ("polynomial", {"lr_end": -1}, "must not be negative (got -1)"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "sqrt"}, "must be linear, cosine or 1-sqrt"),
    ],
)
def test_what_is_wrong_is_named(kind: Any, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_schedule(kind, kwargs, 1e-3)


def test_where_the_polynomial_ends_is_known_too() -> None:
    """transformers refuses a learning rate that is not above it, when training begins."""
    from transformers import get_polynomial_decay_schedule_with_warmup as polynomial

    end = inspect.signature(polynomial).parameters["lr_end"].default
    check_schedule("polynomial", {}, 1.01 * end)
    with pytest.raises(ValueError, match=re.escape(f"lr_end ({end}) must be below learning_rate")):
        check_schedule("polynomial", {}, end)
    check_schedule("polynomial", {"lr_end": 0}, end)


def test_schedules_that_follow_the_loss_are_refused_with_a_reason() -> None:
    assert as_schedule("wsd") == "warmup_stable_decay"
    for kind in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ValueError, match=rf"{kind} is not offered: it follows the .*loss.*use cosine_with_min_lr"):
            as_schedule(kind)
