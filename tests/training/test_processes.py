"""Claims: several processes, spread either way, train as one does, also in steps in which one has nothing; a run goes
on with another number of them; one that fails ends all with its reason; packs are shared out by what they cost.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.paths import QUICKSTART, ROOT
from support.processes import in_processes
from support.runs import good_checkpoint

from mtr.model.flops import cost_of
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.processes import leave
from mtr.tree.layout import View, merge
from mtr.tree.packing import BY_TOKENS, Cost, build_packs, idle_pack, imbalance

Recipes = Callable[..., Path]
Launch = Callable[..., subprocess.CompletedProcess[str]]
KEYS = ("loss", "grad_norm", "learning_rate", "eval_loss", "position", "num_tokens")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differs(one: Path, other: Path) -> float:
    """The largest relative difference in the metrics of two runs."""
    mine, theirs = lines(one), lines(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    pairs = [(a[key], b[key]) for a, b in zip(mine, theirs, strict=True) for key in KEYS if key in a]
    assert len(pairs) > 20
    return float(max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs))


@pytest.fixture
def few(write_recipe: Recipes, tmp_path: Path) -> Recipes:
    """Seven rows, three a step: the last step of an epoch has one conversation, so a process has none."""
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:7]))
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[7:10]))

    def write(name: str, **sections: Any) -> Path:
        training = {"output_dir": str(tmp_path / name), "max_steps": 6, "conversations_per_step": 3, "eval_steps": 3}
        data = {"train": str(tmp_path / "few.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
        merged: dict[str, Any] = {"data": data, "training": training, "date": "2026-01-31"}
        for section, keys in sections.items():
            merged[section] = {**merged[section], **keys} if isinstance(merged.get(section), dict) else keys
        return write_recipe(**merged)

    return write


@pytest.fixture
def launch() -> Launch:
    def run(recipe: Path, processes: int, *arguments: str, broken: str | None = None) -> Any:
        command = [sys.executable, "-m", "mtr", "train", str(recipe), "--num-processes", str(processes)]
        if broken:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "support.patched", broken]
            command += ["train", str(recipe)]
        path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(
            command + list(arguments), capture_output=True, text=True, env=environment, timeout=180, check=False
        )

    return run


@pytest.mark.distributed
def test_four_processes_then_two_then_one_are_one(few: Recipes, tmp_path: Path) -> None:
    """Four with whole models, two with shares of it, and one: each goes on from the checkpoint of the one before.
    Adapters start as a part of the weights, which every one of them takes out alike.
    """
    sections: dict[str, Any] = {"generation": {"conversations": 3, "max_new_tokens": 3}}
    sections["lora"] = {"init_lora_weights": "pissa", "r": 4}
    train(load_recipe(few("one", **sections)))
    recipe = few("many", training={"save_steps": 2}, **sections)
    done = in_processes(4, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert differs(tmp_path / "one", tmp_path / "many") < 1e-5
    busiest = [line["imbalance"] for line in lines(tmp_path / "many") if "loss" in line]
    assert busiest[2] == busiest[5] == 4.0, "one conversation for four processes"
    assert "imbalance     the busiest process had" in done.stderr
    generated = [(folder / "generations.jsonl").read_text() for folder in (tmp_path / "one", tmp_path / "many")]
    assert generated[0] == generated[1]

    shutil.rmtree(tmp_path / "many" / "checkpoint-6")
    assert good_checkpoint(tmp_path / "many")[0] == tmp_path / "many" / "checkpoint-4"
    fitted = ("sequence.max_tokens=auto", "training.gradient_checkpointing=auto")  # by probes that all take part in
    done = in_processes(2, "train", recipe, "--resume", "training.parallel=fsdp2", *fitted)
    assert done.returncode == 0, done.stderr
    assert "resumed       checkpoint-4" in done.stderr
    assert done.stderr.count("memory        checkpointing none (none ") == 1
    assert differs(tmp_path / "one", tmp_path / "many") < 1e-5

    train(load_recipe(recipe, ["training.max_steps=6"]), resume=True)
    assert differs(tmp_path / "one", tmp_path / "many") < 1e-5


@pytest.mark.distributed
def test_weights_that_are_shared_out_are_trained_as_whole_ones(few: Recipes, tmp_path: Path) -> None:
    """fsdp2 with all weights trained, checkpointing, and the best checkpoint loaded back."""
    from safetensors.torch import load_file

    sections: dict[str, Any] = {"lora": None, "training": {"gradient_checkpointing": True, "load_best_at_end": True}}
    train(load_recipe(few("one", **sections)))
    recipe = few("shares", lora=None, training={**sections["training"], "parallel": "fsdp2"})
    done = in_processes(2, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert differs(tmp_path / "one", tmp_path / "shares") < 1e-5
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "shares"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.distributed
def test_a_process_without_memory_does_its_packs_again_alone(few: Recipes, tmp_path: Path) -> None:
    train(load_recipe(few("one", sequence={"max_length": 200, "max_tokens": 400})))
    recipe = few("split", sequence={"max_length": 200, "max_tokens": 400, "on_oom": "split"})
    done = in_processes(2, "out_of_memory=220", "train", recipe, module="support.patched")
    assert done.returncode == 0, done.stderr
    trained = [[line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "split")]
    pairs = [(a[k], b[k]) for a, b in zip(*trained, strict=True) for k in ("loss", "grad_norm")]
    assert max(abs(a - b) / abs(a) for a, b in pairs) < 1e-5


@pytest.mark.distributed
def test_a_process_that_fails_ends_all_with_its_reason(few: Recipes, launch: Launch, tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch(few("run"), 2, broken="out_of_memory=10")
    assert done.returncode != 0
    assert "error: process 1: out of memory in a pack of" in done.stderr
    assert "few.jsonl, line" in done.stderr
    assert "exitcode  : 5" in done.stderr
    assert time.monotonic() - began < 100


@pytest.mark.distributed
def test_a_signal_to_one_process_is_for_all_after_the_same_step(few: Recipes, tmp_path: Path) -> None:
    """One that asks for a checkpoint, after which the run goes on, and one that ends it."""
    recipe = few("run", training={"checkpoint_signal": "USR2"})
    done = in_processes(2, "asked=1", "train", recipe, module="support.patched")
    assert done.returncode == 143, done.stderr
    assert done.stderr.count("checkpoint-2, as asked for") == 1
    assert "stopped by SIGTERM after step 3; continue with --resume" in done.stderr
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert good_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-3"


@pytest.mark.distributed
def test_the_launcher_passes_a_signal_on_and_returns_its_code(few: Recipes, tmp_path: Path) -> None:
    """SIGUSR1, as SLURM sends it, to the launcher alone."""
    recipe = few("run", training={"preempt_signal": "SIGUSR1", "max_steps": 10_000, "eval_steps": None})
    command = [sys.executable, "-m", "mtr", "train", str(recipe), "--num-processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(10)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 128 + 10, err
    assert "stopped by SIGUSR1 after step" in err
    good, _ = good_checkpoint(tmp_path / "run")
    assert good is not None
    assert lines(tmp_path / "run")[-1]["step"] == int(good.name.split("-")[1])


@pytest.mark.distributed
@pytest.mark.slow
def test_a_process_that_is_killed_ends_all(few: Recipes, launch: Launch, tmp_path: Path) -> None:
    done = launch(few("run", training={"save_steps": 1}), 2, broken="killed=3")
    assert done.returncode != 0
    assert "error: process 0: another process of the run ended" in done.stderr
    assert good_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"


# --- who gets which pack ----------------------------------------------------------------------------------------------


def chain(length: int) -> Any:
    ids = np.arange(1, length + 1)
    return merge([View(ids[:-1], ids[-1:], np.ones(1))])


def test_packs_are_shared_out_by_cost_and_not_by_tokens() -> None:
    """Where attention counts, one long conversation costs more than its tokens in short ones."""
    layouts = [chain(100), *[chain(10) for _ in range(10)], chain(100)]
    cost = Cost(pair=1.0)
    shares = build_packs([layouts[0], *layouts[1:11]], 1000, 2, cost)
    assert sorted(sum(pack.num_tokens for pack in share) for share in shares) == [100, 100]
    assert imbalance(shares, BY_TOKENS) == 1.0
    assert imbalance(shares, cost) == pytest.approx(2 * 5150 / (5150 + 650))
    even = build_packs(layouts, 1000, 2, cost)
    assert imbalance(even, cost) < 1.1


def test_nothing_to_share_out_is_balanced() -> None:
    assert imbalance([[], []], BY_TOKENS) == 1.0
    assert imbalance(build_packs([chain(5)], 10, 4), BY_TOKENS) == 4.0


def test_an_idle_pack_supervises_nothing() -> None:
    pack = idle_pack()
    assert pack.num_tokens == 1
    assert len(pack.layouts[0].target_id) == 0


def test_the_cost_of_a_model_grows_with_context_and_vocabulary() -> None:
    from transformers import Qwen3Config

    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"head_dim": 128, "num_hidden_layers": 36, "vocab_size": 151936}
    config = Qwen3Config(**shape)
    cost = cost_of(config, trained_whole=True)
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288
    assert cost.pair == pytest.approx(2 * 4096 / layer)
    assert cost.target == pytest.approx(151936 * 4096 / (36 * layer))
    assert cost_of(config, trained_whole=False).pair == pytest.approx(1.5 * cost.pair)
    window = Qwen3Config(**shape, use_sliding_window=True, sliding_window=8, max_window_layers=18)
    assert dict(cost_of(window, trained_whole=True).spans) == {None: 0.5, 8: 0.5}


# --- launch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["skypilot.yaml", "kubernetes.yaml"])
def test_launch_files_parse_and_start_the_command(name: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "recipes" / "launch" / name).read_text()))
    text = json.dumps(documents)
    assert "-m mtr train" in text
    assert "--resume" in text
    if name == "skypilot.yaml":
        assert set(documents[0]) >= {"resources", "num_nodes", "setup", "run"}
    else:
        assert [document["kind"] for document in documents] == ["Service", "Job"]
        job = documents[1]["spec"]
        assert job["completionMode"] == "Indexed"
        assert job["completions"] == job["parallelism"]


def test_the_slurm_file_is_shell_and_asks_for_the_signal() -> None:
    path = ROOT / "recipes" / "launch" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0
    options = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert any(line.startswith("#SBATCH --signal=") for line in options)
    assert "#SBATCH --requeue" in options
    assert "-m mtr train" in path.read_text()


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_gpus_are_one(few: Recipes, launch: Launch, tmp_path: Path, parallel: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    done = launch(few("one"), 1)
    assert done.returncode == 0, done.stderr
    done = launch(few("two", training={"parallel": parallel}), 2)
    assert done.returncode == 0, done.stderr
    assert differs(tmp_path / "one", tmp_path / "two") < 1e-3


def test_the_reducer_is_gone_before_the_process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other way round, the last process to leave may wait for ever for a thread of gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    left: list[bool] = []

    def end_training() -> None:
        left.append(hasattr(model, "reducer") or hasattr(model, "logger"))
        torch.distributed.destroy_process_group()

    leave(SimpleNamespace(end_training=end_training), model)
    assert left == [False]
