"""Host memory of each process while it loads its share of a model, with `parallel: fsdp2`.

    python benchmarks/load_memory.py --json benchmarks/results/load-memory.json

A random model (100M parameters, 400 MB in float32) is loaded and sharded by 2 and by 4 processes on the CPU, as
`mtr train` does it: in float32, as it is stored, and in bfloat16, which it has to be converted to. Of each process the
growth of the resident set is reported, at its peak and when the shards are in place. The first process reads the model
for all of them; in float32 what it holds of it are pages of the mapped files, which the system can take back.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from mtr.files import write_json
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.training.environment import environment

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
SHAPE = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPE |= {"num_key_value_heads": 12, "head_dim": 64}
CPU = torch.device("cpu")


def make_model(folder: Path) -> int:
    """A random model with the tokenizer of the quickstart, in float32; returns its bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    shutil.copytree(QUICKSTART / "base", folder)
    (folder / "model.safetensors").unlink()
    config = Qwen3Config(**SHAPE, vocab_size=len(AutoTokenizer.from_pretrained(folder)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(str(folder), max_shard_size="100MB")
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def measure(model: Path, dtype: str, processes: int, scratch: Path) -> list[dict[str, int]]:
    """What each process reports, in the order of ranks."""
    recipe = {
        "model": {"name_or_path": str(model), "dtype": dtype},
        "data": {"train": str(QUICKSTART / "train.jsonl")},
        "training": {"output_dir": str(scratch / "run"), "max_steps": 1, "parallel": "fsdp2"},
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, "--worker", str(scratch)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(processes)]


def work(scratch: Path) -> None:
    """One process of a run, which ends when its model is distributed."""
    from mtr.recipe.loading import load_recipe
    from mtr.training.loop import train

    setup: Any = importlib.import_module("mtr.training.setup")
    load, distribute, before = setup.load_model, setup.distribute, [0]

    def measured_load(*arguments: Any, **options: Any) -> Any:
        reset_peak_memory(CPU)
        before[0] = peak_memory(CPU)
        return load(*arguments, **options)

    def measured_distribute(*arguments: Any, **options: Any) -> None:
        distributed = distribute(*arguments, **options)
        peak = peak_memory(CPU) - before[0]
        reset_peak_memory(CPU)
        report = {"peak_bytes": peak, "left_bytes": peak_memory(CPU) - before[0]}
        (scratch / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
        del distributed
        torch.distributed.barrier()
        os._exit(0)

    setup.load_model, setup.distribute = measured_load, measured_distribute
    train(load_recipe(scratch / "recipe.yaml"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        stored = make_model(Path(scratch) / "model")
        for processes in arguments.processes:
            for dtype in ("float32", "bfloat16"):
                size = stored // (1 if dtype == "float32" else 2)
                for rank, report in enumerate(measure(Path(scratch) / "model", dtype, processes, Path(scratch))):
                    rows.append({"dtype": dtype, "model_bytes": size, "processes": processes, "rank": rank} | report)
                    peak, left = report["peak_bytes"], report["left_bytes"]
                    print(
                        f"{dtype} ({size / 2**20:.0f} MiB), {processes} processes, rank {rank}: peak "
                        f"{peak / 2**20:.0f} MiB ({peak / size:.2f} of the model), then {left / 2**20:.0f} MiB",
                        flush=True,
                    )
    if arguments.json:
        about = environment(0, CPU, 1, time.strftime("%Y-%m-%d"))
        write_json(arguments.json, {"rows": rows, "environment": about})


if __name__ == "__main__":
    main()
