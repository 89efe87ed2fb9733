"""Claims: imports between the packages of mtr point one way, from the command line down to the ground, lazy imports
included; each package's docstring names exactly what it imports; no chain of imports between files is long.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCE = ROOT / "src" / "mtr"
ORDER = (
    "cli",
    "pages",
    "start",
    "report",
    "talk",
    "plan",
    "bench",
    "checks",
    "integrations",
    "training",
    "store",
    "model",
    "recurrence",
    "attention",
    "prepare",
    "tree",
    "chat",
    "data",
    "recipe",
)
"""From top to bottom. A package imports from those after it."""
GROUND = ("files", "console", "errors")
"""Modules that everything may import, and which import none of the packages."""
MOST_LAYERS = 12


def files(source: Path = SOURCE) -> dict[str, Path]:
    """Every module of mtr by its dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = ("mtr", *path.relative_to(source).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(text: str, modules: frozenset[str]) -> Iterator[str]:
    """The modules of mtr that a source imports, wherever in it: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found = name if name in modules else str(node.module)
                if found in modules:
                    yield found
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def imports() -> dict[str, set[str]]:
    modules = files()
    known = frozenset(modules)
    return {
        name: set(imported(path.read_text(), known)) - {name, "mtr"} for name, path in modules.items() if name != "mtr"
    }


def place(module: str) -> str:
    """The package or ground module that a module belongs to; `__main__` is above all of them."""
    return module.split(".")[1] if "." in module else ""


def upward(module: str, others: set[str]) -> list[str]:
    """What a module imports that is not below it."""
    rank = {name: number for number, name in enumerate(("__main__", *ORDER))}
    if place(module) in GROUND:
        return sorted(other for other in others if place(other) not in GROUND)
    below = rank[place(module)]
    return sorted(other for other in others if place(other) not in GROUND and rank[place(other)] < below)


def test_every_module_has_its_place() -> None:
    places = {place(module) for module in files() if module != "mtr"}
    assert places == {"__main__", *ORDER, *GROUND}


def test_imports_point_down() -> None:
    assert {module: found for module, others in imports().items() if (found := upward(module, others))} == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mtr.tree.layout", "from mtr.model.tree_model import TreeModel"),
        ("mtr.data.parsing", "def lazily():\n    import mtr.chat.rendering"),
        ("mtr.recipe.sections", "if TYPE_CHECKING:\n    from mtr.data import mixture"),
        ("mtr.model.probe", "from mtr.training import loop"),
        ("mtr.errors", "from mtr.recipe.sections import Recipe"),
    ],
)
def test_an_upward_import_is_noticed(module: str, line: str) -> None:
    modules = files()
    text = modules[module].read_text()
    known = frozenset(modules)
    assert upward(module, set(imported(text, known))) == []
    assert len(upward(module, set(imported(f"{text}\n{line}\n", known)))) == 1


@pytest.mark.parametrize("package", ORDER)
def test_a_package_says_what_it_imports(package: str) -> None:
    """The line `Imports: ...` of its docstring, and nothing else in it that is code."""
    tree = ast.parse((SOURCE / package / "__init__.py").read_text())
    docstring = ast.get_docstring(tree)
    assert docstring, "what is it for?"
    assert len(tree.body) == 1, "nothing is exported again from another place"
    line = re.search(r"^Imports: ([^.]+)\.$", docstring, re.MULTILINE)
    assert line, "the docstring has no line 'Imports: ...'"
    used = {place(other) for module, others in imports().items() if place(module) == package for other in others}
    written = [name for name in " ".join(line[1].split()).split(", ") if name != "nothing of mtr"]
    assert written == [name for name in (*ORDER, *GROUND) if name in used - {package}]


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports between files, from the top.

    Raises:
        ValueError: some imports form a circle; it names them.
    """
    chains: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...] = ()) -> list[str]:
        if module in above:
            raise ValueError(f"a circle: {' -> '.join((*above[above.index(module) :], module))}")
        if module not in chains:
            below = [chain(other, (*above, module)) for other in sorted(graph[module])]
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    return max((chain(module) for module in graph), key=len)


def test_no_circle_and_no_long_chain() -> None:
    chain = longest_chain(imports())
    assert len(chain) <= MOST_LAYERS, " -> ".join(chain)


def test_a_circle_and_a_chain_are_noticed() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a circle: b -> c -> b"):
        longest_chain({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_files_and_functions_have_a_size_that_can_be_read() -> None:
    too_long = []
    for module, path in files().items():
        text = path.read_text()
        if (lines := len(text.splitlines())) > 400:
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    too_long.append(f"{module}.{node.name}: {length} lines")
    assert too_long == []
