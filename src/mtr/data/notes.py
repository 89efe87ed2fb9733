"""Remarks on the data before training: the shape it is read as, and rows that repeat each other.

Only the first rows are read, and nothing is changed: a remark is never an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from mtr.data.conversation import Conversation
from mtr.data.mixture import FIRST_ROWS, Mixture
from mtr.data.stream import Stream
from mtr.errors import RowError

_INLINE_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def describe_data(data: Mixture | Stream) -> list[str]:
    """Remarks on the data, one line each; none about a stream."""
    if isinstance(data, Stream):
        return []
    notes = [f"{s.name} is read as {s.reader.shape}" for s in data.sources if s.reader.shape != "messages"]
    notes = notes if len(notes) <= 3 else [*notes[:2], f"... and {len(notes) - 2} more files"]
    taken = [t for i in range(min(len(data), FIRST_ROWS)) if (t := _try_take(data, i)) is not None]
    if repeating := count_repeating(taken):
        notes.append(
            f"{repeating} of the first {len(taken)} rows are the beginning of another row or equal to one: the data is "
            "already split per turn or has duplicate rows, and such turns count twice; keep only the longest row of "
            "each conversation"
        )
    return notes


def count_repeating(conversations: Sequence[Conversation]) -> int:
    """How many conversations are the beginning of a longer one, or equal to an earlier one.

    Thinking is ignored in the first case, because splitting per turn often removes it from earlier turns.
    """
    continued: dict[int, set[int]] = defaultdict(set)
    ends: list[int] = []
    seen: Counter[str] = Counter()
    repeating = set()
    for number, conversation in enumerate(conversations):
        texts = [json.dumps(dict(m.data), sort_keys=True, default=str) for m in conversation.messages]
        tools = json.dumps(conversation.tools, sort_keys=True, default=str)
        seen["\0".join([tools, *texts])] += 1
        if seen["\0".join([tools, *texts])] > 1:
            repeating.add(number)
        prefix, prefixes = hash(tools), []
        for message in conversation.messages:
            calls = json.dumps(message.tool_calls, sort_keys=True, default=str)
            text = _INLINE_THINKING.sub("", message.content).strip()
            prefix = hash((prefix, message.role, text, calls))
            if message.role == "assistant":
                prefixes.append(prefix if message.weight > 0 else 0)
        ends.append(prefixes[-1])
        for earlier in prefixes[:-1]:
            continued[earlier].add(number)
    repeating |= {number for number, end in enumerate(ends) if end and continued.get(end, set()) - {number}}
    return len(repeating)


def _try_take(data: Mixture, index: int) -> Conversation | None:
    try:
        taken = data.take(index)
    except RowError:
        return None
    return taken if isinstance(taken, Conversation) else None
