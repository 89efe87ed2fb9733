"""How much of a long conversation is worth rendering turn by turn: up to where all further prompts are too long.

The N prompts of a conversation have quadratic size. From some turn on they are too long to be trained, and all begin
with the same tokens, more than fit; or the template refuses all of them for the same reason. That is their fate, and
the first turn that shares it is found by bisection:

    turn     0  1  2  3  4  5  6  7  8  9
    prompt   |  fits  |  |  too long, all begin alike
                        '--- decided: neither rendered nor encoded, but the last one and some of the others

Prompts may grow and shrink, as with thinking that is dropped later: turns before the first that begins like the last
one are all rendered. That the prompts in between begin like those that were looked at is an assumption about the
template, the one that `mtr.chat.history` makes too. Conversations that are cheap to render in full do not need it.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence

from mtr.data.conversation import Conversation, Message

Fate = str | tuple[int, ...] | None
"""Of a prompt that is too long the first tokens, of one that the template refuses the reason; else None."""

_CHEAP = 16_000_000
"""Prompts that have so many characters together are all rendered and encoded: a second or two."""
_FAR = 2_000_000
"""Characters of the longest prompt that is looked at; longer ones are taken to be like it."""
_HEADER = 100
"""Characters that a message costs in addition to its own."""
_LOOKED_AT = 4, 32
"""Least and most turns that are looked at between the first of a fate and the last, spread evenly."""
_FATES = 3
"""Different fates that are looked for."""


def decided(conversation: Conversation, wanted: Sequence[bool], fate: Callable[[int], Fate]) -> list[Fate]:
    """The fates of the last turns of a long conversation, as far as they are known without drafting these turns.

    Args:
        wanted: of each turn, whether it would be trained if it could be.
        fate: of the turn of a message; it renders the prompt.

    Returns:
        None of them None; empty for a conversation that is cheap, or whose last turn can be drafted.
    """
    turns, sizes = conversation.turns, _prompt_sizes(conversation)
    cost = list(itertools.accumulate(sizes[i] * wants for i, wants in zip(turns, wanted, strict=True)))
    fates: list[Fate] = []
    for _ in range(_FATES):
        end = len(turns) - len(fates)
        if not end or cost[end - 1] <= _CHEAP:
            break
        last = min(bisect_left(turns, _FAR, hi=end, key=sizes.__getitem__), end - 1)
        found = fate(turns[last])
        looks = min(max(_CHEAP // 2 // (sizes[turns[last]] + 1), _LOOKED_AT[0]), _LOOKED_AT[1])
        start = None if found is None else _first(turns[: last + 1], fate, found, looks)
        if start is None:
            break
        fates = [found] * (end - start) + fates
    return fates


def _first(turns: Sequence[int], fate: Callable[[int], Fate], wanted: Fate, looks: int) -> int | None:
    """The number of the first turn from which on all have the fate of the last one; None if it comes and goes.

    Args:
        looks: turns to look at after the first, one at random in each of so many parts of equal size.
    """
    start = bisect_left(turns[:-1], True, key=lambda index: fate(index) == wanted)
    between, rng = range(start, len(turns) - 1), random.Random(len(turns))
    looks = min(looks, len(between))
    parts = (between[len(between) * i // looks : len(between) * (i + 1) // looks] for i in range(looks))
    return start if all(fate(turns[rng.choice(part)]) == wanted for part in parts) else None


def _prompt_sizes(conversation: Conversation) -> list[int]:
    """Of each message about how many characters the prompt before it has."""
    tools = len(str(conversation.tools)) if conversation.tools else 0
    return list(itertools.accumulate(map(_size, conversation.messages), initial=tools))


def _size(message: Message) -> int:
    calls = sum(len(str(call)) for call in message.tool_calls)
    return _HEADER + len(message.content) + len(message.thinking or "") + calls
