"""Claims: every command in README.md and docs/ works as it is written, in a folder where its files are there: `my.yaml`
with a tiny model and `chats.jsonl`, `runs/my` and `runs/quickstart` as training left them. Commands that need several
processes, or take long, run with --slow; scripts exist and may be run.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.paths import QUICKSTART, ROOT

Mtr = Callable[..., tuple[int, str, str]]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODEL = "Qwen/Qwen3-8B"
"""What the documents name as a model from the Hub; here, a local folder."""
LONG = ("bench", "verify")
"""Commands that take seconds even with a tiny model."""
FAILS = {"audit": (0, 1)}
"""Exit codes other than 0 that are no failure."""


def commands(page: str) -> list[str]:
    """The commands of a page, without their comments."""
    lines = [line for block in BLOCK.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s)#\s.*$", "", line).strip())]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})
OURS = [command for command in COMMANDS if command.startswith("mtr ")]


def marked(command: str) -> object:
    slow = "--num-processes" in command or command.split()[1] in LONG
    return pytest.param(command, marks=pytest.mark.slow if slow else ())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents name."""
    from mtr.recipe.loading import load_recipe
    from mtr.training.loop import train

    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(QUICKSTART / "base", folder / "model")
    rows = (QUICKSTART / "eval.jsonl").read_text().splitlines()[:20]
    greeting = {"messages": [{"role": "assistant", "content": "A refund?"}, *json.loads(rows[0])["messages"]]}
    (folder / "chats.jsonl").write_text("\n".join([*rows, json.dumps(greeting)]) + "\n")
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "chats.jsonl"), "eval": 0.2},
        "generation": {"conversations": 1, "max_new_tokens": 4},
        "training": {"output_dir": str(folder / "runs" / "my"), "max_steps": 2, "conversations_per_step": 2},
    }
    recipe["training"] |= {"save_steps": 1, "gradient_checkpointing": False}  # type: ignore[operator]
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "recipes").mkdir()
    shutil.copy(folder / "my.yaml", folder / "recipes" / "quickstart.yaml")
    train(load_recipe(folder / "my.yaml"))
    shutil.copytree(folder / "runs" / "my", folder / "runs" / "quickstart")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for recipe in (tmp_path / "my.yaml", tmp_path / "recipes" / "quickstart.yaml", *tmp_path.rglob("runs/*/*.yaml")):
        recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [marked(command) for command in OURS])
def test_a_command_works_as_it_is_written(
    mtr: Mtr, made: Path, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name, *arguments = shlex.split(command.replace(MODEL, str(folder / "model")))
    monkeypatch.setattr("sys.stdin", io.StringIO("Ana has 3 coins.\n"))
    if "--resume" in arguments:  # a run's folder cannot be moved
        monkeypatch.chdir(made)
    if name == "train" and "--resume" not in arguments:
        shutil.rmtree(folder / "runs" / "my")
    if name == "init" and "--output" in arguments:
        (folder / arguments[arguments.index("--output") + 1]).unlink(missing_ok=True)
    code, out, err = mtr(name, *arguments)
    assert code in FAILS.get(name, (0,)), err
    assert "Traceback" not in err
    if name == "train":
        assert (Path("runs") / "my" / "adapter_config.json").exists()
    else:
        assert out or err
    for option in ("--html", "--png", "--plot"):
        if option in arguments:
            assert (folder / arguments[arguments.index(option) + 1]).stat().st_size > 1000


def test_there_are_commands_to_try() -> None:
    assert len(OURS) > 20
    assert {"train", "inspect", "plan", "audit", "init", "chat", "report", "merge"} <= {c.split()[1] for c in OURS}


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("mtr ")])
def test_a_script_is_there(command: str) -> None:
    program = next(part for part in shlex.split(command) if "=" not in part)
    if program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
    elif program.endswith("python"):
        script = next(part for part in shlex.split(command) if part.endswith(".py"))
        assert (ROOT / script).exists()
    else:
        assert program in ("source", "torchrun", "pip", "docker", "mkdocs")
