"""Rows about images, videos or sound: only text is trained, and an answer about what it does not see is a guess.

    {"content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}       a part of a message
    {"messages": [...], "images": ["cat.png"]}                                         a list beside the messages
    {"messages": [{"content": "<image>What is this?"}, ...], "image": "cat.png"}       a place in the text for one

A column `image` alone says nothing: it may name what a container is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtr.data.conversation import Conversation
from mtr.errors import RowError

REASON = "images, videos or sound, and only text is trained"
_PARTS = ("image", "video", "audio")
"""Of which names of a part's type are made: image_url, input_audio."""
_LISTS = ("images", "videos", "audios")


def check_parts(content: list[Any], where: str) -> None:
    """
    Raises:
        RowError: a part of a message's content is not for the eyes of a text model.
    """
    types = [str(part.get("type")) for part in content if isinstance(part, Mapping)]
    if found := [kind for kind in types if any(name in kind.split("_") for name in _PARTS)]:
        raise RowError(where, REASON, f" (a part of type {found[0]:.80}); remove the row")


def check_columns(conversation: Conversation) -> None:
    """
    Raises:
        RowError: the row has something for the eyes or ears beside its messages.
    """
    row = conversation.row
    columns = [name for name in _LISTS if isinstance(row.get(name), list) and row[name]]
    columns += [name for name in _PARTS if row.get(name) is not None and _has_place(conversation, f"<{name}>")]
    if columns:
        raise RowError(conversation.where, REASON, f" (column {columns[0]!r}); remove the row")


def _has_place(conversation: Conversation, tag: str) -> bool:
    return any(tag in message.content for message in conversation.messages)
