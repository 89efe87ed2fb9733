"""Claims: sharded processes have the weights that one process has, whatever transformers and PEFT do to them; only the
first of them reads values, and none of the others ever holds more than a layer of them whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import changed_model
from support.paths import QUICKSTART, ROOT
from torch import Tensor

from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe

Recipes = Callable[..., Path]
Models = Callable[..., Path]
LAYER = 0.25
"""Share of the largest layer in the quickstart's model, with its tied embeddings."""


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


@pytest.fixture
def cases(write_recipe: Recipes, models: Models, tmp_path: Path) -> list[Path]:
    """Recipes whose weights are converted, tied, made anew, in two dtypes, or come from an adapter."""

    def write(name: str, model: Path, dtype: str = "bfloat16", allow_missing: Any = (), **sections: Any) -> Path:
        keys = {"name_or_path": str(model), "dtype": dtype, "allow_missing": list(allow_missing)}
        return write_recipe(model=keys, **sections).rename(tmp_path / f"{name}.yaml")

    base = QUICKSTART / "base"
    first = load_model(load_recipe(write("first", base, lora={"r": 4})), torch.device("cpu"))
    for name, parameter in first.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    first.save_pretrained(str(tmp_path / "adapter"))
    headless = changed_model(models("qwen3"), tmp_path / "headless", without_head)
    return [
        write("whole", base, lora=None),
        write("adapter", base, lora={"r": 4, "init_from": str(tmp_path / "adapter")}),
        write("head", base, lora={"r": 4, "modules_to_save": ["lm_head"]}),
        write("dora", models("llama"), "float32", lora={"r": 4, "use_dora": True}),
        write("anew", headless, "float32", ["lm_head.weight"], lora=None),
        write("experts", models("qwen3_moe"), lora={"r": 4, "target_parameters": ["mlp.experts.down_proj"]}),
        write("sinks", models("gpt_oss"), lora={"r": 4}),
        write("scaled", models("gemma3"), lora={"r": 4}),
    ]


@pytest.mark.distributed
def test_processes_have_the_weights_of_one(cases: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "support.sharded", str(tmp_path), *map(str, cases)]
    path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, report in enumerate(reports):
        assert set(report) == {case.stem for case in cases}
        for name, found in report.items():
            assert found["differing"] == [], (rank, name)
            assert found["places"] == [["cpu"], ["meta"]][rank], name
            assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-2), name
    assert reports[1]["adapter"]["losses"][0] > 0
    for name in ("whole", "adapter"):
        assert reports[1][name]["most_whole"] < LAYER * reports[1][name]["whole"], name
