"""Claims: whatever standard input and output are (closed, a full disk, a reader that has left, an encoding of few
characters), a command ends without a traceback and with a documented code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def shell(line: str) -> tuple[int, str]:
    """Exit code and standard error of a line that runs `mtr`."""
    command = f'set -o pipefail; mtr() {{ "{sys.executable}" -m mtr "$@"; }}; {line}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("mtr schema > /dev/full", 3, "error: standard output cannot be written: No space left on device\n"),
        ("mtr --version > /dev/full", 3, "error: standard output cannot be written: No space left on device\n"),
        ("mtr schema | true", 1, ""),
        ("mtr schema >&-", 0, ""),
        ("mtr init --output new.yaml <&- 2>&1 >&- | tail -n 1 >&2", 2, "error: --model and --data must be given"),
    ],
)
def test_a_stream_that_takes_nothing(line: str, code: int, said: str, tmp_path: Path) -> None:
    found, err = shell(f'cd "{tmp_path}"; {line}')
    assert found == code, err
    assert err.startswith(said) if said else err == ""
    assert list(tmp_path.iterdir()) == []


def test_characters_that_standard_output_lacks() -> None:
    code = 'import sys; from mtr.__main__ import _prepare_streams; _prepare_streams(); print("f\\u00fcr \\u251c")'
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, b"f\\xfcr \\u251c\n")
