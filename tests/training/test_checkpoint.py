"""Claims: a checkpoint puts parameters, optimizer and schedule back bit for bit, so that the next updates are the same;
one that was not written to its end is never taken; old ones go; removing a run leaves everything else alone.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART

from mtr.errors import UserError
from mtr.files import checksum
from mtr.recipe.sections import TrainingSection
from mtr.store.checkpoints import newest, remove_run
from mtr.store.marker import Marker
from mtr.training import checkpoint
from mtr.training.checkpoint import gather, load_checkpoint, save_checkpoint
from mtr.training.environment import Identity
from mtr.training.optim import build_optimizer, build_schedule

MARKER = Marker()
IN_8_BITS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@dataclass
class Run:
    model: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    tokenizer: Any

    def update(self, seed: int) -> None:
        """One update with made-up gradients."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.trainable():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.schedule.step()

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.trainable()]

    def save(self, folder: Path, step: int, keep: int | None = None) -> Path:
        counters = {"empty_steps": 3, "nonfinite_steps": 1}
        folder.mkdir(exist_ok=True)
        content = gather(self.model, self.optimizer, self.schedule)
        identity = Identity(MARKER.run, {})
        return save_checkpoint(folder, step, self.model, self.tokenizer, content, counters, identity, keep)


def newest_checkpoint(output_dir: Path) -> Path | None:
    return newest(output_dir, MARKER.run)


def start(optim: str = "adamw_torch", lora: bool = True, seed: int = 0, modules: list[str] | None = None) -> Run:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "base"), dtype=torch.float32)
    torch.manual_seed(seed)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=modules))
    keys = {"output_dir": "x", "optim": optim, "weight_decay": 0.1}
    keys |= {"lr_scheduler_type": "constant"} if optim == "schedule_free_adamw" else {}
    training = TrainingSection.model_validate(keys)
    optimizer = build_optimizer(model, training)
    tokenizer = AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    return Run(model, optimizer, build_schedule(optimizer, training, 10), tokenizer)


