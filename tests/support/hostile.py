"""Attempts to make mtr lose a file, train something else in silence, hang or fail without a clear word.

An attempt prepares a fresh folder (`Place`), gives the arguments of a command, and says how the command may end. `run`
runs it in this process and lists everything that is wrong with how it ended:

    exit code                 one of those that the attempt allows
    standard error            of an error exactly one line, the last: `error: ` and the words that the attempt names
    both outputs              no traceback, no control characters, not the token in HF_TOKEN
    files                     whatever was there is unchanged, byte for byte, and nothing is new, but for the folders
                              that the attempt allows to be written to
    time                      bounded
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import yaml

from support.paths import QUICKSTART
from support.rows import conversation_row

T = TypeVar("T")
SECRET = "hf_secretHarmSecretHarmSecretHarm"
LONGEST_LINE = 8000
"""Characters of an error: what a user gets wrong may be long, and the message is not."""


class Place:
    """A fresh folder, always of the same path: a working folder with `recipe.yaml`, `rows.jsonl` and a home.

    The recipe trains the quickstart's model for three steps with a checkpoint after each, and writes to `run`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = folder.with_name(f"{folder.name}-kept")
        """Finished runs, by the name of their kind: each is trained once and then copied."""
        self.run = folder / "run"
        self.cleanups: list[Callable[[], None]] = []
        make_writable(folder)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "home").mkdir(parents=True)
        self.rows(*(conversation_row(turns=1 + i % 2, thinking=i % 3 > 0) for i in range(6)))
        self.recipe()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """Rows as JSON lines; a row that is text stands as it is."""
        return self.write(name, "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))

    def recipe(self, name: str = "recipe.yaml", **sections: Any) -> Path:
        raw: dict[str, Any] = {
            "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
            "lora": {"r": 2},
            "data": {"train": str(self / "rows.jsonl"), "shuffle": False},
            "date": "2026-01-31",
            "training": {
                "output_dir": str(self.run),
                "max_steps": 3,
                "conversations_per_step": 2,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "save_steps": 1,
                "save_total_limit": None,
            },
        }
        for section, value in sections.items():
            merged = isinstance(value, dict) and isinstance(raw.get(section), dict)
            raw[section] = {**raw[section], **value} if merged else value
        return self.write(name, yaml.safe_dump(raw))

    def base(self, name: str = "base", without: Sequence[str] = (), **config: Any) -> Path:
        """A copy of the quickstart's model, less some files, with other keys in its config (... leaves a key out)."""
        folder = self / name
        shutil.copytree(QUICKSTART / "base", folder, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)
        if config:
            changed = {**json.loads((folder / "config.json").read_text()), **config}
            kept = {key: value for key, value in changed.items() if value is not ...}
            (folder / "config.json").write_text(json.dumps(kept))
        return folder

    def finished(self, kind: str = "lora", **sections: Any) -> Path:
        """A run of three steps, with a base model of its own beside it: the same, bit for bit, each time.

        Args:
            kind: runs of one kind have the same sections.
        """
        kept = self.kept / kind
        if not kept.exists():
            self.recipe(**{**sections, "model": {"name_or_path": str(self.base()), **sections.get("model", {})}})
            ended = call(self, ["train", "recipe.yaml"])
            assert ended.code == 0, ended.err
            shutil.copytree(self.folder, kept, symlinks=True)
        else:
            shutil.copytree(kept, self.folder, symlinks=True, dirs_exist_ok=True)
        return self.run


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    crash: str = ""
    """An exception that came through, as Python shows it."""
    seconds: float = 0.0
    cpu: float = 0.0
    """Seconds of this process and its children."""

    @property
    def said(self) -> str:
        return self.out + self.err


Prepare = Callable[[Place], Sequence[object]]
"""Does the harm to a fresh place, and returns the arguments of mtr."""
Check = Callable[[Place, Ended], object]
"""Asserts what must hold besides after a command."""


@dataclass(frozen=True)
class Attempt:
    name: str
    prepare: Prepare
    says: tuple[str, ...]
    """Words of the error: the file, row or key, and what is wrong. Without an error, words of the outputs."""
    codes: tuple[int, ...] = (2,)
    writes: tuple[str, ...] = ()
    """Paths in the place that may be written to, with all that is below them."""
    holds: Check | None = None
    meanwhile: Callable[[Place, int], None] | None = None
    """What happens while the command runs, in a process of its own whose id this is given."""
    limits: Callable[[], None] | None = None
    """Called in the process of the command before it starts; it runs in one of its own."""
    seconds: float = 15.0
    """CPU time that it may take."""
    slow: bool = False


def refused(name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """The command ends with exit code 2 before it has written anything."""
    return Attempt(name, prepare, says, **keys)


def stopped(name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """The command ends with an error after it has begun: the folder of the run is written to."""
    return Attempt(name, prepare, says, **{"writes": ("run",), **keys})


def done(name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """The command does what it should; `holds` says what that is."""
    return Attempt(name, prepare, says, **{"codes": (0,), "writes": ("run",), **keys})


def either(name: str, prepare: Prepare, *says: str, **keys: Any) -> Attempt:
    """The command does what it should, as `holds` says, or is refused with these words: both are right."""
    return Attempt(name, prepare, says, **{"codes": (0, 2), "writes": ("run",), **keys})


# --- commands ---------------------------------------------------------------------------------------------------------


def command(name: str, *arguments: object, **sections: Any) -> Prepare:
    """A command on the place's recipe; `{place}` in an argument or a text of the recipe is the folder."""

    def prepare(place: Place) -> list[object]:
        place.recipe(**_placed(sections, place))
        return [name, "recipe.yaml", *_placed(list(arguments), place)]

    return prepare


train = functools.partial(command, "train")
inspect = functools.partial(command, "inspect")
audit = functools.partial(command, "audit")


def after(change: Callable[[Place], object], *prepared: Prepare | str, **sections: Any) -> Prepare:
    """Something is done to the place first; then the prepared command, or `train` with these arguments."""

    def prepare(place: Place) -> Sequence[object]:
        change(place)
        if prepared and callable(prepared[0]):
            return prepared[0](place)
        return train(*prepared, **sections)(place)

    return prepare


def in_turn(*changes: Callable[[T], object]) -> Callable[[T], None]:
    """One change after the other."""

    def change(thing: T) -> None:
        for one in changes:
            one(thing)

    return change


def _placed(value: Any, place: Place) -> Any:
    if isinstance(value, str):
        return value.replace("{place}", str(place.folder))
    if isinstance(value, dict):
        return {key: _placed(item, place) for key, item in value.items()}
    return [_placed(item, place) for item in value] if isinstance(value, list) else value


# --- running ----------------------------------------------------------------------------------------------------------


def run(attempt: Attempt, folder: Path) -> tuple[Ended, list[str]]:
    """Prepare the folder, run the command, and list what is wrong with how it ended."""
    place = Place(folder)
    try:
        arguments = [str(argument) for argument in attempt.prepare(place)]
        before = snapshot(place.folder)
        if attempt.meanwhile or attempt.limits:
            ended = call_apart(place, arguments, attempt)
        else:
            ended = call(place, arguments, attempt.seconds)
        make_writable(place.folder)
        problems = judge(attempt, ended) + differences(before, snapshot(place.folder), attempt.writes)
        if attempt.holds and ended.code == 0 and not ended.crash:
            try:
                attempt.holds(place, ended)
            except AssertionError as error:
                problems.append(f"exit code 0, but {error}")
        return ended, problems
    finally:
        for cleanup in place.cleanups:
            cleanup()


def judge(attempt: Attempt, ended: Ended) -> list[str]:
    problems = []
    if ended.crash:
        return [f"traceback: {ended.crash.strip().splitlines()[-1][:300]}"]
    if ended.code not in attempt.codes:
        problems.append(f"exit code {ended.code}, not {attempt.codes}")
    is_error = ended.code in range(2, 128)
    if is_error:
        problems += judge_error(ended.err)
    if is_error or 2 not in attempt.codes:
        text = ended.err.splitlines()[-1] if is_error and ended.err else ended.said
        problems += [f"{word!r} is not said" for word in attempt.says if word not in text]
    if "Traceback (most recent call last)" in ended.said:
        problems.append("a traceback is shown")
    if SECRET in ended.said:
        problems.append("the token is shown")
    if steering := {c for c in ended.said if _steers(c)}:
        problems.append(f"control characters are shown: {steering}")
    if ended.cpu > attempt.seconds:
        problems.append(f"{ended.cpu:.1f} s of CPU time, more than {attempt.seconds}")
    return problems


def _steers(character: str) -> bool:
    """Whether it moves a cursor, or reorders what is read."""
    is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return is_control or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def judge_error(err: str) -> list[str]:
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or lines[-1] != errors[0] or not err.endswith("\n"):
        return [f"not one line that begins with 'error: ', at the end: {err[-500:]!r}"]
    if len(errors[0]) > LONGEST_LINE:
        return [f"an error of {len(errors[0])} characters"]
    return []


def call(place: Place, arguments: Sequence[str], seconds: float = 60.0) -> Ended:
    """Run `mtr` in this process, in the place, with its home, a token in the environment and no network."""
    out, err = _stream("strict"), _stream("backslashreplace")
    code, crash, began, cpu = 0, "", time.monotonic(), _cpu()
    outputs = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _inside(place, list(arguments)), _time_limit(2 * seconds), outputs[0], outputs[1]:
        try:
            from mtr.__main__ import main

            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code, crash = 1, traceback.format_exc()
    return Ended(code, _text(out), _text(err), crash, time.monotonic() - began, _cpu() - cpu)


def call_apart(place: Place, arguments: Sequence[str], attempt: Attempt) -> Ended:
    """The same in a forked process, with limits, and with what happens meanwhile."""
    result = place.folder.with_name("ended.json")
    result.unlink(missing_ok=True)
    child = start(place, arguments, result, attempt.limits)
    try:
        if attempt.meanwhile:
            attempt.meanwhile(place, child)
        until(lambda: has_ended(child), attempt.seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if result.exists() and (written := result.read_text()):
        return Ended(**json.loads(written))
    return Ended(128 - status if status < 0 else status, "", "")


def start(
    place: Place, arguments: Sequence[str], result: Path | None = None, limits: Callable[[], None] | None = None
) -> int:
    """Fork a process that runs the command; its id."""
    import mtr.training.loop  # noqa: F401  once here, not in each process

    child = os.fork()
    if child:
        return child
    try:
        file = result.open("w") if result else None  # before the limits
        if limits:
            limits()
        ended = call(place, arguments, 60)
        if file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            file.write(json.dumps(vars(ended)))
            file.close()
    finally:
        os._exit(0)


def until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Wait until something holds; whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def has_ended(child: int) -> bool:
    """Whether a process is over; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextlib.contextmanager
def _inside(place: Place, arguments: list[str]) -> Iterator[None]:
    environment = {"HOME": str(place / "home"), "HF_TOKEN": SECRET, "COLUMNS": "200"}
    removed = {"HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "LOCAL_RANK", "RANK"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name in removed & os.environ.keys():
            del os.environ[name]
        stack.enter_context(mock.patch.object(sys, "argv", ["mtr", *arguments]))
        stack.enter_context(contextlib.chdir(place.folder))
        stack.enter_context(mock.patch("socket.getaddrinfo", side_effect=OSError("no network in this trial")))
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        yield


class _TooSlow(BaseException):
    """Not an Exception, so that nothing catches it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """By the clock, and without SIGALRM, which mtr uses."""

    def stop(*_: object) -> None:
        raise _TooSlow(f"no end after {seconds:.0f} s")

    caller = threading.get_ident()
    watch = threading.Timer(seconds, lambda: signal.pthread_kill(caller, signal.SIGUSR2))
    watch.daemon = True
    before = signal.signal(signal.SIGUSR2, stop)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        signal.signal(signal.SIGUSR2, before)


def _stream(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("utf-8")


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- files ------------------------------------------------------------------------------------------------------------

Snapshot = dict[str, str]
"""What each path is: `folder`, a link's target, or a file's hash."""


def snapshot(folder: Path) -> Snapshot:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def differences(before: Snapshot, after: Snapshot, allowed: Sequence[str] = ()) -> list[str]:
    """What was removed, changed or added outside the allowed paths, in words."""

    def is_allowed(name: str) -> bool:
        return any(name == path or name.startswith(f"{path}/") for path in allowed)

    changed = [name for name in {**before, **after} if before.get(name) != after.get(name) and not is_allowed(name)]
    verbs = {name: "new" if name not in before else "gone" if name not in after else "changed" for name in changed}
    return [f"{name} is {verb}" for name, verb in verbs.items()][:5]


def make_writable(folder: Path) -> None:
    """Give the permissions back that an attempt took away."""
    for path in (folder, *folder.rglob("*")) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def without_privileges() -> None:
    """Let permissions count, for root too: give up the capabilities that override them."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0


# --- what must hold ---------------------------------------------------------------------------------------------------

TIMES = ("seconds", "per_second", "memory", "mfu")


def result_of(run_folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The metrics, without times and memory, and the weights; no metrics if there is no such file."""
    path = run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]
    return kept, (run_folder / "adapter_model.safetensors").read_bytes()


def is_the_finished_run(place: Place, _: Ended, kind: str = "lora") -> None:
    """The folder holds what the uninterrupted run left, bit for bit."""
    metrics, weights = result_of(place.run)
    wanted_metrics, wanted_weights = result_of(place.kept / kind / "run")
    assert metrics == wanted_metrics, f"other metrics: {metrics} instead of {wanted_metrics}"[:500]
    assert weights == wanted_weights, "other weights"


def json_lines(ended: Ended) -> list[dict[str, Any]]:
    """Standard output as `mtr inspect --all` writes it."""
    return [json.loads(line) for line in ended.out.splitlines()]


def named(attempts: Sequence[Attempt], kind: str) -> dict[str, Attempt]:
    """The attempts of a kind by their full names."""
    return {f"{kind}: {attempt.name}": replace(attempt, name=f"{kind}: {attempt.name}") for attempt in attempts}
