"""Shared fixtures: tiny random models of several architectures, rows, recipes, the command line in-process, and
libraries as they are at the start.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import LIBRARY_WARNINGS
from support.leftovers import leftovers, process_state
from support.models import save_tiny_model
from support.paths import QUICKSTART
from support.recipes import quickstart_recipe
from support.speed import Freezer, speed_up

speed_up()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Freezer())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the full matrix too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords:
            for warning in LIBRARY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = process_state()
    yield
    left = leftovers(before, process_state())
    assert not left, "this test leaves what the next one in the process would meet:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("qwen3")` is a folder with a tiny random model of that kind and the quickstart's tokenizer.

    `tokenizer` names another tokenizer folder, and keywords change the config. See ARCHITECTURES for the kinds.
    """
    made: dict[tuple[str, Path, str], Path] = {}

    def make(kind: str, tokenizer: Path = QUICKSTART / "base", **changes: Any) -> Path:
        key = (kind, tokenizer, repr(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            save_tiny_model(kind, tokenizer, folder, **changes)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """`write_recipe(model={...}, ...)` is a recipe file: the quickstart, changed section by section."""
    return functools.partial(quickstart_recipe, tmp_path)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows([row, ...])` is a JSON-lines file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def mtr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`mtr("verify", "recipe.yaml")` runs a command in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from mtr.__main__ import main

        monkeypatch.setattr("sys.argv", ["mtr", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), captured.out, captured.err

    return run


@pytest.fixture
def unswitched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixers of transformers as they are imported, for this test."""
    for module in [m for name, m in sys.modules.items() if name.startswith("transformers.models.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and hasattr(vars(value).get("forward"), "mtr_original"):
                monkeypatch.setattr(value, "forward", value.forward.mtr_original)  # type: ignore[attr-defined]
            elif hasattr(value, "mtr_original"):
                monkeypatch.setattr(module, name, value.mtr_original.__wrapped__)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """torch.compile from the start, for this test."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with dynamo.patch(), functorch.patch():  # what the options were
        yield
