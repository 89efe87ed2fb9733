"""Trains over trees as a process of several: `python -m support.tree_trainer MODEL FOLDER` under torch's launcher.

The main process writes FOLDER/losses.json: of `transformers.Trainer`, which counts labels, and of the mixin with
weights that are no whole numbers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import transformers

import mtr
from support.integrations import arguments, dataset, losses, quickstart_rows

WEIGHTS = {"weight": 0.37}


class MixedTrainer(mtr.TreeTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    pass


def main(model: str, folder: Path) -> None:
    found = {}
    for name, kind, changes in (("counted", transformers.Trainer, {}), ("mixin", MixedTrainer, WEIGHTS)):
        # two batches of a row on each of two processes make a step of four
        args = arguments(transformers.TrainingArguments, folder / "out", accumulation=2, max_steps=5)
        args.per_device_train_batch_size = 1
        trees = dataset(quickstart_rows(20, **changes))
        trainer = kind(model=mtr.load(model), args=args, train_dataset=trees, data_collator=mtr.TreeCollator())
        found[name] = losses(trainer)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
