"""What makes tests faster and changes nothing that they see; each process that runs tests calls `speed_up` once."""

from __future__ import annotations

import functools
import gc
import os
from typing import Any

import jinja2
import typer


def speed_up() -> None:
    typer.main.get_command = functools.cache(typer.main.get_command)  # one tree of commands for all calls of `main`
    _compile_once(jinja2.Environment)  # PEFT's model card, which every checkpoint has
    os.fsync = _nothing  # nobody cuts the power; what is killed keeps what it wrote


class Freezer:
    """What imports made stays, so the garbage collector, which took a seventh of the time, need not look at it."""

    EVERY = 100
    """Tests, which import more."""

    def __init__(self) -> None:
        self.tests = 0

    def pytest_collection_finish(self) -> None:
        self._freeze()

    def pytest_runtest_logfinish(self) -> None:
        self.tests += 1
        if self.tests % self.EVERY == 0:
            self._freeze()

    def _freeze(self) -> None:
        gc.collect()
        gc.freeze()


def _nothing(fd: Any) -> None:
    pass


def _compile_once(kind: Any) -> None:
    """Templates of the environment that jinja shares among those that ask for none of their own."""
    compile_, compiled = kind.compile, functools.cache(lambda environment, source: compile_(environment, source))

    def compile_once(self: Any, source: Any, *arguments: Any, **options: Any) -> Any:
        if self.shared and isinstance(source, str) and not arguments and not options:
            return compiled(self, source)
        return compile_(self, source, *arguments, **options)

    kind.compile = compile_once
