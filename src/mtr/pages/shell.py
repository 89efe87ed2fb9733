"""The frame of every page: one HTML document that needs no network and runs no script but its own.

    page("Row 3", body, style=css, script=js, data=[...])  ->  <!doctype html> ...

`body` is trusted HTML: escape what comes from data (`html.escape`), or pass it as `data` and let the script write it as
text. The Content-Security-Policy of the page forbids everything that is not named in it: requests of any kind, frames,
forms, and inline scripts other than those written here, which it knows by their hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources

from mtr.files import write_json


def page(title: str, body: str, *, style: str = "", script: str = "", data: object = None) -> str:
    """A complete HTML document in light and dark, with a heading and a switch between both.

    Args:
        title: plain text, for the tab and the heading.
        body: trusted HTML of the main part.
        style: CSS after that of `shell.css`.
        script: JavaScript that runs when the page is built; `pageData()` in it returns `data`.
        data: anything that JSON can hold; numbers that are not finite become null.
    """
    scripts = [asset("theme.js"), f"{asset('shell.js')}\n{script}"]
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(_hash(text) for text in scripts)}"
    )
    embedded = "" if data is None else f'<script type="application/json" id="data">{json_for_html(data)}</script>\n'
    document = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="generator" content="mtr">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>\n{asset('shell.css')}\n{style}</style>\n<script>{scripts[0]}</script>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header class="top"><h1>{html.escape(title)}</h1>'
        '<button type="button" id="theme" class="quiet">Theme: system</button></header>\n'
        f'<main id="main" tabindex="-1">\n{body}\n'
        '<noscript><p class="note">This page draws itself with JavaScript, which is switched off.</p></noscript>\n'
        f"</main>\n{embedded}<script>{scripts[1]}</script>\n</body>\n</html>\n"
    )
    return document.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no character of UTF-8


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return resources.files("mtr.pages").joinpath(name).read_text(encoding="utf-8")


def json_for_html(data: object) -> str:
    """JSON that can stand inside `<script>`: it contains no `<`, `>` or `&`, so nothing in it ends or opens a tag."""
    text = write_json(None, data)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
    return f"'sha256-{digest}'"
