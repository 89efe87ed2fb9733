"""The options of `mtr inspect`, what they ask for together, and which of them exclude each other."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtr.cli.options import PAGES, PICTURES, check_suffix, check_target
from mtr.errors import UserError

if TYPE_CHECKING:
    from mtr.checks.inspect_rows import Choice

MOST_ON_A_PAGE = 1000
"""Rows that `--html` writes at most."""


def _rows(*names: str, **keys: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Which rows", **keys)


def _output(*names: str, **keys: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Output", **keys)


Index = Annotated[int | None, _rows(min=0, metavar="N", help="Row of data.train, counted from 0 in file order.")]
Rows = Annotated[int | None, _rows(min=1, metavar="N", help="How many rows; 1 if not given.")]
Every = Annotated[bool, _rows("--all", help="All of them, whatever --index; as JSON lines unless --html is given.")]
Find = Annotated[str | None, _rows(metavar="TEXT", help="Rows with TEXT in a message, in upper or lower case.")]
Untrained = Annotated[bool, _rows("--untrained", help="Rows with a turn that is not trained.")]
Random = Annotated[bool, _rows("--random", help="In random order, another one each time.")]
Seed = Annotated[int | None, _rows(min=0, metavar="N", help="Of --random: the same order again.")]
Longest = Annotated[bool, _rows("--longest", help="The rows with the most text first.")]
Turn = Annotated[
    int | None, _output(min=0, metavar="N", help="One turn in full: what inference sees, and what is trained.")
]
AsJson = Annotated[bool, _output("--json", help="Print JSON, one object per row.")]
Html = Annotated[Path | None, _output(metavar="FILE", help="Write the rows as a page for a browser.")]
Png = Annotated[Path | None, _output(metavar="FILE", help="Write the mask of the row as a picture.")]
Pager = Annotated[bool, _output("--pager/--no-pager", help="Page long output on a terminal.")]
Verify = Annotated[
    bool,
    _output(
        "--verify",
        help="Prove that each path of the tree is its turn and no turn depends on data.rendering. Exit 1 if not.",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """The options that choose rows, as they are given."""

    index: int | None
    rows: int | None
    every: bool
    find: str | None
    untrained: bool
    random: bool
    longest: bool
    seed: int | None

    def check(self) -> None:
        """
        Raises:
            UserError: options exclude each other.
        """
        looking = {
            "--find": self.find is not None,
            "--untrained": self.untrained,
            "--random": self.random,
            "--longest": self.longest,
        }
        for option, given in looking.items():
            if self.index is not None and given:
                raise _excluded("--index", option, "--index names the row")
        if self.random and self.longest:
            raise _excluded("--random", "--longest", "each is an order of its own")
        if self.every and self.rows is not None:
            raise _excluded("--all", "--rows", "each says how many rows")
        if self.seed is not None and not self.random:
            raise UserError("--seed is for --random; add that, or leave --seed out")
        if self.find is not None and not self.find.strip():
            raise UserError("--find: there is no text to look for")

    def choice(self) -> tuple[Choice, list[str]]:
        """What to look for, and what there is to say of that."""
        from mtr.checks.inspect_rows import Choice

        count = None if self.every else self.rows or 1
        if not (self.find or self.untrained or self.random or self.longest or self.every):
            return Choice(index=self.index or 0, count=count), []
        if not self.random:
            return Choice(None, self.find, self.untrained, "longest" if self.longest else "file", count), []
        seed = secrets.randbelow(10**6) if self.seed is None else self.seed
        notes = [] if self.seed is not None else [f"--random --seed {seed} chooses the same again"]
        return Choice(None, self.find, self.untrained, "random", count, seed), notes


@dataclass(frozen=True)
class Output:
    """What becomes of the rows."""

    turn: int | None
    as_json: bool
    html: Path | None
    png: Path | None
    pager: bool
    prove: bool
    every: bool

    @property
    def plain(self) -> bool:
        """Whether the rows are printed as JSON without roles, which take as long as all the rest."""
        return self.as_json and self.every and self.html is None

    @property
    def to_terminal(self) -> bool:
        return not self.as_json and self.html is None and self.png is None

    def check(self, several: bool) -> None:
        """
        Args:
            several: whether there may be more than one row.

        Raises:
            UserError: options exclude each other, or a file cannot be written.
        """
        for option, path, suffixes in (("--html", self.html, PAGES), ("--png", self.png, PICTURES)):
            if self.turn is not None and path is not None:
                raise _excluded("--turn", option, "a file shows whole rows")
            check_target(option, path)
            check_suffix(option, path, suffixes)
        for option, given in (("--turn", self.turn), ("--png", self.png)):
            if given is not None and several:
                raise UserError(f"{option} is for one row; leave out --rows and --all")


def _excluded(one: str, other: str, why: str) -> UserError:
    return UserError(f"{one} and {other} exclude each other: {why}; leave one out")
