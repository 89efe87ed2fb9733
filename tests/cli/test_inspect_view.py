"""Claims: `mtr inspect` draws every token of a tree once, and marks what is trained without colour too; a turn is shown
as inference sees it; the mask is the mask; nothing is wider than the terminal or steers it; long output is paged.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from support.paths import QUICKSTART
from support.rendering import ROWS, behaving, load, parsed
from support.rows import conversation_row
from support.templates import BEHAVIOURS

from mtr.chat.loading import make_renderer
from mtr.checks.inspect import inspect_conversation
from mtr.checks.inspect_outline import Begin, Branch, outline
from mtr.checks.inspection import Inspection
from mtr.checks.roles import RESPONSE, ROLES, THINKING, TokenRoles, token_roles, turn_tokens
from mtr.cli.views.inspect import show_inspection
from mtr.cli.views.inspect_mask import mask_lines
from mtr.cli.views.inspect_style import COLOURS, Style
from mtr.cli.views.inspect_turn import describe_turn, show_turn
from mtr.cli.views.pager import paged
from mtr.prepare.builder import Builder
from mtr.recipe.loading import recipe_of_tokenizer

BASE = str(QUICKSTART / "base")
RANGE = re.compile(r"^ *(\d+)(?:-(\d+))?  .*?([\d,]+)  ")


def builder_of(name: str = "", *overrides: str) -> Builder:
    """With the quickstart's template, or that of a behaviour."""
    renderer = behaving(name, template=BEHAVIOURS[name].arguments) if name else make_renderer(load(BASE))
    return Builder(recipe_of_tokenizer(BASE, list(overrides)), renderer)


def inspected(of: Builder, row: dict[str, Any]) -> tuple[Inspection, list[TokenRoles]]:
    inspection = inspect_conversation(of, parsed(row), 0)
    return inspection, token_roles(inspection, of)


def terminal(width: int, encoding: str = "utf-8", colour: bool = False) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    return Console(
        file=file,
        width=width,
        soft_wrap=True,
        highlight=False,
        force_terminal=colour,
        color_system="256" if colour else None,
    )


def text_of(out: Console) -> str:
    file = out.file
    assert isinstance(file, io.TextIOWrapper)
    raw = file.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(str(file.encoding))


def shown(of: Builder, row: dict[str, Any], width: int = 80, **keys: Any) -> str:
    inspection, roles = inspected(of, row)
    out = terminal(width, **keys)
    show_inspection(inspection, roles, of.renderer.tokenizer, out)
    return text_of(out)


def tree_of(text: str) -> list[str]:
    """The lines of a drawing that are runs of tokens."""
    return [line for line in text.splitlines() if RANGE.match(line)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["", *list(BEHAVIOURS)[::5]])
def test_every_token_is_drawn_once_and_what_is_trained_has_its_sign(name: str, row: str) -> None:
    of = builder_of(name)
    inspection, roles = inspected(of, ROWS[row])
    out = terminal(100)
    show_inspection(inspection, roles, of.renderer.tokenizer, out)
    lines = tree_of(text_of(out))
    drawn = np.zeros(inspection.num_tokens["single_pass"], int)
    trained = 0
    for line in lines:
        match = RANGE.match(line)
        assert match
        first, last, number = int(match[1]), int(match[2] or match[1]), int(match[3].replace(",", ""))
        assert last - first + 1 == number
        drawn[first : last + 1] += 1
        trained += number * ("▌" in line)
    assert (drawn == 1).all()
    assert trained == sum(int((found.weight > 0).sum()) for found in roles)


def test_without_weights_nothing_has_the_sign() -> None:
    of = builder_of()
    inspection, (roles,) = inspected(of, ROWS["thinking"])
    out = terminal(80)
    show_inspection(inspection, [replace(roles, weight=0 * roles.weight)], of.renderer.tokenizer, out)
    assert tree_of(text_of(out))
    assert not any("▌" in line for line in tree_of(text_of(out)))


