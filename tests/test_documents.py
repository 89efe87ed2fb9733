"""Claims: every file that README.md, CONTRIBUTING.md, SECURITY.md and docs/ mention exists, and every name in the code
that the documents about the code mention; links lead somewhere, and the table of packages in docs/architecture.md is
that of the packages' docstrings.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCE = ROOT / "src" / "mtr"
DOCUMENTS = (
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
WITH_NAMES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/hybrids.md")
"""Documents about the code; the others also name what belongs to libraries."""

PATH = re.compile(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml))`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
NAME = re.compile(r"\b_?[A-Za-z]\w*_\w+\b|\b[A-Z][a-z]+[A-Z]\w+\b")
PLACEHOLDERS = {"owner/name", "RUN/merged", "runs/chats/merged"}


def missing_files(text: str, folder: Path) -> list[str]:
    """Paths in backticks that are not in the repository, src/mtr, tests or tests/support; links that lead nowhere."""
    without_links = re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)
    paths = set(PATH.findall(without_links)) - PLACEHOLDERS
    places = (ROOT, SOURCE, ROOT / "tests", ROOT / "tests" / "support")
    lost = {path for path in paths if not any((place / path).exists() for place in places)}
    return sorted(lost | {link for link in LINK.findall(text) if not (folder / link).exists()})


@cache
def words() -> frozenset[str]:
    """Every word in the code, the scripts and the project file, and names of files; this file is left out."""
    files = [path for part in ("src", "tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    files += [ROOT / "pyproject.toml", *(path for path in (ROOT / "scripts").iterdir() if path.is_file())]
    texts = (path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    return frozenset(word for text in texts for word in re.findall(r"\w+", text)) | {path.stem for path in files}


def missing_names(text: str) -> list[str]:
    """Names with an underscore or two capitals that are nowhere in the code."""
    return sorted(set(NAME.findall(text)) - words())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    path = ROOT / document
    assert missing_files(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("document", WITH_NAMES)
def test_every_name_of_the_code_exists(document: str) -> None:
    assert missing_names((ROOT / document).read_text(encoding="utf-8")) == []


def test_what_is_gone_is_noticed() -> None:
    text = "`tree/mask.py`, `tree/masks_that_were.py`, [a](README.md), [b](docs/gone.md): `build_batch`, `build_bat`"
    assert missing_files(text, ROOT) == ["docs/gone.md", "tree/masks_that_were.py"]
    assert missing_names(f"{text} TreeModel TreeMidel") == ["TreeMidel", "build_bat", "masks_that_were"]


def test_the_table_of_packages_is_that_of_their_docstrings() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = {
        package: re.findall(r"\w+", names) for package, names in re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", text, re.M)
    }
    ground = {"files", "console", "errors", "nothing of mtr"}
    declared = {}
    for path in SOURCE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        line = re.search(r"^Imports: ([^.]+)\.$", docstring, re.M)
        assert line, path
        names = " ".join(line[1].split()).split(", ")
        declared[path.parent.name] = [name for name in names if name not in ground] or ["nothing"]
    assert table == declared
