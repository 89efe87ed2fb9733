"""Claims: a start of adapters or an optimizer that would not be exact, or does not fit the rest of the recipe, is
refused with its reason and what to do; what fits loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.recipes import at, changed, load, refused

from mtr.recipe.changes import differing_keys


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"])
def test_starts_of_adapters_load(tmp_path: Path, how: Any) -> None:
    recipe = load(tmp_path, changed(lora__init_lora_weights=how))
    assert at(recipe, "lora.init_lora_weights") is how or at(recipe, "lora.init_lora_weights") == how
    assert recipe.lora is not None
    assert recipe.lora.takes_from_base == (how in ("pissa", "pissa_niter_16", "olora"))


FOUR_BITS = {"name_or_path": "/m", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"init_lora_weights": "eva"},
            "activations of the data, which mtr does not collect; let PEFT make the adapter",
        ),
        ({"init_lora_weights": "corda"}, "name its folder in lora.init_from"),
        ({"init_lora_weights": "lora_ga"}, "starts from gradients of the data"),
        ({"init_lora_weights": "mica"}, "trains A only"),
        ({"init_lora_weights": False}, "the model would be another one before the first step"),
        ({"init_lora_weights": 1}, "must be true or the name of an initialisation"),
        ({"init_lora_weights": "pissa_niter_many"}, "write pissa_niter_16"),
        ({"init_lora_weights": "svd"}, "'gaussian', 'orthogonal', 'pissa', 'olora' or 'loftq', or true (got 'svd')"),
        ({"init_lora_weights": "loftq"}, "so it needs model.load_in_4bit: true"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "does not work with lora.use_dora"),
        ({"init_lora_weights": "olora", "init_from": "/a"}, "has no effect with lora.init_from"),
        ({"init_lora_weights": "orthogonal", "target_parameters": ["x"]}, "not work with lora.target_parameters"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even lora.r"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}}, "even ranks in lora.rank_pattern"),
    ],
)
def test_starts_that_do_not_fit_are_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, changed(lora=keys))


def test_4_bit_weights_go_with_loftq_alone(tmp_path: Path) -> None:
    load(tmp_path, changed(model=FOUR_BITS, lora__init_lora_weights="loftq"))
    said = refused(tmp_path, changed(model=FOUR_BITS, lora__init_lora_weights="pissa"))
    assert "the adapter would fit no other copy of the model; with model.load_in_4bit use loftq" in said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        *(
            ({"optim": optim, "parallel": "fsdp2", "lr_scheduler_type": "constant"}, f"{optim} works with")
            for optim in ("adafactor", "muon", "adamw_8bit", "paged_adamw_8bit", "schedule_free_adamw")
        ),
        ({"optim": "schedule_free_adamw"}, "lr_scheduler_type: cosine; set constant_with_warmup or constant"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "is not offered: it follows the evaluation loss"),
        ({"lr_scheduler_type": "wsd"}, "needs num_decay_steps"),
        ({"lr_scheduler_kwargs": {"num_cycles": True}}, "training.lr_scheduler_kwargs"),
        ({"loraplus_lr_ratio": 0}, "greater than 0"),
        ({"neftune_noise_alpha": 5}, "one pass would no longer be the passes per turn"),
    ],
)
def test_training_that_does_not_fit_is_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, changed(training={"output_dir": "/o", **keys}))


def test_lora_plus_needs_lora(tmp_path: Path) -> None:
    raw = changed(lora=None, training__loraplus_lr_ratio=16)
    assert "training.loraplus_lr_ratio needs lora" in refused(tmp_path, raw)


def test_numbers_of_a_schedule_may_be_written_as_yaml_writes_them(tmp_path: Path) -> None:
    raw = "\n".join(
        [
            "model: {name_or_path: /m}",
            "data: {train: /d.jsonl}",
            "training: {output_dir: /o, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1.5E-6}}",
        ]
    )
    assert at(load(tmp_path, raw), "training.lr_scheduler_kwargs") == {"min_lr": 1.5e-6}


def test_only_what_changes_no_step_may_change_on_a_resume(tmp_path: Path) -> None:
    one = load(tmp_path, changed())
    asked = load(tmp_path, changed(training={"output_dir": "/o", "checkpoint_signal": "USR2"}))
    assert differing_keys(one, asked) == []
    other = load(tmp_path, changed(training={"output_dir": "/o", "loraplus_lr_ratio": 2, "optim": "muon"}))
    assert differing_keys(one, other) == ["training.loraplus_lr_ratio", "training.optim"]
