"""Claims, each in a real browser: pointing at a token, tapping it or reaching it with the keyboard lights exactly what
the mask lets it see; the picture of the mask is the mask; the page says what a token predicts and with which weight;
it works on a phone, in the dark, with a screen reader, without network, and with hostile text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inspections import Inspected, inspected, long_conversation, part_trained, tokenizer
from support.paths import QUICKSTART
from support.rows import chat, conversation_row
from support.trees import visible

from mtr.data.conversation import SkippedRow
from mtr.pages.inspect import Row, write_inspect_page
from mtr.tree.layout import Layout, path_to

Open = Callable[..., Any]
Seen = np.ndarray[tuple[int, int], np.dtype[np.bool_]]
HOSTILE = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1"><!-- &lt;b&gt; \u202e'

LIT = """(name) => [...app[name].host.querySelectorAll(".t")]
    .filter((e) => !["rgba(0, 0, 0, 0)", "transparent"].includes(getComputedStyle(e).backgroundColor))
    .map((e) => e.token).sort((a, b) => a - b)"""
"""What a person sees lit: tokens whose ground is coloured."""

PIXELS = """() => {
    const { canvas, view, cell } = app.mask;
    const density = window.devicePixelRatio;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colour = (x, y) => data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3).join();
    const pixel = (token, start) => Math.floor((10 + (token - start + 0.5) * cell) * density);
    const ground = colour(canvas.width - 2, 14), [top, left] = [Math.ceil(view.y), Math.ceil(view.x)], rows = [];
    for (let q = top; q + 1 <= view.y + view.span; q++) {
      let row = "";
      for (let k = left; k + 1 <= view.x + view.span; k++)
        row += colour(pixel(k, view.x), pixel(q, view.y)) === ground ? "0" : "1";
      rows.push(row);
    }
    return { top, left, rows }; }"""
"""Of each cell in the view, whether the middle of it is painted."""


def quickstart(*numbers: int) -> list[dict[str, Any]]:
    lines = (QUICKSTART / "train.jsonl").read_text().splitlines()
    return [json.loads(lines[number]) for number in numbers]


def forks() -> dict[str, Any]:
    """Turns that fork at several depths, one of them not trained."""
    return chat(*part_trained()["messages"], *conversation_row(4)["messages"])


@functools.cache
def rows() -> list[Inspected]:
    return inspected([*quickstart(3, 5), forks()])


SKIPPED = SkippedRow(3, "/data/rows.jsonl, line 4", "no messages", "no 'messages' column")


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(*rows: Row) -> Path:
        path = tmp_path_factory.mktemp("page") / "page.html"
        write_inspect_page(path, rows, tokenizer())
        return path

    return write


@pytest.fixture(scope="module")
def desktop(open_page: Open, page_of: Callable[..., Path]) -> Any:
    return open_page(page_of(*rows(), SKIPPED))


@pytest.fixture(scope="module")
def phone(open_page: Open, page_of: Callable[..., Path]) -> Any:
    return open_page(page_of(*rows()), width=360, height=740, has_touch=True, is_mobile=True, color_scheme="dark")


@pytest.fixture(autouse=True)
def from_the_start(request: pytest.FixtureRequest) -> None:
    for name in {"desktop", "phone"} & set(request.fixturenames):
        page = request.getfixturevalue(name)
        page.mouse.move(1, 1)
        page.evaluate("""if (app.kept !== null) app.letGo();
            if (app.mode !== "tree") document.querySelector("[data-mode=tree]").click();
            if (app.number !== 0 || app.treeNumber !== 0) app.open(0);
            scrollTo(0, 0);""")


def layout_of(row: Inspected) -> Layout:
    return row[0].layouts[0]


def token(page: Any, index: int) -> Any:
    """The element of a token in the tree."""
    return page.evaluate_handle(f"app.treeFlow.elements.get({index})").as_element()


def point_at(page: Any, index: int, flow: str = "treeFlow") -> None:
    """Move the mouse to a token."""
    place = """async ([flow, i]) => { const element = app[flow].elements.get(i);
        element.scrollIntoView({ block: "center", behavior: "instant" });
        for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
        element.scrollIntoView({ block: "center", behavior: "instant" });
        const { x, y, width, height } = element.getClientRects()[0];
        return [x + width / 2, y + height / 2]; }"""
    page.mouse.move(*page.evaluate(place, [flow, index]))


def some_tokens(layout: Layout) -> list[int]:
    """The first and the last token, the ends of each turn, and what follows them."""
    ends = [leaf for leaf, _ in layout.leaves]
    return sorted({0, layout.num_tokens - 1, *ends, *(end + 1 for end in ends if end + 1 < layout.num_tokens), 20})


def wrongly_lit(page: Any, layout: Layout) -> list[int]:
    """Tokens that light up something else than the mask says when they are pointed at."""
    seen, wrong = visible(layout), []
    for index in some_tokens(layout):
        point_at(page, index)
        if page.evaluate(LIT, "treeFlow") != np.flatnonzero(seen[index]).tolist():
            wrong.append(index)
    return wrong


def wrong_cells(page: Any, seen: Seen) -> int:
    """How many cells of the picture in view are not as the mask is."""
    found = page.evaluate(PIXELS)
    painted = np.array([[cell == "1" for cell in row] for row in found["rows"]])
    assert painted.size > 50
    top, left = found["top"], found["left"]
    return int((painted != seen[top : top + painted.shape[0], left : left + painted.shape[1]]).sum())


@pytest.mark.parametrize("number", range(3))
def test_pointing_at_a_token_lights_what_it_sees(desktop: Any, number: int) -> None:
    desktop.evaluate("(n) => app.open(n)", number)
    layout = layout_of(rows()[number])
    assert wrongly_lit(desktop, layout) == []
    desktop.mouse.move(1, 1)
    assert len(desktop.evaluate(LIT, "treeFlow")) == layout.num_tokens, "nothing is faded when nothing is pointed at"


def test_a_wrong_layout_is_noticed(open_page: Open, page_of: Callable[..., Path]) -> None:
    inspection, roles = rows()[0]
    layout = layout_of(rows()[0])
    ends = layout.subtree_end.copy()
    ends[15] = layout.num_tokens
    broken = replace(inspection, layouts=[replace(layout, subtree_end=ends)])
    page = open_page(page_of((broken, roles)))
    assert wrongly_lit(page, layout)
    page.mouse.move(1, 1)
    assert wrong_cells(page, visible(layout)) > 0


def test_a_token_says_what_it_predicts_and_with_which_weight(desktop: Any) -> None:
    desktop.evaluate("app.open(1)")
    layout = layout_of(rows()[1])
    fork = int(np.flatnonzero(np.bincount(layout.predictor) > 0)[0])
    leaf = layout.leaves[0][0]
    for index in (fork, leaf - 1, leaf, 3):
        point_at(desktop, index)
        targets = layout.target_id[layout.predictor == index]
        weights = layout.weight[layout.predictor == index]
        words = desktop.locator("#detail dl > div").nth(2).text_content()
        if not len(targets):
            assert "nothing that counts" in words
        for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
            assert f"“{tokenizer().decode([target])}”".replace("\n", "⏎") in words
            assert f"with weight {weight:g}" in words
        count = int(visible(layout)[index].sum())
        assert f"{count} token" in desktop.locator("#detail dl > div").first.text_content()


def test_a_click_keeps_a_token_and_escape_lets_go(desktop: Any) -> None:
    layout = layout_of(rows()[0])
    token(desktop, 80).click()
    desktop.mouse.move(1, 1)
    wanted = np.flatnonzero(visible(layout)[80]).tolist()
    assert desktop.evaluate(LIT, "treeFlow") == wanted
    assert f"Sees {len(wanted)} tokens" in desktop.locator("#live").text_content()
    assert desktop.evaluate("location.hash") == "#row=0&token=80"
    desktop.keyboard.press("Escape")
    assert len(desktop.evaluate(LIT, "treeFlow")) == layout.num_tokens


def test_the_keyboard_reaches_every_token(desktop: Any) -> None:
    """One token is in the tab order; arrows move to the others, and what is focused lights up."""
    layout = layout_of(rows()[0])
    seen = visible(layout)
    focused = "document.activeElement.token"
    desktop.evaluate("app.open(0)")
    desktop.locator("#help").focus()
    desktop.keyboard.press("Tab")
    assert desktop.evaluate(focused) == 0
    assert desktop.locator(".t[tabindex]").count() == 1
    for key, wanted in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("PageDown", 13), ("End", 40)):
        desktop.keyboard.press(key)
        assert desktop.evaluate(focused) == wanted, key
        assert desktop.evaluate(LIT, "treeFlow") == np.flatnonzero(seen[wanted]).tolist()
    desktop.keyboard.press("Home")
    top = "document.activeElement.getClientRects()[0].top + scrollY"
    before = desktop.evaluate(top)
    desktop.keyboard.press("ArrowDown")
    assert desktop.evaluate(top) > before
    desktop.keyboard.press("ArrowUp")
    assert desktop.evaluate(focused) == 13
    leaf = layout.leaves[1][0]
    desktop.evaluate("(i) => app.go(i)", leaf)
    desktop.keyboard.press("p")
    assert desktop.evaluate(focused) == layout.parent[leaf]
    desktop.keyboard.press("n")
    assert desktop.evaluate(focused) == leaf
    name = desktop.evaluate("document.activeElement.getAttribute('aria-label')")
    assert name == "<|im_end|>, response"
    desktop.keyboard.press("Enter")
    assert len(desktop.evaluate(LIT, "treeFlow")) == layout.num_tokens


def test_a_turn_alone_stands_beside_the_tree(desktop: Any) -> None:
    layout = layout_of(rows()[0])
    desktop.locator("[data-mode=both]").click()
    leaf, view = layout.leaves[1]
    desktop.locator("#turn").select_option(index=1)
    path = path_to(layout, leaf)
    assert desktop.evaluate("Array.from(app.turnFlow.order)") == path.tolist()
    underlined = "[...app.turnFlow.host.querySelectorAll('.t.s')].map((e) => e.token)"
    assert desktop.evaluate(underlined) == path[len(view.prompt_ids) :].tolist()
    index = int(path[len(path) - 3])
    point_at(desktop, index, "turnFlow")
    for flow in ("treeFlow", "turnFlow"):
        assert desktop.evaluate(LIT, flow) == path[: len(path) - 2].tolist(), "both light the same tokens"
    other = layout.leaves[0][0]
    token(desktop, other).click()
    assert desktop.evaluate("app.turnFlow.order.at(-1)") == other, "the turn of the token that was chosen"


def test_the_picture_is_the_mask(desktop: Any) -> None:
    """At every cell, zoomed out and in; the wheel, the buttons and the keys zoom; a click chooses a row."""
    layout = layout_of(rows()[0])
    seen = visible(layout)

    assert wrong_cells(desktop, seen) == 0
    canvas = desktop.locator("#mask")
    canvas.focus()
    spans = [desktop.evaluate("app.mask.view.span")]
    for act in (
        lambda: desktop.keyboard.press("+"),
        lambda: desktop.locator("#zoom-in").click(),
        lambda: (canvas.hover(), desktop.mouse.wheel(0, -120)),
    ):
        act()
        desktop.wait_for_function("(span) => app.mask.view.span < span && !app.mask.waiting", arg=spans[-1])
        spans.append(desktop.evaluate("app.mask.view.span"))
    desktop.mouse.move(1, 1)
    assert wrong_cells(desktop, seen) == 0
    canvas.focus()
    desktop.keyboard.press("0")
    assert desktop.evaluate("app.mask.view") == {"x": 0, "y": 0, "span": layout.num_tokens}
    cell = desktop.evaluate("app.mask.cell")
    for column, says in ((3, "sees"), (120, "does not see")):
        canvas.hover(position={"x": 10 + (column + 0.5) * cell, "y": 10 + 100.5 * cell})
        assert f"100 {says} {column} " in re.sub(r"“[^”]*” ", "", desktop.locator("#mask-read").text_content())
    canvas.click(position={"x": 10 + 3.5 * cell, "y": 10 + 100.5 * cell})
    assert desktop.evaluate("app.kept") == 100
    assert desktop.evaluate(LIT, "treeFlow") == np.flatnonzero(seen[100]).tolist()


def test_each_tree_of_several_is_shown(open_page: Open, page_of: Callable[..., Path]) -> None:
    row = inspected([conversation_row(3)], "sequence.strategy=per_turn")[0]
    page = open_page(page_of(row))
    second = row[0].layouts[1]
    page.locator("#tree").select_option(index=1)
    assert page.evaluate("app.tree.size") == second.num_tokens
    assert wrongly_lit(page, second) == []
    page.locator("[data-mode=turn]").click()
    page.locator("#turn").select_option(index=2)
    turn, tree = second.leaves[0][1].turn, [layout.leaves[0][1].turn for layout in row[0].layouts].index(2)
    assert turn != 2
    assert page.evaluate("[app.treeNumber, app.turnFlow.order.length]") == [tree, row[0].layouts[tree].num_tokens]


def test_a_link_leads_to_a_token(open_page: Open, page_of: Callable[..., Path]) -> None:
    page = open_page(page_of(*rows()), fragment="#row=1&token=140")
    assert page.locator("#row-title").text_content().startswith("Row 1 ")
    assert page.evaluate(LIT, "treeFlow") == np.flatnonzero(visible(layout_of(rows()[1]))[140]).tolist()
    page.locator("#row-list button").nth(2).click()
    page.locator("[data-mode=both]").click()
    page.locator("#turn").select_option(index=0)
    assert page.locator("#turn-flow").text_content().startswith("Turn 0: not trained")


def test_rows_are_found_and_what_is_not_trained_is_said(desktop: Any) -> None:
    assert desktop.locator("#row-list button").count() == len(rows()) + 1
    desktop.locator("#find-row").fill("has 4 COINS")
    assert desktop.locator("#row-list li:visible").all_text_contents()[0].startswith("row 2 ")
    assert desktop.locator("#rows-found").text_content() == "1 of 4 rows"
    desktop.locator("#row-list li:visible button").click()
    assert "Turn 0 not trained: the message says so (weight 0)" in desktop.locator("#remarks").text_content()
    desktop.locator("[data-mode=turn]").click()
    desktop.locator("#turn").select_option(index=0)
    assert desktop.locator("#turn-flow").text_content().startswith("Turn 0: not trained")
    desktop.locator("#find-row").fill("")
    desktop.locator("#row-list button").last.click()
    assert "no 'messages' column" in desktop.locator("#remarks").text_content()
    assert desktop.locator("#flows").is_hidden()


def test_characters_of_several_tokens_and_untrained_turns_are_found_and_shown_whole(
    open_page: Open, page_of: Callable[..., Path]
) -> None:
    said, long = "\u6f22\u5b57\u2026\U0001f44d", "\u00fc" * 1500
    answers = [{"role": "assistant", "content": text} for text in (said, long)]
    user = {"role": "user", "content": "Say it."}
    rows = [conversation_row(1), chat(user, answers[0], user, answers[1])]
    page = open_page(page_of(*inspected(rows, "sequence.max_length=2500")))
    for wanted in (said, said[1], "\u00fc\u00fc"):
        page.locator("#find-row").fill(wanted)
        assert [text[:6] for text in page.locator("#row-list li:visible").all_text_contents()] == ["row 1 "], wanted
    page.locator("#find-row").fill("\u00b2")  # the sign at the second token of a character is nothing that is said
    assert page.locator("#row-list li:visible").count() == 0
    page.locator("#find-row").fill("")
    page.locator("#row-list button").last.click()
    page.locator("[data-mode=turn]").click()
    page.locator("#turn").select_option(index=1)
    shown = page.locator("#turn-flow")
    assert shown.locator("pre").text_content().strip("\ufffd").endswith("\u00fc" * 500)
    assert re.search(r"The first 2,000 of 3,\d\d\d tokens:", shown.text_content())


def test_white_space_is_shown_on_demand(desktop: Any) -> None:
    words = desktop.locator("#tree-flow")
    assert "·has" not in words.text_content()
    desktop.locator("#whitespace").click()
    assert "·has" in words.text_content()
    desktop.locator("#whitespace").click()
    assert "·has" not in words.text_content()


def test_a_tap_lights_what_a_token_sees(phone: Any) -> None:
    layout = layout_of(rows()[0])
    for index in (100, 20):
        token(phone, index).tap()
        assert phone.evaluate(LIT, "treeFlow") == np.flatnonzero(visible(layout)[index]).tolist()
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = phone.locator("#detail").bounding_box()
    assert box["y"] + box["height"] == pytest.approx(740, abs=1), "what it says stands at the bottom of the screen"
    token(phone, 20).tap()
    assert len(phone.evaluate(LIT, "treeFlow")) == layout.num_tokens


def test_two_fingers_zoom(phone: Any) -> None:
    phone.evaluate("""() => { const at = (type, id, x) => app.mask.canvas.dispatchEvent(new PointerEvent(type,
        { pointerId: id, pointerType: "touch", clientX: x, clientY: 200, bubbles: true }));
        at("pointerdown", 1, 100); at("pointerdown", 2, 140); at("pointermove", 2, 220);
        at("pointerup", 1, 100); at("pointerup", 2, 220); }""")
    assert phone.evaluate("app.mask.view.span") < layout_of(rows()[0]).num_tokens / 2


def serious(page: Any) -> list[str]:
    """What axe finds of serious or critical impact."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = axe.run(page).response["violations"]
    return [
        f"{one['id']}: {node['html']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def test_axe_finds_nothing_serious(desktop: Any, phone: Any) -> None:
    """In light and dark, with and without a token, in each view."""
    assert serious(desktop) == []
    desktop.locator("#help").click()
    desktop.locator("[data-mode=both]").click()
    desktop.evaluate("app.go(100)")
    assert serious(desktop) == []
    desktop.locator("#help").click()
    phone.evaluate("app.go(100)")
    assert serious(phone) == []


def test_the_theme_can_be_chosen(desktop: Any, phone: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = desktop.evaluate(ground), phone.evaluate(ground)
    assert light != dark
    button = desktop.locator("#theme")
    shown = []
    for _ in range(3):
        button.click()
        shown.append((button.text_content(), desktop.evaluate(ground)))
    assert shown == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", light)]


def test_hostile_text_is_text(open_page: Open, page_of: Callable[..., Path]) -> None:
    row = conversation_row(2)
    row["messages"][0]["content"] = HOSTILE
    row["messages"][1]["reasoning_content"] = HOSTILE
    page = open_page(page_of(*inspected([row])))
    assert page.evaluate("window.hit") is None
    assert page.locator("img, main script").count() == 0
    assert '<img src=x onerror="window.hit=1">' in page.locator("#tree-flow").text_content()
    assert "\u202e" not in page.content()


def test_the_page_may_ask_for_nothing(browser: Any, page_of: Callable[..., Path]) -> None:
    page = browser.new_page()
    page.goto(page_of(rows()[0]).as_uri())
    refused = page.evaluate("""() => new Promise((done) => {
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => 0); })""")
    assert refused == "connect-src"
    page.close()


def test_a_long_conversation_opens_within_a_second(open_page: Open, page_of: Callable[..., Path]) -> None:
    """At the first or a later try, because the machine may be busy; and a token lights up at once."""
    row = long_conversation()
    assert row[0].num_tokens["single_pass"] > 20_000
    page = open_page(page_of(row))
    painted = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
    seconds: list[float] = []
    while len(seconds) < 8 and min(seconds, default=2) >= 1:
        page.reload()
        seconds.append(page.evaluate(painted) / 1000)
    assert min(seconds) < 1
    assert page.locator(".t").count() >= layout_of(row).num_tokens
    layout = layout_of(row)
    page.evaluate("app.point(12345)")
    assert page.evaluate("Array.from(app.seen)") == visible_row(layout, 12_345)


def visible_row(layout: Layout, q: int) -> list[int]:
    k = np.arange(layout.num_tokens)
    seen: list[int] = ((k <= q) & (q < layout.subtree_end)).astype(int).tolist()
    return seen