def test_the_outline_is_in_the_order_of_the_conversation() -> None:
    of = builder_of("kept since the last user message")
    inspection, (roles,) = inspected(of, ROWS["tools"])
    seen = []
    for part in outline(inspection, 0, roles):
        if isinstance(part, Branch):
            seen.append(f"{'>' * part.depth} {part.turns} {part.state}")
        elif isinstance(part, Begin):
            seen.append(f"{'>' * part.depth} turn {part.turn}")
        else:
            seen.append(f"{'>' * part.depth} {ROLES[part.role]} {part.message}{' trained' if part.trained else ''}")
    assert seen == [
        " system 0",
        " prompt 1",
        "> (0, 1) context",
        "> turn 0",
        "> thinking 2 trained",
        "> response 2 trained",
        "> tool 3",
        "> turn 1",
        "> thinking 4 trained",
        "> response 4 trained",
        " copy 2",
        " tool 3",
        " copy 4",
        " prompt 5",
        " turn 2",
        " thinking 6 trained",
        " response 6 trained",
    ]


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_tree_fits_into_the_terminal(width: int) -> None:
    row = conversation_row(3)
    row["messages"][0]["content"] = "苹果 " * 60 + "🙂" * 60
    row["messages"][1]["reasoning_content"] = "word " * 200
    text = shown(builder_of(), row, width)
    lines = text.partition("count\n")[2].partition("\n\n")[0].splitlines()
    assert max(map(cell_len, lines)) == width, "long texts fill it"
    assert sum(line.endswith("…") for line in lines) >= 2
    assert all(cell_len(line) >= width - 2 for line in lines if line.endswith("…"))


def test_colours_tell_the_roles_apart_and_are_left_out_where_they_are_not_wanted() -> None:
    of = builder_of()
    coloured = shown(of, ROWS["tools"], colour=True)
    assert len(set(COLOURS.values())) == len(ROLES)
    for name in set(ROLES) - {"prompt"}:  # which has the terminal's own
        number = COLOURS[name].removeprefix("color(").removesuffix(")")
        assert re.search(rf"\x1b\[[0-9;]*38;5;{number}m{name}", coloured), name
    assert "\x1b" not in shown(of, ROWS["tools"])


def test_every_colour_can_be_read_on_black_and_on_white() -> None:
    """Contrast as WCAG 2.1 defines it; 3 is its minimum for large text and signs."""
    for colour in set(COLOURS.values()) - {"default"}:
        parts = (c / 255 for c in Color.parse(colour).get_truecolor())
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert min((luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)) > 3, colour


def test_a_terminal_without_unicode_gets_ascii() -> None:
    row = conversation_row(2)
    row["messages"][1]["content"] = "naïve 苹果"
    text = shown(builder_of(), row, encoding="ascii")
    assert text.isascii()
    assert "# thinking" in text
    assert "| copy      na\\xefve \\u82f9\\u679c" in text
    assert "+-. turn 0" in text


def test_texts_neither_steer_the_terminal_nor_are_taken_for_markup() -> None:
    row = conversation_row(2)
    row["messages"][0]["content"] = "[red]a\x1b[2Jb\u202ec\rd\x07"
    of = builder_of()
    inspection, roles = inspected(of, row)
    out = terminal(120)
    show_inspection(inspection, roles, of.renderer.tokenizer, out)
    show_turn(inspection, turn_tokens(inspection, of, 0), of.renderer.tokenizer, out)
    text = text_of(out)
    assert text.count("[red]a\\x1b[2Jb\\u202ec\\rd\\x07") + text.count("[red]a\\x1b[2Jb\\u202ec d\\x07") == 2
    assert not set(text) & set("\x1b\u202e\r\x07")


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_turn_is_shown_as_inference_sees_it(turn: int) -> None:
    of = builder_of("kept since the last user message")
    inspection, _ = inspected(of, ROWS["tools"])
    tokens = turn_tokens(inspection, of, turn)
    decode = of.renderer.tokenizer.decode
    prompt, completion = (decode(list(ids)) for ids in (tokens.prompt_ids, tokens.completion_ids))
    out = terminal(10_000)
    show_turn(inspection, tokens, of.renderer.tokenizer, out)
    head, _, rest = text_of(out).partition("what inference is fed\n")
    upper, _, lower = rest.partition("\n\ncompletion: ")
    assert f"row 0, turn {turn} of 3" in head
    assert "\n".join(line[12:] for line in upper.splitlines()) == prompt.removesuffix("\n") + "⏎"
    first, *lines = lower.splitlines()
    assert first.endswith("trained, each with weight 1")
    assert "\n".join(line[12:] for line in lines) == completion
    assert {line[:1] for line in upper.splitlines()} == {"│"}
    assert {line[:1] for line in lines} == {"▌"}
    described = describe_turn(inspection, tokens, of.renderer.tokenizer)
    assert (described["prompt"]["text"], described["completion"]["text"]) == (prompt, completion)
    assert set(described["completion"]["roles"]) == {ROLES[THINKING], ROLES[RESPONSE]}


