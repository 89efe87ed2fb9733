"""Claims: `--help` of every command says what it does and needs, has examples whose options exist, fits 80 columns with
and without colour, and imports nothing heavy; Tab completes the keys of a recipe and their values.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import pytest
import typer
from support.commands import WITHOUT_HEAVY_IMPORTS
from typer.testing import CliRunner

import mtr.__main__
from mtr.__main__ import app, with_json_target
from mtr.cli import help as help_module
from mtr.cli.completion import offers
from mtr.cli.help import Command

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
ALL = ("", *COMMANDS)
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "peft",
    "accelerate",
    "pyarrow",
    "numpy",
    "mtr.recipe.sections",
}


def shown(name: str, monkeypatch: pytest.MonkeyPatch, plain: bool) -> str:
    """The help in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setattr(help_module, "is_plain", lambda: plain)
    monkeypatch.setattr(app, "rich_markup_mode", None if plain else "rich")
    result = CliRunner().invoke(app, [*name.split(), "--help"], color=False)
    assert result.exit_code == 0, result.output
    return result.output


def examples(command: Any) -> list[str]:
    """Its examples without their comments."""
    text = getattr(sys.modules[command.callback.__module__], "EXAMPLES", "")
    return [line.partition(" # ")[0].strip() for line in text.splitlines() if line.strip().startswith("mtr ")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("plain", [False, True], ids=["rich", "plain"])
def test_help_fits_80_columns_and_shows_its_examples_as_typed(
    name: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(name, monkeypatch, plain)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert not re.search(r"<bool>|\[/?dim\]|\x08", text), "markup and types are not for people"
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for example in examples(COMMANDS.get(name, GROUP)):
        assert any(line.startswith(" ".join(example.split())) for line in lines), f"{example} is broken"


@pytest.mark.parametrize("name", ALL)
def test_a_command_has_examples_and_says_what_it_needs(name: str) -> None:
    command = COMMANDS.get(name, GROUP)
    assert 2 <= len(examples(command)) <= 8
    if name:
        assert isinstance(command, Command)
        does, *needs = str(command.help).split("\n\n")
        assert len(does) < 120
        assert needs


@pytest.mark.parametrize("name", ALL)
def test_the_options_of_the_examples_exist(name: str) -> None:
    for example in examples(COMMANDS.get(name, GROUP)):
        words = shlex.split(re.split(r" [|>] ", example)[0])[1:]
        used = with_json_target(words)
        COMMANDS[used[0]].make_context(used[0], [word for word in used[1:] if word != "--help"], resilient_parsing=True)
        known = {
            option for parameter in COMMANDS[used[0]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in used[1:] if word.startswith("--")}
        assert given - {"--help"} <= known, example


def test_help_is_there_in_half_a_second_without_heavy_imports() -> None:
    code = (
        "import sys, mtr.__main__, typer.main\n"
        "group = typer.main.get_command(mtr.__main__.app)\n"
        "for command in (group, *group.commands.values()):\n"
        "    command.get_help(command.make_context('mtr', [], resilient_parsing=True))\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    before, began = os.times(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after, wall = os.times(), time.monotonic() - began
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{seconds:.2f} s of the processor, {wall:.2f} s")
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < 0.5 + 0.05 * len(ALL), "one import, and the help of every command"


@pytest.mark.parametrize(
    ("incomplete", "completed"),
    [
        ("training.le", ["training.learning_rate=", "training.learning_rate=0.0002"]),
        ("train_", ["train_on=", "train_on=all"]),
        ("training.eval", ["training.eval_steps=", "training.eval_steps=null"]),
        ("training.output", ["training.output_dir="]),
        ("lora.use_", ["lora.use_rslora=", "lora.use_dora="]),
        ("data.filter.max", ["data.filter.max_turns=", "data.filter.max_messages="]),
        ("data.tr", ["data.train="]),
        ("training.parallel=", ["training.parallel=ddp", "training.parallel=fsdp2"]),
        (
            "training.gradient_checkpointing=f",
            ["training.gradient_checkpointing=false", "training.gradient_checkpointing=full"],
        ),
        ("model.load_in_4bit=t", ["model.load_in_4bit=true"]),
        ("training.report_to=w", ["training.report_to=wandb"]),
        ("training.seed=", []),
        ("nothing.", []),
    ],
)
def test_tab_completes_keys_and_values(incomplete: str, completed: list[str]) -> None:
    assert [override for override, _ in offers(incomplete)] == completed


def test_tab_completes_values_in_bash_which_splits_at_the_sign() -> None:
    assert offers_of("", "training.parallel") == offers_of("", "training.parallel", "=") == ["ddp", "fsdp2"]
    assert len(offers_of("", "training.seed=1")) > 50
    assert offers_of("f", "training.seed=1", "training.parallel", "=") == ["fsdp2"]


def offers_of(incomplete: str, *before: str) -> list[str]:
    return [value for value, _ in offers(incomplete, before)]


def test_the_shell_asks_for_completions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mtr"])
    monkeypatch.setenv("_MTR_COMPLETE", "complete_bash")
    for words, completed in {
        "training.le": ["training.learning_rate=", "training.learning_rate=0.0002"],
        "training.seed = 1 training.parallel = f": ["fsdp2"],
        "training.parallel =": ["ddp", "fsdp2"],
    }.items():
        monkeypatch.setenv("COMP_WORDS", f"mtr train r.yaml {words}")
        monkeypatch.setenv("COMP_CWORD", str(2 + len(words.split())))
        with pytest.raises(SystemExit):
            mtr.__main__.main()
        assert capsys.readouterr().out.split() == completed


def test_json_takes_a_file_where_the_options_of_the_command_say_so() -> None:
    for name, command in COMMANDS.items():
        option = next((one for one in command.params if "--json" in one.opts), None)
        takes_file = option is not None and not option.is_flag
        assert with_json_target([name, "x.yaml", "--json"]) == [name, "x.yaml", "--json", *["-"] * takes_file]
    assert with_json_target(["nothing", "--json"]) == ["nothing", "--json"]


def test_the_schema_is_printed_without_heavy_imports() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_HEAVY_IMPORTS, "schema"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{")
