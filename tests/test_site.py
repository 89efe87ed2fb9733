"""Claims: the documentation builds as a site, strictly (every link leads somewhere, every page is in the menu) and
without anything from elsewhere; the recipe reference is made from the sections; messages in docs/troubleshooting.md
are messages of mtr.
"""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

DOCS = ROOT / "docs"
MESSAGE = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "start.md").write_text("# Start\n\n[gone](nowhere.md) [gone](data.md#nowhere)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "'nowhere.md'" in done.stderr
    assert "'#nowhere'" in done.stderr or "'data.md#nowhere'" in done.stderr


def test_the_site_is_whole(site: Path) -> None:
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert {path.stem for path in site.glob("*.html")} - {"404"} == pages


def test_the_site_fetches_nothing(site: Path) -> None:
    """Links to other sites are for people to follow; the page itself loads nothing from them."""
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"(https?:)?//|<link[^>]+href=\"(https?:)?//(?![^>]*canonical)"
    )
    assert [path.name for path in site.glob("*.html") if loaded.search(path.read_text(encoding="utf-8"))] == []
    assert loaded.search('<script src="https://elsewhere.example/x.js">')


def test_the_recipe_reference_is_that_of_the_sections() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))
    text = script["page"]()
    assert text == (DOCS / "recipe.md").read_text(encoding="utf-8"), "run python scripts/recipe_reference.py"
    assert "| `training.learning_rate` | `2e-4` |" in text


@cache
def said() -> str:
    """All texts in the code, with … where something is filled in."""
    texts = []
    for path in sorted((ROOT / "src" / "mtr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def unsaid(page: str) -> list[str]:
    """Messages that the page explains and no code says."""
    parts = {message: re.split(r" ?… ?", message) for message in MESSAGE.findall(page)}
    return [message for message, texts in parts.items() if any(text.strip(" :;()") not in said() for text in texts)]


def test_messages_that_are_explained_are_said() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(MESSAGE.findall(page)) > 20
    assert unsaid(page) == []
    assert unsaid("| `the template drops its … tool kall` | |") == ["the template drops its … tool kall"]
