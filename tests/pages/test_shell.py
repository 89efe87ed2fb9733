"""Claims: what a page is given cannot become markup or script; the page names its scripts by hash and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from mtr.pages.shell import json_for_html, page

HOSTILE = "</script><img src=x onerror=alert(1)><!-- & \u2028 \ud800"


def scripts(text: str) -> list[str]:
    """What a browser would run: the text of each script without a type."""
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


def test_data_stays_inside_its_script_and_is_read_back() -> None:
    text = json_for_html({"x": HOSTILE, "y": float("nan")})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": HOSTILE, "y": None}


def test_a_title_is_text() -> None:
    text = page(HOSTILE, "<p>body</p>")
    assert "<img" not in text
    assert text.count("&lt;img src=x") == 2
    text.encode("utf-8")


def test_only_its_own_scripts_may_run() -> None:
    text = page("Page", "<p>body</p>", script="let mine = 1;", data=[HOSTILE])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    allowed = re.findall(r"'sha256-([^']+)'", policy[1])
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts(text)]
    assert hashes == allowed
    assert "let mine = 1;" in scripts(text)[-1]
    assert policy[1].startswith("default-src 'none';")
    assert "'unsafe-inline'" not in policy[1].split("script-src")[1]


def test_it_names_nothing_outside_itself() -> None:
    text = page("Page", "<p>body</p>", data=[1])
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text.replace("http://www.w3.org/2000/svg", ""))
