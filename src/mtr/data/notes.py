"""Notes on the data before training: the shape it is read as, rows that repeat each other, and what is odd in rows.

Only the first rows are read, and nothing is changed: a note is never an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from mtr.data.conversation import Conversation
from mtr.data.mixture import FIRST_ROWS, Mixture
from mtr.data.stream import Stream
from mtr.errors import RowError

_RARE = 20
"""Chats are taken for split if at least one row in so many shows it."""
_INLINE_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def describe_data(data: Mixture | Stream) -> list[str]:
    """Notes on the data, one line each; none about a stream."""
    if isinstance(data, Stream):
        return []
    notes = [f"{s.name} is read as {s.reader.shape}" for s in data.sources if s.reader.shape != "messages"]
    notes = notes if len(notes) <= 3 else [*notes[:2], f"... and {len(notes) - 2} more files"]
    taken = [t for i in range(min(len(data), FIRST_ROWS)) if (t := _try_take(data, i)) is not None]
    first = f"of the first {len(taken)} rows"
    if equal := count_duplicates(taken):
        notes.append(f"{equal} {first} are equal to an earlier one: their turns count twice; remove them, unless meant")
    if beginnings := count_beginnings(taken):
        notes.append(
            f"{beginnings} {first} are the beginning of another row: the data is already split per turn, and such "
            "turns count twice; keep only the longest row of each conversation"
        )
    remarks = Counter(remark for conversation in taken for remark in conversation.remarks)
    return notes + [f"{number} {first}: {remark}" for remark, number in remarks.most_common()]


def count_duplicates(conversations: Sequence[Conversation]) -> int:
    """How many conversations are equal to an earlier one, weights and other columns aside."""
    seen = Counter(
        json.dumps([conversation.tools, *(dict(m.data) for m in conversation.messages)], sort_keys=True, default=str)
        for conversation in conversations
    )
    return seen.total() - len(seen)


def count_beginnings(conversations: Sequence[Conversation]) -> int:
    """How many conversations are the beginning of another one, where that shows that chats were split per turn.

    Splitting gives each longer row its beginning, one turn shorter, as another row, which nothing else continues. Chats
    that merely begin alike (a greeting and its answer) do so for few rows, or are continued in several ways.

    Thinking is ignored, because splitting per turn often removes it from earlier turns.
    """
    paths = [_prefixes(conversation) for conversation in conversations]
    ends: dict[int, list[int]] = defaultdict(list)
    continued: dict[int, set[int]] = defaultdict(set)
    for number, path in enumerate(paths):
        ends[path[-1]].append(number)
        for prefix, longer in pairwise(path):
            continued[prefix].add(longer)
    several = [path for path in paths if len(path) > 1]
    split = [path[-2] for path in several if path[-2] and path[-2] in ends and len(continued[path[-2]]) == 1]
    if 2 * len(split) < len(several) or _RARE * len(split) < len(paths):
        return 0
    return len({number for prefix in split for number in ends[prefix]})


def _prefixes(conversation: Conversation) -> list[int]:
    """Of each turn, a hash of the chat up to it, thinking left out; 0 if the turn is not trained."""
    prefix, prefixes = hash(json.dumps(conversation.tools, sort_keys=True, default=str)), []
    for message in conversation.messages:
        calls = json.dumps(message.tool_calls, sort_keys=True, default=str)
        text = _INLINE_THINKING.sub("", message.content).strip()
        prefix = hash((prefix, message.role, text, calls))
        if message.role == "assistant":
            prefixes.append(prefix if message.weight > 0 else 0)
    return prefixes


def _try_take(data: Mixture, index: int) -> Conversation | None:
    try:
        taken = data.take(index)
    except RowError:
        return None
    return taken if isinstance(taken, Conversation) else None
