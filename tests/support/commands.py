"""What a command that ran in-process left behind."""

from __future__ import annotations


def check_refused(result: tuple[int, str, str], *words: str) -> str:
    """The error of a command: one line, exit code 2, nothing on standard output, and these words in it."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == []
    return err
