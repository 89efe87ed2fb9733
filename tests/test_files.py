"""Claims: a file is written whole or not at all: what fails half-way leaves the old file and nothing beside it; a link
stays a link, and a file keeps its permissions.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mtr.files import write_json, written_whole


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def write_half(path: Path, error: type[BaseException]) -> None:
    with written_whole(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("error", [OSError, ValueError, Interrupted])
def test_what_fails_half_way_changes_nothing(old: str | None, error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error):
        write_half(path, error)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{'é' * 120}.svg"  # as long as a name may be
    with written_whole(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.suffix == ".svg"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_permissions_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "kept.json", tmp_path / "link.json"
    path.write_text("{}")
    path.chmod(0o640)
    link.symlink_to(path)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [path, link]
