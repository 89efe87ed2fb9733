"""Which keys of a recipe may differ when a run is resumed: those that do not decide the mathematics of its steps."""

from __future__ import annotations

from typing import Any

from mtr.recipe.sections import Recipe

_FREE_KEYS = (
    "model.attention",
    "data.eval",
    "data.num_workers",
    "data.rendering",
    "data.on_bad_row",
    "sequence.strategy",
    "sequence.merge",
    "sequence.max_tokens",
    "sequence.on_oom",
    "generation",
    "training.output_dir",
    "training.max_steps",
    "training.gradient_checkpointing",
    "training.torch_compile",
    "training.use_liger_kernel",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.max_nonfinite_steps",
    "training.load_best_at_end",
    "training.early_stopping_patience",
    "training.parallel",
    "training.preempt_signal",
    "training.checkpoint_signal",
    "training.on_save_error",
    "training.report_to",
    "training.push_to_hub",
)
"""Keys, or sections, that cannot change the mathematics of a step."""


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Keys that differ between two recipes and decide the mathematics of a run."""

    def flat(value: Any, key: str = "") -> dict[str, Any]:
        if key in _FREE_KEYS:
            return {}
        if not isinstance(value, dict):
            return {key: value}
        return {k: v for name, item in value.items() for k, v in flat(item, f"{key}.{name}".strip(".")).items()}

    a, b = flat(one.model_dump()), flat(other.model_dump())
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]
