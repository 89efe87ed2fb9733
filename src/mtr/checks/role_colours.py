"""Colours of the roles of tokens in pictures with a white ground; pages and terminals have shades of their own."""

from __future__ import annotations

ON_WHITE = {
    "system": "#b3ae8b",
    "prompt": "#c3c8d0",
    "tool": "#cf9a63",
    "thinking": "#a374c4",
    "response": "#1f5a96",
    "copy": "#6fb3a6",
}
