"""Claims: the public names and their arguments are these; `import mtr` loads nothing; what docs/api.md and examples/
show runs.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.paths import QUICKSTART, ROOT

import mtr

DOCUMENT = ROOT / "docs" / "api.md"
REQUIRED = inspect.Parameter.empty

NAMES: dict[str, dict[str, Any]] = {
    "TreeBuilder": {
        "tokenizer": REQUIRED,
        "revision": None,
        "format": "auto",
        "messages": "messages",
        "tools": "tools",
        "columns": None,
        "on_bad_row": "error",
        "template": None,
        "thinking": None,
        "history": "as_data",
        "train_on": "all",
        "date": None,
        "weighting": "token",
        "max_length": 4096,
        "max_tokens": "auto",
        "overlong": "drop",
    },
    "TreeCollator": {"pad_to_multiple_of": None},
    "TreeTrainerMixin": {"model": None, "args": None, "options": REQUIRED},
    "UserError": {},
    "count_turns": {"trees": REQUIRED},
    "load": {
        "name_or_path": REQUIRED,
        "revision": None,
        "dtype": "auto",
        "attention": "auto",
        "max_length": None,
        "device": "cpu",
        "trust_remote_code": False,
    },
    "tree_attention": {"model": REQUIRED, "attention": "auto", "max_length": None},
}
"""Each with its arguments and their defaults."""
POSITIONAL = {"tokenizer", "pad_to_multiple_of", "trees", "name_or_path", "model", "args"}
"""Arguments that may be given without their names."""


def test_the_names_are_these() -> None:
    assert sorted(mtr.__all__) == sorted(NAMES)
    assert set(NAMES) | {"__version__"} <= set(dir(mtr))
    for name in NAMES:
        assert re.search(rf"\b{name}\b", str(mtr.__doc__)) or name == "UserError", "say in mtr.__doc__ what it is for"
        assert f"`mtr.{name}" in DOCUMENT.read_text(), "describe it in docs/api.md"
        assert inspect.getdoc(getattr(mtr, name))
    with pytest.raises(AttributeError, match="module 'mtr' has no attribute 'TreeBilder'"):
        mtr.TreeBilder  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if name != "UserError"])
def test_the_arguments_are_these(name: str) -> None:
    parameters = inspect.signature(getattr(mtr, name)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == NAMES[name]
    named = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert {key for key, parameter in parameters.items() if parameter.kind not in named} == POSITIONAL & set(
        NAMES[name]
    )


def test_importing_mtr_loads_nothing() -> None:
    script = "import sys, mtr; dir(mtr); mtr.UserError; print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "mtr.errors" in found
    assert not {"torch", "numpy", "transformers", "datasets", "pydantic", "mtr.integrations"} & set(found)


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python code of a document, and the lines that it begins at."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.fixture
def beside_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes, and caches that go with it."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_document_runs(beside_recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    names: dict[str, Any] = {"__name__": "document"}
    code = blocks(DOCUMENT.read_text())
    assert len(code) >= 7
    for line, block in code:
        exec(compile("\n" * line + block, str(DOCUMENT), "exec"), names)
    shown = capsys.readouterr().out
    assert "142 {} {} {}" in shown
    assert "tokens in trees" in shown
    assert names["counts"].turns == 142
    assert names["loss"] > 0


@pytest.mark.parametrize("example", ["transformers_trainer", "trl_sft"])
def test_the_examples_run(
    example: str, beside_recipes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()[:8]
    data = beside_recipes / "rows.jsonl"
    data.write_text("".join(f"{row}\n" for row in rows))
    asked = ["--max-steps", "1", "--data", str(data), "--split", "train[:8]", "--output-dir", "out"]
    asked += ["--eval", str(data)] if example == "transformers_trainer" else []
    monkeypatch.setattr("sys.argv", [example, *asked])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "'loss'" in out or "train_loss" in out
    saved = beside_recipes / "out"
    name = "config.json" if example == "transformers_trainer" else "adapter_config.json"
    assert "mtr" not in json.loads((saved / name).read_text()).values()
