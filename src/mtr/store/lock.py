"""One run at a time in a folder: a lock that names its holder and does not outlive it.

    .mtr-lock   {"host": ..., "boot": ..., "pid": ..., "started": ...}, touched every 15 seconds while the run lasts

The kernel's lock on the file (`flock`) decides where it can: it ends with the process, however that ends. Storage may
have none, or not share it between hosts. Then a holder on this machine is looked up among its processes, and one on
another host counts as alive until its lock has not been touched for three minutes by the clock of the storage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mtr.errors import SaveError, UserError

NAME = ".mtr-lock"
_BEAT = 15.0
"""Seconds between two signs of life."""
STALE = 180.0
"""Seconds without one after which a lock of another host is taken over: NFS may show a touch a minute late."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """Held from `take` to `release`. The folder is created for it, and removed again if nothing was put into it."""

    def __init__(self, folder: Path, problem: str | None = None) -> None:
        """
        Args:
            problem: what it means that another process holds the lock; by default, for the output_dir of a run.
        """
        self._problem = problem or f"training.output_dir: another run is at work in {folder}"
        self._folder = folder
        self._path = folder / NAME
        self._file: int | None = None
        self._created: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """
        Raises:
            UserError: another run holds it; the message names its host and process.
            SaveError: the folder cannot be written.
        """
        try:
            self._create_folder()
            while self._file is None:
                self._file = self._try_to_take()
            self._sign()
        except OSError as error:
            self.release()
            raise SaveError(f"{self._folder} cannot be written: {error.strerror or error}") from None
        except UserError:
            self._remove_created()
            raise
        os.register_at_fork(after_in_child=self._forget)  # no data worker keeps the lock of a run that was killed
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Once more is harmless."""
        self._ended.set()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = None
        self._remove_created()

    def _create_folder(self) -> None:
        missing = [path for path in (self._folder, *self._folder.absolute().parents) if not path.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._created = [path.absolute() for path in missing]

    def _remove_created(self) -> None:
        """Folders that this lock created and nothing was put into."""
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = []

    def _try_to_take(self) -> int | None:
        """The open file, locked; None if it was removed meanwhile, so that it is worth another try."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            holder = _read(file)
            if _is_held(file, self._folder, holder):
                raise UserError(f"{self._problem}: {_describe(holder, file)}")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def _sign(self) -> None:
        assert self._file is not None
        text = json.dumps({**_own(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _forget(self) -> None:
        """In a forked child, which is not the holder."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None
        self._created = []


def _own() -> dict[str, Any]:
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot: process ids are used again. None where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(file: int) -> dict[str, Any]:
    """Who holds the lock; empty if it was being written when its holder died."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _lock(file: int) -> bool | None:
    """Whether the kernel gave us its lock; None if this storage has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def is_at_work(folder: Path) -> bool:
    """Whether a process seems to hold the lock of a folder, told without touching anything: by the machine's own clock,
    and not by the kernel's lock.
    """
    if not (path := folder / NAME).is_file():  # reading a pipe may never end
        return False
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _is_alive(_read(file), lambda: time.time() - os.fstat(file).st_mtime)
    finally:
        os.close(file)


def _is_held(file: int, folder: Path, holder: dict[str, Any]) -> bool:
    locked = _lock(file)
    if locked is False:
        return True
    if locked and holder.get("boot") == _own()["boot"]:
        return False
    return _is_alive(holder, lambda: _age(file, folder))


def _is_alive(holder: dict[str, Any], age: Callable[[], float]) -> bool:
    """
    Args:
        age: seconds since the lock was touched last.
    """
    own = _own()
    if not holder:
        return False
    if holder.get("boot") == own["boot"]:
        return _lives(holder)
    if holder.get("host") == own["host"] != "localhost":
        return False  # this machine, before it was started again
    return age() < STALE


def _lives(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return holder.get("started") == _started(int(holder["pid"]))


def _age(file: int, folder: Path) -> float:
    """Seconds since the lock was touched last, by the clock of the storage that the folder is on."""
    probe = folder / f"{NAME}.{os.getpid()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - os.fstat(file).st_mtime


def _describe(holder: dict[str, Any], file: int) -> str:
    if not holder:
        return "it has just begun; wait for it or stop it, or name another folder"
    here = holder.get("boot") == _own()["boot"] or holder.get("host") == socket.gethostname()
    where = "this machine" if here else holder.get("host")
    seen = max(0.0, time.time() - os.fstat(file).st_mtime)
    return (
        f"process {holder.get('pid')} on {where}, since {holder.get('since')}, "
        f"last seen {seen:.0f} seconds ago; wait for it or stop it, or name another folder"
        + ("" if here else f" (if it is gone, its lock is taken over {STALE:.0f} seconds after it was last seen)")
    )
