"""What a command that ran in-process left behind."""

from __future__ import annotations

WITHOUT_HEAVY_IMPORTS = """
import sys
sys.argv = ["mtr", *sys.argv[1:]]
from mtr.__main__ import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "datasets", "tokenizers", "peft", "accelerate", "pyarrow", "numpy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""
"""A script that runs a command, and fails if it imported anything heavy."""


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
