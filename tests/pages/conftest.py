"""One headless Chromium for all pages; a page that logs an error or asks for anything but itself fails its test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of the system, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(file, width=360, has_touch=True, ...)`: a page in a context of its own.

    At the end no page may have logged an error, thrown, or asked for anything but its file.
    """
    contexts: list[Any] = []
    problems: list[str] = []

    def open_(file: Path, width: int = 1440, height: int = 960, fragment: str = "", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        _watch(page, file.as_uri(), problems)
        page.goto(file.as_uri() + fragment)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def _watch(page: Any, address: str, problems: list[str]) -> None:
    """Note what a page should not do."""

    def logged(message: Any) -> None:
        if message.type == "error":
            problems.append(f"logged: {message.text}")

    def asked(request: Any) -> None:
        if request.url.partition("#")[0] != address:
            problems.append(f"asked for {request.url}")

    page.on("console", logged)
    page.on("pageerror", lambda error: problems.append(f"thrown: {error}"))
    page.on("request", asked)
