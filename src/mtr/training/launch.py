"""`mtr train recipe.yaml --num-processes N`: torch's elastic launcher on one machine.

Several machines: `torchrun --nnodes ... -m mtr train recipe.yaml`, see recipes/launch/. The exit code is that of the
first process that failed.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

from mtr.recipe.existence import check_existence
from mtr.recipe.loading import load_recipe
from mtr.recipe.placement import check_placement
from mtr.recipe.places import located
from mtr.recipe.sections import TrainingSection
from mtr.store.trigger import ask_for_checkpoint

_GRACE = 600
"""Seconds that processes have to finish their step and save after a signal."""


def launch(num_processes: int, recipe: Path, overrides: list[str], options: list[str]) -> int:
    """Start the processes, wait for them, and return the exit code.

    Args:
        options: of `mtr train`, for each process.
    """
    loaded = load_recipe(recipe, overrides)  # a mistake in the recipe is found before anything starts
    with located(recipe, overrides):
        check_existence(loaded, needed="weights")
        check_placement(loaded, recipe)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(_ending(loaded.training)),
    )
    output_dir = Path(loaded.training.output_dir)
    for name in loaded.training.checkpoint_signal:
        signal.signal(signal.Signals[name], lambda *_: ask_for_checkpoint(output_dir))
    try:
        elastic_launch(config, sys.executable)("-m", "mtr", "train", str(recipe), *overrides, *options)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def _ending(training: TrainingSection) -> list[str]:
    """Signals that end the run: torch's launcher would also take a SIGHUP so that asks for a checkpoint only."""
    ending = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", *training.preempt_signal]
    return [name for name in ending if name not in training.checkpoint_signal]