def same(one: Any, other: Any) -> bool:
    """Equal, tensors bit for bit; a tuple may have become a list."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize(
    ("optim", "lora", "modules"),
    [
        ("adamw_torch", True, None),
        ("adamw_torch", True, ["norm"]),
        ("adamw_torch", False, None),
        ("adamw_torch_fused", True, None),
        ("adafactor", True, None),
        ("sgd", True, None),
        ("muon", True, ["norm"]),
        ("schedule_free_adamw", True, None),
        pytest.param("adamw_8bit", False, None, marks=IN_8_BITS),
    ],
)
def test_everything_comes_back_bit_for_bit(tmp_path: Path, optim: str, lora: bool, modules: list[str] | None) -> None:
    run, fresh = start(optim, lora, modules=modules), start(optim, lora, seed=1, modules=modules)
    for seed in range(3):
        run.update(seed)
    assert not all(map(torch.equal, run.values(), fresh.values())), "nothing to restore"
    folder = run.save(tmp_path / "run", 3)
    state = load_checkpoint(folder, fresh.model, fresh.optimizer, fresh.schedule)
    assert state == {"empty_steps": 3, "nonfinite_steps": 1, "step": 3}
    assert same(run.values(), fresh.values())
    assert same(run.optimizer.state_dict(), fresh.optimizer.state_dict())
    assert same(run.schedule.state_dict(), fresh.schedule.state_dict())
    assert run.schedule.get_last_lr() == fresh.schedule.get_last_lr()
    for seed in range(3, 5):
        run.update(seed)
        fresh.update(seed)
    assert same(run.values(), fresh.values())
    assert same(run.optimizer.state_dict(), fresh.optimizer.state_dict())


def test_the_next_update_needs_the_state_of_the_optimizer(tmp_path: Path) -> None:
    """The other direction: parameters alone do not give the same next update."""
    run, fresh = start(), start(seed=1)
    run.update(0)
    folder = run.save(tmp_path / "run", 1)
    load_checkpoint(folder, fresh.model, start().optimizer, start().schedule)
    assert same(run.values(), fresh.values())
    run.update(1)
    fresh.update(1)
    assert not same(run.values(), fresh.values())


def test_a_checkpoint_holds_an_adapter_that_loads(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = start()
    run.update(0)
    folder = run.save(tmp_path / "run", 1)
    base = AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "base"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(folder))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template == run.tokenizer.chat_template
    assert (folder / "chat_template.jinja").read_text() == (QUICKSTART / "base" / "chat_template.jinja").read_text()


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = start().save(tmp_path / "run", 1)
    other = start(modules=["norm"])
    with pytest.raises(UserError, match=r"checkpoint-1: does not fit the model .*another recipe's"):
        load_checkpoint(folder, other.model, other.optimizer, other.schedule)


def test_a_torn_checkpoint_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output_dir = start(), tmp_path / "run"
    assert newest_checkpoint(output_dir) is None
    first = run.save(output_dir, 2)
    assert first == output_dir / "checkpoint-2"
    for function in ("save_model", "save_file", "sync"):
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise OSError("disk full")

            patch.setattr(checkpoint, function, fail)
            with pytest.raises(OSError, match="disk full"):
                run.save(output_dir, 4)
        assert newest_checkpoint(output_dir) == first
    assert [p.name for p in output_dir.glob("[!.]*")] == ["checkpoint-2"]
    assert run.save(output_dir, 4) == newest_checkpoint(output_dir)
    assert sorted(p.name for p in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_remains_of_a_torn_checkpoint_do_not_get_into_the_next(tmp_path: Path) -> None:
    partial = tmp_path / ".checkpoint-4.partial"
    partial.mkdir()
    (partial / "stale.bin").write_text("old")
    folder = start().save(tmp_path, 4)
    assert not (folder / "stale.bin").exists()
    assert not partial.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run, fresh = start(), start(seed=1)
    run.save(tmp_path, 1)
    run.update(0)
    folder = run.save(tmp_path, 1)
    load_checkpoint(folder, fresh.model, fresh.optimizer, fresh.schedule)
    assert same(run.values(), fresh.values())


def test_the_newest_is_found_by_number_and_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    run = start()
    for step in (9, 10):
        run.save(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-11.bak", "old-checkpoint-99"):
        shutil.copytree(tmp_path / "checkpoint-10", tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").write_text("a note")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("keep", "left"), [(1, [11]), (2, [10, 11]), (None, [2, 9, 10, 11])])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    run = start()
    for step in (2, 9, 10, 11):
        run.save(tmp_path, step, keep)
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.iterdir()) == left


def test_the_plain_part_of_a_checkpoint_is_json(tmp_path: Path) -> None:
    state = json.loads((start().save(tmp_path, 5) / "training_state.json").read_text())
    assert (state["step"], state["empty_steps"]) == (5, 3)


def written(folder: Path) -> Marker:
    """A marker that knows all files in the folder."""
    return MARKER.with_files({path.name: checksum(path) for path in folder.iterdir() if path.is_file()})


def test_removing_a_run_leaves_other_files_alone(tmp_path: Path) -> None:
    run = start()
    run.save(tmp_path, 1)
    checkpoint.save_model(run.model, run.tokenizer, tmp_path)
    for name in ("metrics.jsonl", "generations.jsonl", "README.md"):
        (tmp_path / name).write_text("{}\n")
    marker = written(tmp_path)
    mine = (
        "notes.txt",
        "checkpoint-best/keep.txt",
        "checkpoint-7/keep.txt",
        "data/rows.jsonl",
        "adapter_notes.txt",
        "adapter_old/keep.txt",
        "model_backup.safetensors",
        "model.safetensors",
        "README.md",
    )
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert (tmp_path / "adapter_model.safetensors").exists()
    remove_run(tmp_path, marker, marker.files)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    gone = ("checkpoint-1", "adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "generations.jsonl")
    assert [name for name in gone if (tmp_path / name).exists()] == []


def test_removing_a_run_that_trained_all_weights_removes_them(tmp_path: Path) -> None:
    run = start(lora=False)
    checkpoint.save_model(run.model, run.tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    marker = written(tmp_path)
    remove_run(tmp_path, marker, marker.files)
    assert not (tmp_path / "model.safetensors").exists()


def test_removing_nothing_is_no_error(tmp_path: Path) -> None:
    remove_run(tmp_path, MARKER, MARKER.files)
    shutil.rmtree(tmp_path)
    remove_run(tmp_path, MARKER, MARKER.files)
