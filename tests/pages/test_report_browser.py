"""Claims, each in a real browser: what a chart reads out is what metrics.jsonl says at that step, by mouse, finger and
keyboard; axes, scale, smoothing and the choice of runs change the drawing alone; filters show the turns they name; the
page fits a phone, passes axe in light and dark, and runs nothing that a run says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.reports import played, write_run

from mtr.pages.report import write_report_page
from mtr.report.report import report

Open = Callable[..., Any]
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
LOSS = "[data-key=loss] .plot"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of 50 and 30 steps, every one and every second of them logged."""
    made = tmp_path_factory.mktemp("runs")
    hostile = played(True, thinking=HOSTILE, response=HOSTILE)
    one = write_run(made / "one", 50, max_steps=50, generated=[(0, played(False)), (50, hostile)])
    two = write_run(made / f"two {HOSTILE.replace('/', '|')}", 30, max_steps=50, rate=3e-3, every=2, result=False)
    return [one, two]


@pytest.fixture(scope="module")
def file(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report_page(path, report(folders))
    return path


@pytest.fixture(scope="module")
def desktop(open_page: Open, file: Path) -> Any:
    return open_page(file)


@pytest.fixture(scope="module")
def phone(open_page: Open, file: Path) -> Any:
    return open_page(file, width=360, height=740, has_touch=True, is_mobile=True, color_scheme="dark")


def written(folder: Path, name: str) -> dict[int, float]:
    """A number of metrics.jsonl by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def said(page: Any, key: str = "loss") -> tuple[int, list[float]]:
    """The step and the values that a screen reader is told."""
    text = page.locator(f"[data-key={key}] .plot").get_attribute("aria-valuetext")
    step, values = text.split(": ", 1)
    return int(re.sub(r"\D", "", step)), [float(v.replace(",", "")) for v in re.findall(r" ([\d.,]+)(?=,|$)", values)]


def nearest(numbers: dict[int, float], step: float) -> float:
    return numbers[min(numbers, key=lambda known: (abs(known - step), known))]


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def test_pointing_reads_what_the_file_says(desktop: Any, folders: list[Path]) -> None:
    losses = [written(folder, "loss") for folder in folders]
    box = desktop.locator(LOSS).bounding_box()
    seen = set()
    for share in (0.1, 0.24, 0.5, 0.77, 0.999):
        desktop.mouse.move(box["x"] + share * box["width"], box["y"] + 60)
        step, values = said(desktop)
        assert values == [rounded(nearest(loss, step)) for loss in losses]
        shown = desktop.locator("[data-key=loss] .readout li").all_inner_texts()
        assert [float(text.split()[-1]) for text in shown] == values
        seen.add(step)
        assert said(desktop, "grad_norm")[1][0] == rounded(written(folders[0], "grad_norm")[step])
    assert len(seen) == 5
    assert max(seen) == 50
    desktop.mouse.move(5, 5)
    assert said(desktop) == (50, [rounded(losses[0][50]), rounded(losses[1][30])])


def test_the_point_is_on_the_line(desktop: Any) -> None:
    """Unsmoothed, so that the drawn line passes through each value."""
    desktop.locator("#smoothing").fill("0")
    box = desktop.locator(LOSS).bounding_box()
    desktop.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60)
    step, _ = said(desktop)
    path = desktop.locator(f"{LOSS} g.run-0 .line").get_attribute("d")
    points = [tuple(map(float, point)) for point in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    dot = desktop.locator(f"{LOSS} .cursor circle.run-0")
    found = tuple(float(dot.get_attribute(name)) for name in ("cx", "cy"))
    assert found == pytest.approx(points[step - 1], abs=0.06)
    assert found != pytest.approx(points[step], abs=0.06)
    desktop.mouse.move(5, 5)


def test_the_keyboard_reads_every_step(desktop: Any, folders: list[Path]) -> None:
    losses = written(folders[0], "loss")
    desktop.locator(LOSS).focus()
    for key, step in (("Home", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("PageUp", 7), ("End", 50)):
        desktop.keyboard.press(key)
        assert said(desktop)[0] == step
        assert said(desktop)[1][0] == rounded(losses[step])
    desktop.keyboard.press("Home")
    desktop.keyboard.press("Escape")
    assert desktop.locator(f"{LOSS} .cursor").inner_html() == ""


def test_other_axes_and_scales_read_the_same_values(desktop: Any, folders: list[Path]) -> None:
    losses = written(folders[0], "loss")
    log = desktop.get_by_role("button", name="Training loss: logarithmic scale")
    for axis, at, unit in (("Tokens", 20_000, "tokens 20 k"), ("Time", 10.0, "time 10 s")):
        desktop.get_by_role("radio", name=axis).check()
        log.click()
        desktop.locator(LOSS).focus()
        desktop.keyboard.press("Home")
        for key in ("PageUp", "PageUp", "PageUp", "PageUp", "ArrowLeft"):
            desktop.keyboard.press(key)
        host = desktop.locator(LOSS)
        assert float(host.get_attribute("aria-valuenow")) == at  # step 20: 1,000 tokens and half a second each
        assert host.get_attribute("aria-valuetext").startswith(f"{unit}: one {rounded(losses[20]):.3f}".rstrip("0"))
        desktop.keyboard.press("Escape")
    assert log.get_attribute("aria-pressed") == "false"
    desktop.get_by_role("radio", name="Steps").check()


def test_a_run_that_is_switched_off_is_not_drawn_or_read(desktop: Any) -> None:
    box = desktop.locator("input.show-run").nth(1)
    assert desktop.locator(f"{LOSS} .line").count() == 2
    box.uncheck()
    assert desktop.locator(f"{LOSS} .line").count() == 1
    assert len(said(desktop)[1]) == 1
    box.check()


def test_smoothing_draws_another_line_before_the_raw_one(desktop: Any) -> None:
    line = desktop.locator(f"{LOSS} g.run-0 .line")
    desktop.locator("#smoothing").fill("0")
    raw = line.get_attribute("d")
    desktop.locator("#smoothing").fill("8")
    assert line.get_attribute("d") != raw
    assert desktop.locator(f"{LOSS} g.run-0 .raw").get_attribute("d") == raw


def test_each_chart_is_a_table_too(desktop: Any, folders: list[Path]) -> None:
    losses = written(folders[0], "loss")
    desktop.locator("[data-key=loss] summary").click()
    cells = desktop.locator("[data-key=loss] tbody tr").first.locator("th, td").all_inner_texts()
    low = min(losses, key=lambda step: losses[step])
    assert cells[:3] == ["one", f"{losses[1]:.4g}".ljust(5, "0"), f"{losses[50]:.4g}"]
    assert cells[3] == f"{losses[low]:.4g} at {low}"
    desktop.locator("[data-key=loss] summary").click()


def test_a_long_run_is_told_by_its_own_values_and_not_by_means_of_several_steps(
    open_page: Open, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "long", 1500, max_steps=1500)  # more steps than a chart has points
    write_report_page(tmp_path / "long.html", report([run]))
    page = open_page(tmp_path / "long.html")
    losses = written(run, "loss")
    assert said(page) == (1500, [rounded(losses[1500])])
    low, high = min(losses, key=lambda step: losses[step]), max(losses, key=lambda step: losses[step])
    page.locator("[data-key=loss] summary").click()
    cells = page.locator("[data-key=loss] tbody tr").first.locator("td").all_inner_texts()
    numbers = [losses[step] for step in (1, 1500, low, high)]
    assert [float(cell.split(" at ")[0]) for cell in cells] == [rounded(number) for number in numbers]
    assert [cell.split(" at ")[1] for cell in cells[2:]] == [f"{low:,}", f"{high:,}"]


def test_the_filter_shows_the_turns_that_it_names(desktop: Any) -> None:
    visible = desktop.locator(".turn:visible")
    desktop.locator("#played-filter").select_option("mended")
    assert desktop.locator("#played-count").inner_text() == "1 turn"
    assert visible.count() == 1
    assert "right" in visible.locator(".answer").last.inner_text()
    desktop.locator("#played-filter").select_option("broken")
    assert (visible.count(), desktop.locator("details.chat:visible").count()) == (0, 0)
    desktop.locator("#played-filter").select_option("all")
    desktop.locator("#all-thinking").click()
    assert desktop.locator("details.chat[open] details.thinking[open] .text").first.is_visible()
    desktop.locator("#all-thinking").click()


def test_nothing_that_a_run_says_is_run(desktop: Any) -> None:
    assert desktop.evaluate("window.hit") is None
    assert "<script>" in desktop.locator(".runs").inner_text()


def serious(page: Any) -> list[tuple[str, str]]:
    """What axe finds of serious or critical impact."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = axe.run(page).response["violations"]
    return [(v["id"], n["html"]) for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]]


def test_axe_finds_nothing_serious(desktop: Any, phone: Any) -> None:
    """In light and, on the phone, in dark, with everything open that can be."""
    for page in (desktop, phone):
        page.locator("[data-key=loss] summary").click()
        page.locator("#all-thinking").click()
        page.locator(LOSS).hover()
        assert serious(page) == []


def test_a_phone_shows_all_of_it_and_reads_by_touch(phone: Any, folders: list[Path]) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    for chart in phone.locator("figure.chart").all():
        box = chart.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    box = phone.locator(LOSS).bounding_box()
    phone.touchscreen.tap(box["x"] + 150, box["y"] + 60)
    step, values = said(phone)
    assert 0 < step < 50
    assert values[0] == rounded(written(folders[0], "loss")[step])
