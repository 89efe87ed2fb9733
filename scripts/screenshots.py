"""Make the pictures of docs/images from the quickstart's data, with the Chromium of the system.

Arguments choose some of them by the beginning of their names: `python scripts/screenshots.py inspect mask`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 300_000

Draw = Callable[[Any, Path, Path], None]
"""Of a browser, an empty folder for pages, and the picture to write."""


@contextmanager
def opened(browser: Any, page: Path, width: int, height: int, **options: Any) -> Iterator[Any]:
    """A page in a window of this size."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    shown = context.new_page()
    shown.goto(page.as_uri())
    yield shown
    context.close()


def shoot(page: Any, picture: Path) -> None:
    page.wait_for_timeout(300)  # what is drawn in the next frame is there then
    page.screenshot(path=picture)


def inspect_page(folder: Path, rows: list[int]) -> Path:
    """`mtr inspect --html` of some rows."""
    from mtr.pages.inspect import write_inspect_page

    found, tokenizer = inspected(rows)
    path = folder / "inspect.html"
    write_inspect_page(path, found, tokenizer)
    return path


def inspected(rows: list[int]) -> tuple[list[Any], Any]:
    """Rows of the quickstart with the roles of their tokens, and its tokenizer."""
    from mtr.chat.loading import load_renderer, load_tokenizer
    from mtr.checks.inspect import inspect_conversation
    from mtr.checks.roles import token_roles
    from mtr.data.mixture import Mixture
    from mtr.data.opening import open_data
    from mtr.prepare.builder import Builder
    from mtr.recipe.loading import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    tokenizer = load_tokenizer(recipe)
    builder = Builder(recipe, load_renderer(recipe, tokenizer))
    data = open_data(recipe.data, recipe.data.train)
    assert isinstance(data, Mixture)
    found = [inspect_conversation(builder, data.conversation(number), number) for number in rows]
    return [(inspection, token_roles(inspection, builder)) for inspection in found], tokenizer


def desktop(browser: Any, folder: Path, picture: Path) -> None:
    with opened(browser, inspect_page(folder, [3]), 1280, 1390) as page:
        page.locator(".seg.branch .t", has_text="58").first.hover()
        shoot(page, picture)


def dark(browser: Any, folder: Path, picture: Path) -> None:
    with opened(browser, inspect_page(folder, list(range(12))), 1400, 960, color_scheme="dark") as page:
        page.locator("#row-list button").nth(5).click()
        page.get_by_role("radio", name="Side by side").click()
        page.locator("#tree-flow .seg.branch").nth(1).locator(".t.s").nth(9).click()
        page.locator("#bar").evaluate("bar => scrollTo(0, bar.offsetTop - 12)")
        shoot(page, picture)


def phone(browser: Any, folder: Path, picture: Path) -> None:
    with opened(
        browser, inspect_page(folder, [5]), 360, 780, has_touch=True, is_mobile=True, device_scale_factor=2
    ) as page:
        page.locator(".seg.branch").nth(1).locator(".t.s").nth(9).tap()
        shoot(page, picture)


def terminal(row: int, width: int) -> Draw:
    """`mtr inspect` in a terminal of so many columns."""

    def draw(browser: Any, folder: Path, picture: Path) -> None:
        import io

        from rich.console import Console

        from mtr.cli.views.inspect import show_inspection

        del folder
        out = Console(file=io.StringIO(), record=True, width=width, force_terminal=True, highlight=False)
        ((inspection, roles),), tokenizer = inspected([row])
        place = inspection.conversation.where.removeprefix(f"{ROOT}/")
        inspection = replace(inspection, conversation=replace(inspection.conversation, where=place))
        show_inspection(inspection, roles, tokenizer, out)
        page = browser.new_page(viewport={"width": 13 * width, "height": 400})
        page.set_content(out.export_svg(title=f"mtr inspect recipes/quickstart.yaml --index {row}"))
        page.add_style_tag(content=f"svg {{ width: {10 * width}px }}")
        page.locator("svg").screenshot(path=picture)
        page.close()

    return draw


def mask(browser: Any, folder: Path, picture: Path) -> None:
    from mtr.pages.mask_picture import write_mask_picture

    write_mask_picture(picture, *inspected([5])[0][0])


def reported(folder: Path) -> dict[str, Any]:
    """`mtr report` of three runs of the quickstart, trained once for all pictures."""
    from mtr.recipe.loading import load_recipe
    from mtr.report.report import report
    from mtr.training.loop import train

    both = [
        "training.max_steps=60",
        "training.logging_steps=1",
        "training.eval_steps=10",
        "generation.conversations=12",
    ]
    runs = {"lr-0.01": ["training.learning_rate=0.01"], "lr-0.002": ["training.learning_rate=0.002"]}
    runs["rank-4"] = ["training.learning_rate=0.01", "lora.r=4", "lora.alpha=8", "training.max_steps=40"]
    for name, own in runs.items():
        output = folder / "runs" / name
        if not output.exists():
            recipe = ROOT / "recipes" / "quickstart.yaml"
            train(load_recipe(recipe, [*both, *own, f"training.output_dir={output}"]))
    return report([folder / "runs" / name for name in runs])


def report_page(folder: Path) -> Path:
    """`mtr report --html` of them."""
    from mtr.pages.report import write_report_page

    write_report_page(folder / "report.html", reported(folder))
    return folder / "report.html"


def report_desktop(browser: Any, folder: Path, picture: Path) -> None:
    with opened(browser, report_page(folder), 1400, 1130) as page:
        page.locator("[data-key=loss] .plot").hover(position={"x": 220, "y": 90})
        shoot(page, picture)


def report_phone(browser: Any, folder: Path, picture: Path) -> None:
    with opened(browser, report_page(folder), 360, 780, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        page.locator("[data-key=loss] .plot").tap(position={"x": 150, "y": 90})
        page.locator("[data-key=loss]").evaluate("chart => scrollTo(0, chart.offsetTop - 12)")
        shoot(page, picture)


def report_picture(browser: Any, folder: Path, picture: Path) -> None:
    from mtr.pages.report_picture import write_report_picture

    del browser
    write_report_picture(picture, reported(folder))


PICTURES: dict[str, Draw] = {
    "inspect-desktop.png": desktop,
    "inspect-dark.png": dark,
    "inspect-phone.png": phone,
    "inspect-terminal-80.png": terminal(3, 80),
    "inspect-terminal-160.png": terminal(5, 160),
    "mask.png": mask,
    "report-desktop.png": report_desktop,
    "report-phone.png": report_phone,
    "report.png": report_picture,
}


def main() -> None:
    from playwright.sync_api import sync_playwright

    wanted = tuple(sys.argv[1:]) or ("",)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, draw in PICTURES.items():
            if name.startswith(wanted):
                draw(browser, Path(folder), IMAGES / name)
                size = (IMAGES / name).stat().st_size
                assert size < MOST_BYTES, f"{name} has {size:,} bytes"
                print(f"{name}: {size:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