def test_an_untrained_turn_has_its_prompt_and_its_reason() -> None:
    of = builder_of()
    row = conversation_row(2)
    row["messages"][3]["train"] = False
    inspection, _ = inspected(of, row)
    tokens = turn_tokens(inspection, of, 1)
    out = terminal(80)
    show_turn(inspection, tokens, of.renderer.tokenizer, out)
    text = text_of(out)
    assert "not trained: the message says so (weight 0)" in text
    assert "│ copy      Ana has 2 coins now.<|im_end|>" in text
    assert "▌" not in text
    described = describe_turn(inspection, tokens, of.renderer.tokenizer)
    assert (described["trained"], described["weight"], described["completion"]["ids"]) == (False, 0.0, [])
    with pytest.raises(ValueError, match="--turn 2: row 0 has 2 turns, counted from 0"):
        turn_tokens(inspection, of, 2)


def test_a_row_without_trained_turns_says_why() -> None:
    row = conversation_row(1)
    row["messages"][1]["weight"] = 0
    text = shown(builder_of(), row)
    assert "turns: 0 of 1 trained" in text
    assert "turn 0 not trained: the message says so (weight 0)" in text
    assert not tree_of(text)


def test_the_picture_of_the_mask_is_the_mask() -> None:
    of = builder_of()
    inspection, (roles,) = inspected(of, conversation_row(2))
    (layout,) = inspection.layouts
    total = layout.num_tokens
    across = total // 2
    q, k = np.arange(total)[:, None], np.arange(total)[None]
    seen = (k <= q) & (q < layout.subtree_end[None])
    found = [line.plain for line in mask_lines(layout, roles, Style(terminal(across + 14)))][1:]
    lines = [re.sub(r"  turns? [\d, -]+$", "", line) for line in found]
    assert len(lines) == across // 2
    drawn = np.array([[character != " " for character in f"{line[2:]:{across}}"[:across]] for line in lines])
    rows = [slice(i * total // len(lines), (i + 1) * total // len(lines)) for i in range(len(lines))]
    columns = [slice(i * total // across, -(-(i + 1) * total // across)) for i in range(across)]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if drawn[i, j]:
                assert seen[row, column].any(), (i, j)
            else:
                assert not seen[row, column].all(), (i, j)
    assert not drawn.all()
    assert any(line.endswith("  turn 1") for line in found)


def test_a_trained_row_of_the_mask_has_the_role_of_what_is_trained() -> None:
    """Half of the block is the end of a prompt, which is never trained."""
    of = builder_of()
    inspection, (roles,) = inspected(of, conversation_row(2))
    (layout,) = inspection.layouts
    trained = {f"bold {COLOURS[name]}" for name in ("thinking", "response")}
    for across in range(8, 65, 2):
        lines = list(mask_lines(layout, roles, Style(terminal(across + 14))))[1:]
        colours = {sign: {str(line.spans[0].style) for line in lines if line.plain[0] == sign} for sign in "▌│"}
        assert colours["▌"] <= trained, across
        assert not colours["│"] & trained


class Screen(io.StringIO):
    """Standard output that is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def screen(monkeypatch: pytest.MonkeyPatch, term: str = "xterm-256color") -> Screen:
    """Standard output, ten lines high."""
    made = Screen()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


@pytest.mark.parametrize(
    ("lines", "enabled", "term", "expected"),
    [(20, True, "xterm", True), (5, True, "xterm", False), (20, False, "xterm", False), (20, True, "dumb", False)],
)
def test_what_is_higher_than_the_terminal_goes_through_the_pager(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lines: int,
    enabled: bool,
    term: str,
    expected: bool,
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("PAGER", f"dd status=none of={kept}")
    text = "naïve\n" * lines
    made = screen(monkeypatch, term)
    with paged(enabled) as out:
        out.print(text, end="")
    assert kept.exists() == expected
    assert (kept.read_text(encoding="utf-8") if expected else made.getvalue()) == text
    assert made.getvalue() == ("" if expected else text)


@pytest.mark.parametrize("pager", ["cat", "no-such-pager", "'", ""])
def test_without_a_pager_it_is_printed(monkeypatch: pytest.MonkeyPatch, pager: str) -> None:
    monkeypatch.setenv("PAGER", pager)
    made = screen(monkeypatch)
    with paged() as out:
        out.print("line\n" * 20, end="")
    assert made.getvalue() == "line\n" * 20


def test_in_a_pipe_nothing_is_paged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "no-such-pager")
    with paged() as out:
        out.print("line\n" * 200, end="")
    assert capsys.readouterr().out == "line\n" * 200
