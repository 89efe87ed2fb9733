"""Kill a run, or fill its disk, at chosen file operations, and compare what comes of it with an undisturbed run.

    python scripts/aimed_faults.py --kills 100 --full 20 --json benchmarks/results/aimed-faults.json

An audit hook counts the file operations of a run (open for writing, rename, remove, mkdir, ...) by the moment that
they belong to: the first files, a checkpoint's writing, its rotation, logs, the export, overwriting, a merge. Then each
trial starts the run again and strikes at one of them, the trials spread evenly over all. After a kill the run is
resumed, or merged again; a full disk must end it with exit code 3, gets space again, and the run is resumed.

Every result must be that of the undisturbed run, bit for bit: metrics without times, weights, the merged model. Files
of the user's, beside the run and in its folder, must be unchanged after every trial. The exit code is 1 if anything
differs.

A disk is a tmpfs that is filled to the last byte at the chosen moment, where one can be mounted; else the hook lets the
operation fail as a full disk would.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from kill_test import QUICKSTART, result_of, write_recipe

from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.merge import merge

STEPS = 5
MINE = {"notes.txt": "mine", "plots/loss.svg": "mine", "checkpoint-best/weights.bin": "mine", "merged-notes.md": "mine"}
"""Files that the user keeps in the folder of the run."""
MOMENTS = (
    ("merge", (".merged.partial", "/merged")),
    ("rotation", (".removed.partial",)),
    ("checkpoint", ("checkpoint-",)),
    ("export", (".export.partial", "/adapter_", "/README.md", "/tokenizer", "/chat_template")),
    ("first files", ("mtr-run.json", "/recipe.yaml", "environment.json", ".mtr-lock")),
    ("logs", ("metrics.jsonl", "rejects.jsonl", "generations.jsonl")),
)
"""The moment that an operation belongs to, by what is in its path; the first that fits."""
CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def moment_of(event: str, arguments: tuple[Any, ...], run: str) -> str | None:
    """The moment of a file operation below the folder of the run; None for any other event."""
    writes = (
        event == "open"
        and isinstance(arguments[0], (str, bytes, os.PathLike))
        and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if not (writes or event in CHANGING) or not arguments or isinstance(arguments[0], int):
        return None
    path = os.fsdecode(arguments[0])
    if not path.startswith(run):
        return None
    if event == "os.remove" and "checkpoint-" not in path and ".partial" not in path and ".mtr-lock" not in path:
        return "overwriting"
    return next((name for name, words in MOMENTS if any(word in path for word in words)), None)


def watch(run: Path, strike: Callable[[str, int], None]) -> None:
    """Call `strike` with the moment and the number in it of every file operation of this process from now on."""
    counts: Counter[str] = Counter()
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or os.getpid() != owner:
            return
        moment = moment_of(event, arguments, str(run))
        if moment is None:
            return
        busy = True
        try:
            counts[moment] += 1
            strike(moment, counts[moment])
        finally:
            busy = False

    owner = os.getpid()
    sys.addaudithook(hook)


def child(work: Callable[[], None], log: Path) -> int:
    """Run it in a forked process; returns the exit code, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            work()
            code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Trial:
    """One run in a folder with the user's files in and around it, started, struck and compared."""

    def __init__(self, folder: Path, log: Path) -> None:
        """
        Args:
            folder: on the disk that is filled.
            log: not on it.
        """
        self.folder = folder
        self.run = folder / "run"
        self.recipe = write_recipe(folder)
        raw = yaml.safe_load(self.recipe.read_text())
        raw["training"] |= {"max_steps": STEPS, "save_total_limit": 2, "eval_steps": 3}
        raw["data"]["num_workers"] = 0
        self.recipe.write_text(yaml.safe_dump(raw))
        shutil.copytree(QUICKSTART / "base", folder / "base")
        self.log = log
        self.outside = self.users()

    def users(self) -> dict[str, str]:
        """The user's files with their hashes."""
        around = [
            p for p in self.folder.rglob("*") if p.is_file() and self.run not in p.parents and p.name != "log.txt"
        ]
        inside = [self.run / name for name in MINE if (self.run / name).exists()]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in (*around, *inside) if p.name != "filler"}

    def add_users_files(self) -> None:
        """Once the folder is a run: before that, it would be refused."""
        if (self.run / "mtr-run.json").exists():
            for name, text in MINE.items():
                (self.run / name).parent.mkdir(exist_ok=True)
                (self.run / name).write_text(text)
            self.outside = self.users()

    def start(self, strike: Callable[[str, int], None] | None, overwrite: bool = False) -> int:
        """Train until the end, then merge; what is done already is not done again."""

        def work() -> None:
            if strike is not None:
                watch(self.run, strike)
            if overwrite or not (self.run / "adapter_model.safetensors").exists() or not self.is_done():
                train(load_recipe(self.recipe), resume=not overwrite, overwrite=overwrite)
            if not (self.run / "merged").exists():
                merge(self.run, self.run / "merged", "float32")

        return child(work, self.log)

    def is_done(self) -> bool:
        """The metrics hold the last step, and nothing of an export is half done."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines() if (self.run / "metrics.jsonl").exists() else []
        return any(json.loads(line)["step"] == STEPS for line in lines) and not (self.run / ".export.partial").exists()

    def result(self) -> Any:
        lines, weights = result_of(self.run)
        merged = hashlib.sha256((self.run / "merged" / "model.safetensors").read_bytes()).hexdigest()
        return lines, hashlib.sha256(weights).hexdigest(), merged

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.outside = self.users()


def spread(operations: Counter[str], number: int) -> list[tuple[str, int]]:
    """Targets: each moment in turn, evenly spaced over its operations."""
    moments = sorted(operations)
    targets = []
    for i, moment in enumerate(moments):
        share = number // len(moments) + (i < number % len(moments))
        targets += [(moment, 1 + j * operations[moment] // share) for j in range(share)]
    return targets


Strike = Callable[[str, int], None]
_PROBLEMS = ("ended otherwise", "not resumed", "results that differ", "files of the user's harmed")


def strike_at(
    trial: Trial, targets: list[tuple[str, int]], reference: Any, aim: Callable[[str, int], Strike], code: int
) -> dict[str, Any]:
    """One trial for each target: start, be struck, resume, compare.

    Args:
        aim: makes what strikes at a target.
        code: that a run ends with which is struck.
    """
    struck: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for moment, number in targets:
        overwrite = moment == "overwriting"
        if not overwrite:
            trial.clear()
        elif not trial.run.exists():
            trial.start(None)
        ended = trial.start(aim(moment, number), overwrite)
        (trial.folder / "filler").unlink(missing_ok=True)
        struck[moment] += ended == code
        found["ended otherwise"] += ended not in (0, code)
        harmed = trial.users() != trial.outside
        trial.add_users_files()
        ended = trial.start(None)
        found["not resumed"] += ended != 0
        found["results that differ"] += ended != 0 or trial.result() != reference
        found["files of the user's harmed"] += harmed or trial.users() != trial.outside
    return {"trials": len(targets), "struck": dict(struck), **{key: found[key] for key in _PROBLEMS}}


def killer(moment: str, number: int) -> Strike:
    def strike(now: str, count: int) -> None:
        if (now, count) == (moment, number):
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def filler(trial: Trial, real: bool) -> Callable[[str, int], Strike]:
    def aim(moment: str, number: int) -> Strike:
        full = False

        def strike(now: str, count: int) -> None:
            nonlocal full
            first, full = not full, full or (now, count) == (moment, number)
            if full and first and real:
                take_all(trial.folder / "filler")
            elif full and not real:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return strike

    return aim


def take_all(filler: Path) -> None:
    """All the space that is left."""
    block = b"\0" * (1 << 16)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(block) == len(block):
            pass


@contextlib.contextmanager
def disk() -> Iterator[tuple[Path, bool]]:
    """A folder on a small file system of its own, where one can be mounted."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", name]
        real = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(name), real
        finally:
            if real:
                subprocess.run(["umount", "-l", name], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=14)
    parser.add_argument("--full", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.time()
    with disk() as (folder, real), tempfile.NamedTemporaryFile() as log:
        trial = Trial(folder, Path(log.name))
        operations = count_operations(trial)
        reference = trial.result()
        report: dict[str, Any] = {"operations": dict(operations), "steps": STEPS}
        kills, full = (spread(operations, number) for number in (options.kills, options.full))
        report["kills"] = strike_at(trial, kills, reference, killer, -signal.SIGKILL)
        report["full disks"] = strike_at(trial, full, reference, filler(trial, real), 3)
        report["full disks"]["disk"] = "a tmpfs, filled" if real else "simulated"
        if problems(report):
            print(trial.log.read_text()[-4000:], file=sys.stderr)
    report |= {
        "seconds": round(time.time() - began, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if problems(report) else 0)


def count_operations(trial: Trial) -> Counter[str]:
    """Of an undisturbed run with its merge, and of one that overwrites it."""
    counts: Counter[str] = Counter()
    for overwrite in (False, True):
        file = trial.folder / "counts"

        def note(moment: str, number: int, file: Path = file) -> None:
            with file.open("a") as out:
                out.write(f"{moment}\n")

        code = trial.start(note, overwrite)
        if code:
            sys.exit(f"the undisturbed run ended with {code}:\n{trial.log.read_text()[-3000:]}")
        found = Counter(file.read_text().splitlines())
        counts |= {"overwriting": found["overwriting"]} if overwrite else found
        file.unlink()
    return Counter({moment: number for moment, number in counts.items() if number})


def problems(report: dict[str, Any]) -> int:
    return sum(report[kind][key] for kind in ("kills", "full disks") for key in _PROBLEMS)


if __name__ == "__main__":
    main()
