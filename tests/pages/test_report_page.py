"""Claims: the page of a report holds every run with its results, reasons, recipe and played conversations, however far
the run is; whatever a run says is text in it; it names nothing outside itself; the picture is drawn for all of them.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.reports import LONG, played, write_rejects, write_run

from mtr.pages.report import CHARTS, DASHES, report_page, write_report_page
from mtr.pages.report_picture import smoothed, write_report_picture
from mtr.pages.report_played import played_side_by_side
from mtr.pages.shell import asset
from mtr.report.report import report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}\u202e$x_1$"


class Page(HTMLParser):
    """The elements of a page, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def tags(html: str) -> list[str]:
    return [tag for tag, _ in Page(html).tags]


def two_runs(tmp_path: Path) -> list[Path]:
    one = write_run(tmp_path / "one", 20, generated=[(0, played(False)), (20, played(True))])
    two = write_run(tmp_path / "two", 12, rate=1e-2, result=False, generated=[(0, played(False))])
    write_rejects(two, "train.jsonl, line 3: no messages")
    return [one, two]


def test_everything_of_two_runs_is_there(tmp_path: Path) -> None:
    text = Page(report_page(report(two_runs(tmp_path)))).text
    for words in (
        "mtr report: 2 runs",
        "finished, 20 steps",
        "ended after 12 of 20 steps",
        "no conversations played after training yet",
        "200 of 240 turns trained (83%)",
        LONG,
        "turns not trained",
        "line 3: no messages",
        "training.learning_rate",
        "Ana: 5.",
        "Ana has 5.",
        "before: 0 of 2",
        "2.13.0",
        "base weights",
    ):
        assert words in text, words


def test_a_single_run_shows_its_main_numbers_and_its_settings(tmp_path: Path) -> None:
    text = Page(report_page(report(two_runs(tmp_path)[:1]))).text
    for words in ("mtr report: one", "lowest eval loss", "75.0%", "Keys that have their defaults are left out"):
        assert words in text, words
    assert "best of the runs" not in text


def test_runs_without_a_step_or_a_file_have_a_page_too(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", 0, result=False)
    for name in ("recipe.yaml", "environment.json"):
        (empty / name).unlink()
    for runs in ([empty], [empty, write_run(tmp_path / "b", 1, result=False)]):
        found = report(runs)
        text = Page(report_page(found)).text
        assert "no step is logged" in text
        assert "recipe.yaml is missing" in text
        write_report_picture(tmp_path / "x.png", found)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_runs_say_is_text_wherever_it_stands(tmp_path: Path) -> None:
    """No element more than a harmless run has, and each text where it should be."""
    harmless = "harmless"
    pages: dict[str, str] = {}
    for name in (harmless, HOSTILE):
        said = played(True, thinking=name, response=name)
        run = write_run(tmp_path / str(len(pages)) / name.replace("/", "_"), 3, generated=[(0, said), (3, said)])
        write_rejects(run, name)
        found = report([run, write_run(tmp_path / str(len(pages)) / "other", 3, rate=1e-2)])
        described = found["runs"][0]
        described["name"] = described["environment"]["device"] = name
        described["outcome"]["text"] = name
        described["missing"] = [name]
        described["counts"]["untrained_turns"] = {name: 1}
        described["eval_by_source"] = {name: 1.0}
        described["skipped"] = [[2, name]]
        found["differences"][0] |= {"key": name, "values": [name, name], "default": name}
        pages[name] = report_page(found)
    assert tags(pages[HOSTILE]) == tags(pages[harmless])
    assert not any(key.startswith("on") for _, attributes in Page(pages[HOSTILE]).tags for key in attributes)
    assert "<script>alert" not in pages[HOSTILE]
    assert "<img" not in pages[HOSTILE]
    assert "{{ 7 * 7 }}" in Page(pages[HOSTILE]).text
    assert Page(pages[HOSTILE]).text.count("onerror=alert(2)") >= 8


def test_the_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    write_report_page(tmp_path / "deep" / "r.html", report(two_runs(tmp_path)))
    html = (tmp_path / "deep" / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    named = [a[key] for _, a in Page(html).tags for key in ("src", "href", "srcset", "action") if key in a]
    assert named == ["#main"]
    assert re.findall(r"https?://[^\s\"']*", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert str(tmp_path) not in html


def test_lines_have_the_same_dashes_in_tables_and_charts() -> None:
    written = re.search(r"const DASHES = \[(.*?)\];", asset("report_chart.js"))
    assert written
    assert [dash or "none" for dash in re.findall(r'"(.*?)"', written[1])] == list(DASHES)


def test_a_picture_of_runs_with_hostile_names_and_of_a_long_series(tmp_path: Path) -> None:
    found = report(two_runs(tmp_path))
    found["runs"][0]["name"] = f"\u6c49\u5b57 {HOSTILE}"
    steps = list(range(1, 401))
    spikes = [1e3 if step == 200 else 1.0 for step in steps]
    found["runs"][1]["series"]["grad_norm"] = {"step": steps, "value": spikes, "low": spikes, "high": spikes}
    for name in ("r.png", "r.svg"):
        write_report_picture(tmp_path / name, found)
    assert (tmp_path / "r.png").stat().st_size < 300_000


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 0.8) == pytest.approx([1, 2, 3, 4, 5])
    bumpy = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    found = smoothed(bumpy, 0.9)
    assert (found[0], found[-1]) == (0.0, 1.0)
    assert all(abs(value - 0.5) < 0.2 for value in found[2:4])


def test_every_chart_is_one_of_a_series() -> None:
    assert len({chart["key"] for chart in CHARTS}) == len(CHARTS) == 10


# --- played conversations ---------------------------------------------------------------------------------------------


def run_that_played(name: str, before: bool | None, after: bool | None) -> dict[str, Any]:
    said = [None if right is None else {"thinking": "", "response": "r", "right": right} for right in (before, after)]
    turn = {"turn": 0, "asked": None, "reference": "r", "before": said[0], "after": said[1]}
    return {"name": name, "played": {"conversations": [{"where": "c", "turns": [turn]}], "num_conversations": 1}}


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (False, True, ["mended"]),
        (True, False, ["broken", "wrong"]),
        (False, False, ["wrong"]),
        (True, True, []),
        (None, True, []),
        (False, None, []),
    ],
)
def test_turns_are_filtered_by_what_training_did(before: bool | None, after: bool | None, kinds: list[str]) -> None:
    found = played_side_by_side([run_that_played("a", before, after)])
    assert found is not None
    assert found["chats"][0]["turns"][0]["kinds"] == kinds


