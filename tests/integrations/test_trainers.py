"""Claims: `transformers.Trainer` and TRL's SFTTrainer train to the losses of `mtr train`, step by step, with LoRA and
without, with gradient accumulation, with weights that are no whole numbers, and on several processes; what would train
something else is refused, with words that say what to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from support.integrations import STEPS, adapted, arguments, dataset, losses, mtr_losses, quickstart_rows
from support.paths import ROOT
from support.tree_trainer import WEIGHTS, MixedTrainer

import mtr
from mtr.integrations.trainer import check_arguments

Models = Callable[..., Path]
Rows = Callable[..., Path]
NOISE = 1e-5
"""Relative."""
SLOW = pytest.mark.slow


def counted(model: Any, folder: Path, trees: Any, accumulation: int = 1, **options: Any) -> Any:
    """`transformers.Trainer` as it is."""
    args = arguments(transformers.TrainingArguments, folder, accumulation, **options)
    return transformers.Trainer(model=model, args=args, train_dataset=trees, data_collator=mtr.TreeCollator())


def mixed(model: Any, folder: Path, trees: Any, accumulation: int = 1, **options: Any) -> Any:
    args = arguments(transformers.TrainingArguments, folder, accumulation, **options)
    return MixedTrainer(model=model, args=args, train_dataset=trees)


def trl(model: Any, folder: Path, trees: Any, accumulation: int = 1, **options: Any) -> Any:
    library = pytest.importorskip("trl")
    kind = type("Trainer", (mtr.TreeTrainerMixin, library.SFTTrainer), {})
    args = arguments(library.SFTConfig, folder, accumulation, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config.name_or_path)
    return kind(model=model, args=args, train_dataset=trees, processing_class=tokenizer)


@pytest.fixture
def state_of_accelerate() -> Iterator[None]:
    """Without the precision that a test trains in."""
    yield
    AcceleratorState._reset_state()


TRAINERS: dict[str, Callable[..., Any]] = {"transformers": counted, "mixin": mixed, "trl": trl}


@pytest.mark.parametrize(
    ("lora", "changes", "weighting", "trainers"),
    [
        (False, {}, "token", [("transformers", 2), ("trl", 1)]),
        (True, WEIGHTS, "turn", [("trl", 2)]),
        pytest.param(False, {}, "token", [(n, a) for n in TRAINERS for a in (1, 2, 4)], marks=SLOW),
        pytest.param(True, {}, "conversation", [(n, a) for n in TRAINERS for a in (1, 2)], marks=SLOW),
        pytest.param(False, WEIGHTS, "token", [("mixin", 1), ("mixin", 4), ("trl", 1)], marks=SLOW),
        pytest.param(True, WEIGHTS, "turn", [("mixin", 2), ("trl", 1)], marks=SLOW),
    ],
)
def test_other_trainers_follow_mtr(
    models: Models,
    write_rows: Rows,
    tmp_path: Path,
    lora: bool,
    changes: dict[str, Any],
    weighting: Any,
    trainers: list[tuple[str, int]],
) -> None:
    rows = quickstart_rows(80, **changes)
    expected = mtr_losses(models("qwen3"), write_rows, rows, lora, loss={"weighting": weighting})
    assert len(expected) == STEPS
    assert abs(expected[-1] / expected[0] - 1) > 100 * NOISE, "nothing was learned, so nothing is shown"
    trees = dataset(rows, weighting=weighting)
    for name, accumulation in trainers:
        model = mtr.load(str(models("qwen3")))
        trainer = TRAINERS[name](adapted(model) if lora else model, tmp_path / "out", trees, accumulation)
        np.testing.assert_allclose(losses(trainer), expected, rtol=NOISE, err_msg=f"{name}, {accumulation}")


def test_means_of_batches_are_another_loss(models: Models, tmp_path: Path) -> None:
    """What the trajectories above would be, if each batch were divided by its own weights."""
    trees = dataset(quickstart_rows(4, **WEIGHTS))
    model = mtr.load(str(models("qwen3"))).eval()
    batches = [mtr.TreeCollator()([trees[i]]) for i in range(4)]
    with torch.no_grad():
        means = [float(model(**batch).loss) for batch in batches]
    weights = [batch["attention_mask"].weight_sum for batch in batches]
    (first,) = losses(mixed(model, tmp_path / "out", trees, accumulation=4, max_steps=1))
    assert first == pytest.approx(np.average(means, weights=weights), rel=1e-6)
    assert first != pytest.approx(np.mean(means), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, WEIGHTS])
def test_such_a_loss_strays_from_it(models: Models, tmp_path: Path, changes: dict[str, Any]) -> None:
    class OfMeans(MixedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).loss / self.args.gradient_accumulation_steps

    trees = dataset(quickstart_rows(80, **changes))
    args = arguments(transformers.TrainingArguments, tmp_path / "out", accumulation=4)
    right, wrong = (
        losses(kind(model=mtr.load(str(models("qwen3"))), args=args, train_dataset=trees))
        for kind in (MixedTrainer, OfMeans)
    )
    assert np.abs(np.divide(wrong, right) - 1).max() > 100 * NOISE


def test_weights_that_cannot_be_counted_are_refused(models: Models, tmp_path: Path) -> None:
    trainer = counted(mtr.load(str(models("qwen3"))), tmp_path / "out", dataset(quickstart_rows(8, **WEIGHTS)))
    with pytest.raises(
        mtr.UserError, match=r"add up to [\d.]+, and the trainer counts whole labels only: put mtr\.Tre"
    ):
        losses(trainer)


def test_evaluation_is_the_mean_of_its_batches(models: Models, tmp_path: Path) -> None:
    trees = dataset(quickstart_rows(8))
    model = mtr.load(str(models("qwen3")))
    for make in (counted, mixed, trl):
        trainer = make(model, tmp_path / "out", trees, per_device_eval_batch_size=8)
        trainer.remove_callback(transformers.PrinterCallback)
        found = trainer.evaluate(trees)["eval_loss"]
        with torch.no_grad():
            expected = float(model(**mtr.TreeCollator()([trees[i] for i in range(8)])).loss)
        assert found == pytest.approx(expected, rel=NOISE)


def test_evaluation_without_a_trained_turn(models: Models, tmp_path: Path) -> None:
    """It has no loss, and 0 would be half of the mean."""
    rows = quickstart_rows(2)
    rows[0]["messages"] = [{**m, "train": m["role"] != "assistant"} for m in rows[0]["messages"]]
    rows[1]["messages"] = [{**m, "train": True} for m in rows[1]["messages"]]
    trees = dataset(rows)
    assert [len(ids) > 0 for ids in trees["input_ids"]] == [False, True]
    model = mtr.load(str(models("qwen3")))
    for make in (counted, mixed):
        trainer = make(model, tmp_path / "out", trees, per_device_eval_batch_size=1)
        trainer.remove_callback(transformers.PrinterCallback)
        with pytest.raises(
            mtr.UserError, match=r"no mean, .* as in `trees\.filter\(lambda row: len\(row\['weight'\]\) > 0"
        ):
            trainer.evaluate(trees)
        left = trees.filter(lambda row: len(row["weight"]) > 0)
        trainer.args.per_device_eval_batch_size = 2
        assert trainer.evaluate(left)["eval_loss"] == trainer.evaluate(trees)["eval_loss"] > 0
    assert model.eval()(**mtr.TreeCollator()([trees[0]]), num_items_in_batch=5.0).loss == 0, "of a loop's own sum"


@pytest.mark.parametrize(("name", "lora"), [("transformers", False), ("trl", True)])
def test_resumed_within_an_epoch(models: Models, tmp_path: Path, name: str, lora: bool) -> None:
    trees = dataset(quickstart_rows(24))
    asked: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "accumulation": 2}

    def made(folder: str) -> Any:
        model = mtr.load(str(models("qwen3")))
        model = adapted(model) if lora else model
        return TRAINERS[name](model, tmp_path / folder, trees, train_sampling_strategy="random", **asked)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    expected = losses(made("whole"))
    first = made("halves")
    first.add_callback(Stop())
    assert losses(first) == expected[:2]
    again = made("halves")
    again.remove_callback(transformers.PrinterCallback)
    again.train(resume_from_checkpoint=True)
    assert [line["loss"] for line in again.state.log_history if "loss" in line] == expected


@pytest.mark.usefixtures("state_of_accelerate")
def test_mixed_precision_before_and_after(models: Models, tmp_path: Path) -> None:
    """accelerate puts autocast around a forward once, so each forward has to be new to it."""
    trees = dataset(quickstart_rows(4))

    def loss(model: Any, **options: Any) -> list[float]:
        return losses(counted(model, tmp_path / "out", trees, max_steps=1, learning_rate=0.0, **options))

    expected = loss(mtr.load(str(models("qwen3"))), bf16=True)
    assert expected != loss(mtr.load(str(models("qwen3"))))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")))
    before = set(vars(model))
    for _ in range(2):
        with mtr.tree_attention(model):
            assert loss(model, bf16=True) == expected
        assert set(vars(model)) == before
        model._is_accelerate_prepared = True  # as by a trainer without trees
        before |= {"_is_accelerate_prepared"}


def test_workers_and_the_count_of_tokens(models: Models, tmp_path: Path) -> None:
    trees, found = dataset(quickstart_rows(16)), []
    other: dict[str, Any] = {"dataloader_num_workers": 1, "include_num_input_tokens_seen": "non_padding"}
    for options in ({}, other):
        trainer = counted(mtr.load(str(models("qwen3"))), tmp_path / "out", trees, max_steps=2, **options)
        trainer.data_collator = mtr.TreeCollator(pad_to_multiple_of=64)
        found.append(losses(trainer))
    assert found[0] == found[1]
    assert trainer.state.num_input_tokens_seen == sum(len(trees[i]["input_ids"]) for i in range(8))


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_follow_one(models: Models, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "support.tree_trainer", str(models("qwen3")), str(tmp_path)]
    path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    for name, make, changes in (("counted", counted, {}), ("mixin", mixed, WEIGHTS)):
        trainer = make(
            mtr.load(str(models("qwen3"))), tmp_path / "out", dataset(quickstart_rows(20, **changes)), max_steps=5
        )
        np.testing.assert_allclose(found[name], losses(trainer), rtol=NOISE, err_msg=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not go with trees: it is another loss"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 does not go with trees"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True does not go with trees: it replaces the forward"),
        ({"packing": True}, "packing=True does not go with trees: trees are packed by mtr.TreeCollator"),
        ({"eval_packing": True}, "eval_packing=True does not go with trees"),
        ({"padding_free": True}, "padding_free=True does not go with trees"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True does not go with trees"),
        ({"completion_only_loss": True}, "completion_only_loss=True does not go with trees"),
        ({"completion_only_loss": False}, "completion_only_loss=False does not go with trees"),
        ({"chat_template_path": "x.jinja"}, "chat_template_path='x.jinja' does not go with trees: trees were rendered"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 does not go with trees"),
        ({"loss_type": "dft"}, "loss_type='dft' does not go with trees"),
        ({"dataset_kwargs": None}, r"set dataset_kwargs={'skip_prepare_dataset': True}"),
        ({"remove_unused_columns": True}, "set remove_unused_columns=False"),
    ],
)
def test_what_the_mixin_refuses(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    library = pytest.importorskip("trl")
    with pytest.raises(mtr.UserError) as error:
        MixedTrainer(args=arguments(library.SFTConfig, tmp_path / "out", **options))
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_what_needs_logits_is_refused(name: str) -> None:
    with pytest.raises(mtr.UserError, match=f"{name} needs the logits"):
        MixedTrainer(**{name: print})


def test_what_trl_would_do_to_the_data_is_refused(models: Models, tmp_path: Path) -> None:
    """Its own arguments are made of others, which do not say so."""
    library = pytest.importorskip("trl")
    kind = type("Trainer", (mtr.TreeTrainerMixin, library.SFTTrainer), {})
    with pytest.raises(mtr.UserError, match="formatting_func would never be called"):
        kind(formatting_func=print)
    with pytest.raises(mtr.UserError, match=r"set dataset_kwargs={'skip_prepare_dataset': True}"):
        kind(
            model=mtr.load(str(models("qwen3"))),
            args=arguments(transformers.TrainingArguments, tmp_path / "out"),
            train_dataset=dataset(quickstart_rows(4)),
            processing_class=transformers.AutoTokenizer.from_pretrained(str(models("qwen3"))),
        )


def test_tokens_before_a_sequence_are_refused(models: Models, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        mtr.load(str(models("qwen3"))), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(mtr.UserError, match="prompt and prefix tuning, which put tokens before a sequence, cannot be"):
        losses(mixed(model, tmp_path / "out", dataset(quickstart_rows(4))))


def test_what_else_the_mixin_refuses(models: Models, tmp_path: Path) -> None:
    with pytest.raises(mtr.UserError, match="one process with several GPUs would cut a batch of trees"):
        check_arguments(SimpleNamespace(n_gpu=2), {})
    trainer = mixed(mtr.load(str(models("qwen3"))), tmp_path / "out", dataset(quickstart_rows(8)))
    trainer.data_collator = lambda rows: {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(mtr.UserError, match="a batch without trees: leave out data_collator"):
        losses(trainer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "leave out label_smoothing_factor, compute_loss_func and compute_metrics"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: turns share the embeddings"),
    ],
)
def test_what_the_model_refuses_by_itself(models: Models, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """Where `transformers.Trainer` is used as it is, nothing sees its arguments."""
    trainer = counted(mtr.load(str(models("qwen3"))), tmp_path / "out", dataset(quickstart_rows(8)), **options)
    with pytest.raises(mtr.UserError) as error:
        losses(trainer)
    assert words in str(error.value)


def test_sft_trainer_without_the_mixin(models: Models, tmp_path: Path) -> None:
    library = pytest.importorskip("trl")
    model = mtr.load(str(models("qwen3")))
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": dataset(quickstart_rows(8)),
        "data_collator": mtr.TreeCollator(),
        "processing_class": transformers.AutoTokenizer.from_pretrained(str(models("qwen3"))),
    }
    trainer = library.SFTTrainer(args=arguments(library.SFTConfig, tmp_path / "out"), **options)
    with pytest.raises(mtr.UserError, match=r"class Trainer\(mtr.TreeTrainerMixin, trl.SFTTrainer\)"):
        losses(trainer)
    dropping = arguments(library.SFTConfig, tmp_path / "out", remove_unused_columns=True)
    with pytest.raises(mtr.UserError, match=r"without position_ids, parent, .*remove_unused_columns=False"):
        losses(library.SFTTrainer(args=dropping, **options))
    cutting = arguments(library.SFTConfig, tmp_path / "out", dataset_kwargs=None, max_length=64)
    with pytest.raises(mtr.UserError, match=r"was cut after mtr.TreeBuilder .*skip_prepare_dataset"):
        losses(library.SFTTrainer(args=cutting, **options))


def test_a_model_without_tree_attention(models: Models, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")))
    trees = dataset(quickstart_rows(8))
    with pytest.raises(mtr.UserError, match=r"without parent, .*keep its columns"):
        losses(counted(model, tmp_path / "out", trees))
    with pytest.raises(mtr.UserError, match=r"would read it as one sequence: load the model with mtr\.load"):
        losses(counted(model, tmp_path / "out", trees, remove_unused_columns=False))
