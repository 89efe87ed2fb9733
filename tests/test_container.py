"""Claims: the Dockerfile copies what there is and no more, asks for the torch of pyproject.toml, runs as a plain user;
the dev container installs as scripts/test does.
"""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatchcase

from support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(kind: str) -> list[str]:
    """The arguments of an instruction, wherever it is used."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{kind} (.+)$", joined, re.MULTILINE)


def copied() -> list[str]:
    return [name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]]


def test_what_is_copied_exists_and_is_let_through() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything else is left out"
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    assert set(copied()) == let_through == {"pyproject.toml", "README.md", "LICENSE", "src"}
    assert all((ROOT / name).exists() for name in copied())
    assert not any(fnmatchcase(".env", name) or fnmatchcase(".git", name) for name in let_through)


def test_a_wheel_can_be_built_of_it() -> None:
    """The build needs the readme, the licence and the package that pyproject.toml names."""
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"}
    assert needed <= set(copied())


def test_torch_and_extras_are_those_of_the_project() -> None:
    (asked,) = re.findall(r'"(torch[^"]+)"', DOCKERFILE)
    assert asked in PROJECT["dependencies"]
    (named,) = re.findall(r"EXTRAS=([a-z,]+)", DOCKERFILE)
    assert set(named.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_it_runs_the_command_as_a_plain_user_and_holds_no_secret() -> None:
    (user,) = instructions("USER")
    assert user == "$USER_ID"
    assert "USER_ID=1000" in instructions("ARG")
    assert json.loads(instructions("ENTRYPOINT")[0])[0] in PROJECT["scripts"]
    assert not re.search(r"(?i)token|password|secret|api_key", DOCKERFILE)
    assert instructions("ARG")[0].startswith("BASE="), "the base is the builder's choice"


def test_the_dev_container_installs_as_the_scripts_do() -> None:
    config = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    command = config["postCreateCommand"]
    assert "install_mtr" in command
    assert "install_mtr()" in (ROOT / "scripts" / "environment").read_text()
    assert 'install_mtr ".[test]"' in command
    assert "install_mtr '.[test]'" in (ROOT / "scripts" / "test").read_text()