def test_what_all_runs_said_before_training_is_shown_once() -> None:
    def who(*runs: dict[str, Any]) -> list[str]:
        found = played_side_by_side(runs)
        assert found is not None
        return [said["who"] for said in found["chats"][0]["turns"][0]["said"]]

    same = [run_that_played(name, False, True) for name in "ab"]
    assert who(*same) == ["before training", "a", "b"]
    other = run_that_played("b", True, True)
    assert who(same[0], other) == ["a before training", "a after training", "b before training", "b after training"]
    assert who(same[0]) == ["before training", "after training"]
    assert played_side_by_side([{"name": "a", "played": {"conversations": [], "num_conversations": 0}}]) is None


def test_conversations_of_other_files_of_the_same_name_are_not_put_side_by_side() -> None:
    one, other = run_that_played("a", False, True), run_that_played("b", False, True)
    other["played"]["conversations"][0]["turns"][0]["reference"] = "another"
    found = played_side_by_side([one, other])
    assert found is not None
    assert [[turn["wanted"] for turn in chat["turns"]] for chat in found["chats"]] == [["r"], ["another"]]


def test_conversations_that_are_left_out_are_counted_by_run() -> None:
    runs = [run_that_played(name, False, True) for name in "ab"]
    for run in runs:
        run["played"]["num_conversations"] = 2
        run["played"]["conversations"][0]["where"] = run["name"]
    found = played_side_by_side(runs)  # two chats are shown, one of each run's two
    assert found is not None
    assert (found["shown"], found["more"]) == (1, 2)


def test_a_page_that_cannot_be_written_leaves_the_old_one_and_a_new_one_its_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = tmp_path / "r.html", report(two_runs(tmp_path / "runs"))
    file.write_text("old")
    file.chmod(0o600)
    before = sorted(tmp_path.iterdir())

    def interrupted(path: Path, text: str, **_: Any) -> None:
        with path.open("w") as partial:
            partial.write(text[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report_page(file, found)
    assert (file.read_text(), sorted(tmp_path.iterdir())) == ("old", before)
    write_report_page(file, found)
    assert file.read_text().endswith("</html>\n")
    assert file.stat().st_mode & 0o777 == 0o600
