"""Claims: a role has one colour in the pictures, on the pages in light and dark, and in the terminal, in shades of its
own; the colours of two roles are far apart; every place has all roles.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator

import pytest

from mtr.checks.role_colours import ON_WHITE
from mtr.checks.roles import ROLES
from mtr.cli.views.inspect_style import COLOURS, FILLS, MEANINGS
from mtr.pages.shell import asset

GREY = {"prompt"}
"""Without a hue: what the model is fed and never says."""
SHADE, APART = 12, 20
"""Degrees of hue that the shades of one role differ by at most, and two roles at least."""


def hue_and_chroma(colour: str) -> tuple[float, int]:
    """Of `#rrggbb`: degrees, and how far its channels are apart, from 0 to 255."""
    channels = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return 360 * colorsys.rgb_to_hsv(*channels)[0], max(channels) - min(channels)


def of_terminal(colour: str) -> str:
    """`color(n)` of the 256 colours of xterm, 16 to 255, as `#rrggbb`."""
    found = re.fullmatch(r"color\((\d+)\)", colour)
    assert found
    number = int(found[1]) - 16
    assert 0 <= number < 240
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (
        (levels[number // 36], levels[number // 6 % 6], levels[number % 6])
        if number < 216
        else 3 * (8 + 10 * (number - 216),)
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def of_page(role: str) -> Iterator[str]:
    """Text in light and dark; the grounds are too pale to have a hue that is seen."""
    found = re.search(rf"--{role}: light-dark\((#[0-9a-f]{{6}}), (#[0-9a-f]{{6}})\);", asset("shell.css"))
    assert found, role
    yield from found.groups()


def shades(role: str) -> list[str]:
    """All colours of a role that are strong enough to have a hue."""
    return [ON_WHITE[role], *of_page(role), of_terminal(FILLS[role])]


def away(one: float, other: float) -> float:
    """Degrees between two hues."""
    return min(abs(one - other), 360 - abs(one - other))


@pytest.mark.parametrize("role", ROLES)
def test_the_shades_of_a_role_have_one_hue_that_no_other_role_has(role: str) -> None:
    hue, _ = hue_and_chroma(ON_WHITE[role])
    for shade in shades(role):
        own, chroma = hue_and_chroma(shade)
        assert (chroma < 30) == (role in GREY), shade
        if role not in GREY:
            assert away(hue, own) <= SHADE, shade
            for other in set(ROLES) - GREY - {role}:
                assert away(own, hue_and_chroma(ON_WHITE[other])[0]) >= APART, (shade, other)


def test_every_place_has_all_roles() -> None:
    for named in (ON_WHITE, COLOURS, FILLS, MEANINGS):
        assert set(named) == set(ROLES)
    for role in ROLES:
        assert f"var(--{role})" in asset("inspect.css")
        for mark, variable in (("c", role), ("b", f"{role}-bg"), ("f", f"fill-{role}")):
            rule = re.search(rf"\.r-{role} {{([^}}]*)}}", asset("inspect.css"))
            assert rule
            assert f"--{mark}: var(--{variable});" in rule[1]
        assert re.search(rf"--fill-{role}: color-mix\(in srgb, var\(--{role}\) ", asset("inspect.css"))


def test_the_text_of_a_terminal_has_the_colour_of_its_areas() -> None:
    assert {role: FILLS[role] for role in ROLES if role not in GREY} == {
        role: COLOURS[role] for role in ROLES if role not in GREY
    }
    assert COLOURS["prompt"] == "default"
