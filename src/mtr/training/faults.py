"""Faults of the machine: packs that do not fit in memory, disks that fill up.

Exit codes of `mtr train` (see also `mtr.errors`):

    0  done                                          3  a checkpoint or a metrics line could not be written
    1  a bug                                         4  no finite loss or gradient in many steps in a row
    2  the recipe, the data or the model has to be   5  a pack does not fit in the device's memory
       fixed                                         6  a process died
    128 + n  stopped by signal n, with a checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mtr.errors import DeviceMemoryError
from mtr.tree.batch import Batch
from mtr.tree.packing import Pack, idle_pack, split_pack


def is_out_of_memory(error: BaseException) -> bool:
    """On CUDA, or a plain allocation on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class PackSplitter:
    """Keeps packs within what has been seen to fit in the device's memory.

    A pack that did not fit is halved, and so is every later one of its size: how a step is packed does not change its
    gradient.
    """

    def __init__(
        self, on_oom: str, rebuild: Callable[[Pack], Batch], process: str = "", single_turns: bool = False
    ) -> None:
        """
        Args:
            on_oom: of the recipe.
            rebuild: makes a batch of a pack.
            process: prefix of messages, where there are several processes.
            single_turns: each pack is one turn, so that there is nothing to split.
        """
        self.splits_packs = on_oom == "split"
        self.idle = rebuild(idle_pack())
        self._rebuild = rebuild
        self._process = process
        self._single_turns = single_turns
        self._limit: int | None = None
        self.splits = 0

    def fit(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same targets in batches within the limit."""
        if self._limit is None:
            return list(batches)
        limit = self._limit
        fitted: list[Batch] = []
        for batch in batches:
            too_large = batch.num_tokens > limit and batch.pack is not None
            fitted += map(self._rebuild, split_pack(batch.pack, limit)) if too_large and batch.pack else [batch]
        return fitted

    def lower(self, failed: Batch) -> None:
        """Half of the batch that did not fit is the new limit.

        Raises:
            DeviceMemoryError: splitting is not asked for, or there is nothing left to split.
        """
        if not self.splits_packs and not self._single_turns:
            raise DeviceMemoryError(
                f"{self._describe(failed)}: lower sequence.max_tokens (packs) or sequence.max_length (turns), "
                f"{_WAYS_OUT}, or set sequence.on_oom to split"
            )
        limit = failed.num_tokens // 2
        parts = split_pack(failed.pack, limit) if failed.pack and not self._single_turns else []
        if all(pack.num_tokens >= failed.num_tokens for pack in parts):
            raise DeviceMemoryError(
                f"{self._describe(failed)}; it holds a single turn, so it cannot be split: lower sequence.max_length, "
                f"{_WAYS_OUT}"
            )
        self._limit = limit
        self.splits += 1

    def _describe(self, batch: Batch) -> str:
        shown = "; ".join(batch.rows[:4]) + (f"; and {len(batch.rows) - 4} more" if len(batch.rows) > 4 else "")
        return (
            f"{self._process}out of memory in a pack of {batch.num_tokens:,} tokens, {len(batch.rows)} "
            f"conversation{'s' if len(batch.rows) > 1 else ''} ({shown})"
        )


_WAYS_OUT = "set training.gradient_checkpointing to true, shard the model with training.parallel: fsdp2"
