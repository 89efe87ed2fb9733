"""Claims: the commands start fast; `--json` needs no file; a wrong option is one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import WITHOUT_HEAVY_IMPORTS, check_refused
from support.paths import ROOT

from mtr import __version__
from mtr.__main__ import with_json_target

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "train verify bench inspect audit"),
        (["train", "--help"], 0, "--resume --overwrite"),
        (["verify", "-h"], 0, "--conversations --dtype --attention --json"),
        (["bench", "--help"], 0, "--conversations --repeats --json --plot"),
        (["inspect", "--help"], 0, "--index --all --json --verify"),
        (["audit", "--help"], 0, "RECIPE|TOKENIZER --rows --json"),
        (["--version"], 0, f"mtr {__version__}"),
        (["train", "none.yaml"], 2, "error: none.yaml: no such recipe file"),
    ],
)
def test_help_and_a_misspelt_recipe_are_there_at_once(arguments: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY_IMPORTS, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == code, done.stderr
    shown = done.stderr if code else done.stdout
    assert [word for word in words.split() if word not in shown] == []


def test_the_module_runs_as_the_console_script_does() -> None:
    done = subprocess.run([sys.executable, "-m", "mtr", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mtr {__version__}\n", "")


def test_no_command_shows_the_help(mtr: Mtr) -> None:
    code, out, err = mtr()
    assert "Usage" in out + err
    assert code in (0, 2)


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        ("verify r.yaml --json", "verify r.yaml --json -"),
        ("verify --json r.yaml", "verify --json - r.yaml"),
        ("verify --json r.yml", "verify --json - r.yml"),
        ("bench r.yaml --json --repeats 2", "bench r.yaml --json - --repeats 2"),
        ("bench r.yaml --json training.seed=1", "bench r.yaml --json - training.seed=1"),
        ("bench r.yaml --json out.json", "bench r.yaml --json out.json"),
        ("bench --json out.json r.yaml", "bench --json out.json r.yaml"),
        ("verify r.yaml --json -", "verify r.yaml --json -"),
        ("verify r.yaml --json=out.json", "verify r.yaml --json=out.json"),
        ("verify r.yaml", "verify r.yaml"),
        ("inspect r.yaml --json", "inspect r.yaml --json"),
        ("inspect --json r.yaml", "inspect --json r.yaml"),
        ("", ""),
    ],
)
def test_json_stands_with_or_without_its_file(arguments: str, spelled: str) -> None:
    assert with_json_target(arguments.split()) == spelled.split()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{recipe}", "--nonsense"],
        ["train"],
        ["verify", "{recipe}", "--conversations", "0"],
        ["verify", "{recipe}", "--conversations", "few"],
        ["inspect", "{recipe}", "--index", "-1"],
        ["bench", "{recipe}", "--repeats", "0"],
        ["verify", "{recipe}", "--dtype", "int8"],
        ["verify", "{recipe}", "--attention", "flash"],
        ["inspect", "{recipe}", "--index", "100000"],
        ["inspect", "{recipe}", "--index", "100000", "--json"],
        ["verify", "{recipe}", "data.train=/none.jsonl"],
        ["bench", "{recipe}", "model.name_or_path=/none"],
    ],
)
def test_a_wrong_option_is_one_line_too(mtr: Mtr, write_recipe: Write, arguments: list[str]) -> None:
    recipe = str(write_recipe())
    check_refused(mtr(*(argument.format(recipe=recipe) for argument in arguments)))


def test_the_console_script_is_the_function_tested_here() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mtr": "mtr.__main__:main"}
    assert project["version"] == __version__
