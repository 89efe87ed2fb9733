"""Claims: two runs are never at work in one folder; a lock whose holder is gone does not stay, whether the process was
killed, the machine was started again, or it was another host's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtr.errors import SaveError, UserError
from mtr.store import lock
from mtr.store.lock import NAME, STALE, RunLock

HOLD = """
import sys, time
from pathlib import Path
from mtr.store.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def wait_for(process: Any) -> None:
    process.wait(timeout=30)


def test_a_second_run_is_refused_and_changes_nothing(holder: Any, tmp_path: Path) -> None:
    before = (tmp_path / "run" / NAME).read_bytes()
    with pytest.raises(UserError, match=f"another run is at work in .*: process {holder.pid} on this machine, since"):
        RunLock(tmp_path / "run").take()
    assert (tmp_path / "run" / NAME).read_bytes() == before


def test_a_second_run_in_this_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path) as first:
        first.take()
        with pytest.raises(UserError, match="another run is at work"), RunLock(tmp_path) as second:
            second.take()
        assert (tmp_path / NAME).exists(), "the second one has not released the first one's lock"
    with RunLock(tmp_path) as third:
        third.take()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_run_is_free(holder: Any, tmp_path: Path, number: signal.Signals) -> None:
    os.kill(holder.pid, number)
    wait_for(holder)
    assert (tmp_path / "run" / NAME).exists()
    with RunLock(tmp_path / "run") as mine:
        mine.take()
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As data workers would, which live on for some seconds when their run is killed."""
    fork = f"import os\nif os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\n{'print'}"
    script = HOLD.replace("print", fork, 1)
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGKILL)
        wait_for(process)
        try:
            take_within(20.0, tmp_path / "run")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def take_within(seconds: float, folder: Path) -> None:
    """The child closes the file when it first runs, which may be after its parent was killed."""
    until = time.monotonic() + seconds
    while True:
        try:
            with RunLock(folder) as mine:
                return mine.take()
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def leave(folder: Path, age: float = 0.0, **holder: Any) -> None:
    """A lock file that nobody holds by the kernel."""
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps({**lock._own(), "since": "noon", **holder}))
    os.utime(folder / NAME, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [
        ({"host": "elsewhere", "boot": "b"}, 20.0, False),
        ({"host": "elsewhere", "boot": "b"}, STALE + 60.0, True),
        ({"boot": "before the power cut"}, 1.0, True),
        ({"pid": 1, "started": "never"}, 1.0, True),
        ({"host": "another container", "pid": 7}, 1.0, True),
    ],
)
def test_who_holds_a_lock_that_the_kernel_has_not(
    tmp_path: Path, holder: dict[str, Any], age: float, free: bool
) -> None:
    leave(tmp_path / "run", age, **holder)
    with RunLock(tmp_path / "run") as mine:
        if free:
            mine.take()
        else:
            with pytest.raises(
                UserError, match=r"process .* on elsewhere, since noon, last seen 2. seconds ago; .*if it is gone"
            ):
                mine.take()


def test_storage_without_locks_falls_back_to_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    leave(tmp_path / "run")
    with pytest.raises(UserError, match="on this machine"):
        RunLock(tmp_path / "run").take()
    leave(tmp_path / "run", started="0")  # the process id was used again
    with RunLock(tmp_path / "run") as mine:
        mine.take()


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00" * 50])
def test_a_torn_lock_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with RunLock(tmp_path) as mine:
        mine.take()


def test_folders_that_nothing_was_put_into_go_again(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b" / "run") as mine:
        mine.take()
        assert (tmp_path / "a" / "b" / "run" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "a" / "b" / "run") as mine:
        mine.take()
        (tmp_path / "a" / "b" / "run" / "x").write_text("result")
    assert (tmp_path / "a" / "b" / "run" / "x").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(SaveError):
        RunLock(tmp_path / "run").take()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    with RunLock(tmp_path) as mine:
        mine.take()
        os.utime(tmp_path / NAME, (0, 0))
        until = time.monotonic() + 20
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_two_runs_of_one_recipe(mtr: Callable[..., tuple[int, str, str]], write_recipe: Any, holder: Any) -> None:
    """Whatever the flags: exit code 2, and the run that is at work is left alone."""
    path = write_recipe()
    for flags in ([], ["--resume"], ["--overwrite"]):
        code, _, err = mtr("train", path, *flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"another run is at work in {path.parent / 'run'}: process {holder.pid}" in err
    assert [file.name for file in (path.parent / "run").iterdir()] == [NAME]
