"""Results of a part: one JSON object a line, the case as its key, written as soon as the case is done.

    {"case": {...}, "tokens_per_second": ...}           measured
    {"case": {...}, "error": ..., "traceback": [...]}   failed; the next case goes on

A case that has a line is not measured again. One that ended its process (killed, or hung) is tried once more and then
written down as failed, so that calling a part again and again always comes to an end.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtr.errors import UserError, described
from mtr.files import replace_file, write_json

Case = dict[str, Any]
Measured = dict[str, Any]
TRACEBACK_LINES = 12
ATTEMPTS = 2


class DeviceLostError(Exception):
    """The device answers no more in this process; a new one can go on."""


class UnavailableError(Exception):
    """A case that cannot be had on this machine; the text says why."""


class Results:
    """The file of a part, and how much time is left for it."""

    def __init__(self, path: Path, until: float, retry: bool = False) -> None:
        """
        Args:
            until: on time.monotonic; no case starts later.
            retry: forget cases that failed.
        """
        self.path, self.until = path, until
        self._begun = path.with_suffix(".begun")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, complete = _lines(path)
        if retry:
            lines = [line for line in lines if "error" not in line]
            self._begun.unlink(missing_ok=True)
        if retry or not complete:
            replace_file(path, "".join(write_json(None, line) + "\n" for line in lines))
        self._done = {_key(line["case"]): line for line in lines}
        self.left = 0

    @property
    def failed(self) -> int:
        return sum("error" in line for line in self._done.values())

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self.until

    def has(self, case: Case) -> bool:
        return _key(case) in self._done

    def of(self, case: Case) -> Measured | None:
        """What was written of a case."""
        return self._done.get(_key(case))

    def run(self, case: Case, measure: Callable[[], Measured]) -> None:
        """Measure a case that is not there yet, and write what came of it.

        Raises:
            DeviceLostError: an error has left the device unusable; it is written down.
        """
        if self.has(case):
            return
        if self.time_is_up:
            self.left += 1
            return
        if not self.begin(case):
            self.give_up(case)
            return
        began = time.monotonic()
        try:
            measured = measure()
        except UnavailableError as reason:
            measured = {"skipped": str(reason)}
        except Exception as error:
            measured = failure(error)
        self.write(case, {**measured, "case_seconds": time.monotonic() - began})
        clear_memory()
        if "error" in measured and not device_answers():
            raise DeviceLostError(measured["error"])

    def write(self, case: Case, measured: Measured) -> None:
        line = {"case": case, **measured}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(write_json(None, line) + "\n")
        self._done[_key(case)] = line
        self._begun.unlink(missing_ok=True)
        shown = {key: value for key, value in measured.items() if isinstance(value, (int, float, str))}
        print(json.dumps(case), json.dumps(shown), *measured.get("traceback", []), sep="\n    ", flush=True)

    def give_up(self, case: Case) -> None:
        self.write(case, {"error": f"its process ended {ATTEMPTS} times: killed, or it hung"})

    def begin(self, case: Case) -> bool:
        """Note that a case begins; False if it has ended its process too often."""
        before: dict[str, Any] = json.loads(self._begun.read_text()) if self._begun.exists() else {"case": None}
        times = before["times"] if before["case"] == json.loads(_key(case)) else 0
        if times == ATTEMPTS:
            return False
        replace_file(self._begun, write_json(None, {"case": case, "times": times + 1}))
        return True


def _lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines, and whether all are complete: a process may have been killed while it wrote the last one."""
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    complete = [text for text in texts if text.endswith("\n")]
    return [json.loads(text) for text in complete], len(complete) == len(texts)


def _key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def failure(error: Exception) -> Measured:
    """An error as a result: its text, and where it comes from. Frees what the frames of its traceback hold."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    traceback.clear_frames(error.__traceback__)
    text = f"out of memory: {str(error).splitlines()[0]}" if is_out_of_memory(error) else described(error, 400)
    expected = is_out_of_memory(error) or isinstance(error, UserError)
    return {"error": text, "traceback": [] if expected else lines[-TRACEBACK_LINES:]}


def is_out_of_memory(error: BaseException) -> bool:
    told = isinstance(error, UserError) and "out of memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError)


def clear_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not in use


def device_answers() -> bool:
    """False after an illegal access or a failed assertion on the device, which end all CUDA work of a process."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
