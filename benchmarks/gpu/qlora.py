"""An 8B model trained in 4 bits through `mtr train`: random weights in bfloat16 are written to a temporary folder (16
GB), which the run then reads and quantizes as it would a user's.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil

from gpu.rehearsal import on_device
from gpu.results import Case, Measured, Results, UnavailableError
from gpu.setting import BENCHMARKS, Size, shape_config
from gpu.training_runs import train_model, write_model
from mtr.bench.synthetic import Shape

MODEL = "qwen3-8b"
TURNS = 8
STEPS = 4


def run(results: Results, size: Size) -> None:
    case: Case = {"model": MODEL, "load_in_4bit": True, "max_tokens": size.tokens}
    results.run(case, functools.partial(measure, size))


def measure(size: Size) -> Measured:
    """
    Raises:
        UnavailableError: there is no bitsandbytes.
    """
    overrides = [f"sequence.max_length={size.tokens}", f"sequence.max_tokens={size.tokens}"]
    if on_device("4-bit weights (the model was trained in its own dtype in their place)"):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UnavailableError("bitsandbytes is not installed: pip install 'mtr[qlora]'")
        overrides.append("model.load_in_4bit=true")
    folder = write_model(shape_config(MODEL, size), size)
    try:
        recipe = BENCHMARKS.parent / "recipes" / f"{MODEL}.yaml"
        return train_model(folder, recipe, Shape(TURNS, *size.shape), *overrides, steps=STEPS)
    finally:
        shutil.rmtree(folder.parent)
