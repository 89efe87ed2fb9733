"""The files that a source of data names: one, those that match a pattern, or those in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtr.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def check_source(name: str) -> None:
    """
    Raises:
        UserError: there is no such file, no file that matches, no data file in the folder, or it is of no known kind.
    """
    path = Path(name)
    if is_pattern(name) and not path.exists():
        if next(files_matching(name), None) is None:
            raise UserError(f"data: no file matches {name}")
    elif path.is_dir():
        if not is_saved_by_datasets(path) and next(files_in(path), None) is None:
            raise UserError(f"{path}: no data file in this folder ({', '.join(SUFFIXES)})")
    elif path.is_file():
        check_kind(path)
    elif path.is_absolute() or name.startswith((".", "~")) or data_suffix(path) or name.count("/") > 1:
        raise UserError(f"data: no such file: {name}")


def is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def files_matching(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    base = Path(path.anchor) if path.is_absolute() else Path()
    try:
        yield from (found for found in base.glob(str(path.relative_to(path.anchor))) if found.is_file())
    except ValueError as error:  # `**` as a part of a name
        raise UserError(f"data: {pattern} is no pattern: {error}") from None


def is_saved_by_datasets(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def files_in(folder: Path) -> Iterator[Path]:
    """The data files in a folder and the folders in it, but for hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    yield from (path for path in files if data_suffix(path))


def check_kind(path: Path) -> None:
    """
    Raises:
        UserError: a file's name is that of no kind of data.
    """
    suffix = data_suffix(path)
    if suffix is None or (path.suffix in COMPRESSED and suffix in (".parquet", ".arrow")):
        raise UserError(
            f"{path}: unknown file type; data files are {', '.join(SUFFIXES)} "
            f"(text files may be compressed: {', '.join(COMPRESSED)})"
        )


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file, without that of its compression; None for another file."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
