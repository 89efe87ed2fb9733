"""A tree of tokens in the order of the conversation, for people to read: runs of one role, and where the tree forks.

The layout has the largest child first. Here the branches of earlier turns come right after the token at which they
leave, and the path to the last turn goes on below them:

    H1 ─┬─ A1 H2 ── T2 A2        prompt         H1
        └─ T1 A1                 ├─ turn 0      T1 A1
                                 copy           A1
                                 prompt         H2
                                 turn 1         T2 A2
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mtr.checks.inspection import Inspection
from mtr.checks.roles import COPY, PROMPT, RESPONSE, THINKING, TokenRoles
from mtr.tree.layout import Layout


@dataclass(frozen=True)
class Run:
    """Tokens [start, end) of a layout, one path, all of one role and trained or not."""

    start: int
    end: int
    role: int
    """Index in `mtr.checks.roles.ROLES`."""
    trained: bool
    message: int
    """-1: of no message."""
    depth: int
    """How many branches it is in."""


@dataclass(frozen=True)
class Branch:
    """Tokens that leave the path of the last turn begin here."""

    turns: tuple[int, ...]
    """That pass through it, ascending."""
    depth: int
    state: Literal["begins", "goes on", "context"]
    """begins: with the completion of its one turn, or the end of its prompt; goes on: with a later token of that;
    context: with something else, or with what several turns see.
    """


@dataclass(frozen=True)
class Begin:
    """The completion of a turn begins here."""

    turn: int
    depth: int


def outline(inspection: Inspection, tree: int, roles: TokenRoles) -> Iterator[Run | Branch | Begin]:
    """What there is to see of a tree, in reading order.

    Headers of assistant messages, and what the template writes after the end of a trained turn, are joined with the run
    beside them.
    """
    layout = inspection.layouts[tree]
    turn_of = {turn.message_index: turn.turn for turn in inspection.turns}
    chains, runs = _Chains(layout), _Runs(inspection, roles)
    begun: set[int] = set()
    stack = [(chain, 0, False) for chain in reversed(chains.roots)]
    while stack:
        chain, depth, leaves = stack.pop()
        turns = chains.turns[chain]
        if leaves:
            state = _state(turns, int(roles.role[chains.starts[chain]]), begun)
            yield Branch(turns, depth, state)
            begun |= set(turns) if state == "begins" else set()
        for run in runs.of(chains.starts[chain], chains.ends[chain], depth):
            turn = turn_of.get(run.message)
            if run.role in (THINKING, RESPONSE) and turn is not None and turn not in begun:
                begun.add(turn)
                yield Begin(turn, depth)
            yield run
        below = chains.children[chain]
        stack += [(last, depth, False) for last in below[-1:]]
        stack += [(branch, depth + 1, True) for branch in reversed(below[:-1])]


def _state(turns: tuple[int, ...], role: int, begun: set[int]) -> Literal["begins", "goes on", "context"]:
    if len(turns) > 1 or role not in (THINKING, RESPONSE, PROMPT):
        return "context"
    return "goes on" if turns[0] in begun else "begins"


class _Chains:
    """The layout cut where it forks."""

    def __init__(self, layout: Layout) -> None:
        total, parent = layout.num_tokens, layout.parent
        children = np.bincount(parent[parent >= 0], minlength=total)
        cut = np.ones(total, bool)
        cut[1:] = (parent[1:] != np.arange(total - 1)) | (children[:-1] > 1)
        self.starts: list[int] = np.flatnonzero(cut).tolist()
        self.ends = [*self.starts[1:], total]
        chain_of = np.cumsum(cut) - 1
        above = [int(chain_of[parent[start]]) if parent[start] >= 0 else -1 for start in self.starts]
        passing: list[set[int]] = [set() for _ in self.starts]
        for leaf, view in layout.leaves:
            chain = int(chain_of[leaf])
            while chain >= 0:
                passing[chain].add(view.turn)
                chain = above[chain]
        self.turns = [tuple(sorted(turns)) for turns in passing]
        below: dict[int, list[int]] = defaultdict(list)
        for chain, over in enumerate(above):
            below[over].append(chain)
        for siblings in below.values():  # that of the last turn at the end
            siblings.sort(key=lambda chain: (self.turns[chain][-1], self.turns[chain]))
        self.children = [below[chain] for chain in range(len(self.starts))]
        self.roots = below[-1]


class _Runs:
    """Cuts chains in runs of one role and message."""

    def __init__(self, inspection: Inspection, roles: TokenRoles) -> None:
        self._roles = roles
        self._trained = roles.weight > 0
        assistants = np.zeros(len(inspection.conversation.messages) + 1, bool)  # the last one: of no message
        assistants[inspection.conversation.turns] = True
        self._header = (roles.role == PROMPT) & assistants[roles.message]
        changes = [np.diff(array) != 0 for array in (roles.role, roles.message, self._trained)]
        self._cuts = np.flatnonzero(np.logical_or.reduce(changes)) + 1

    def of(self, start: int, end: int, depth: int) -> list[Run]:
        """The runs of a chain; what belongs to no message's own text is joined with a neighbour."""
        first, last = np.searchsorted(self._cuts, [start, end - 1], side="right")
        starts = [start, *self._cuts[first:last].tolist()]
        found: list[Run] = []
        held: int | None = None  # where the next run has to begin
        for at, stop in zip(starts, [*starts[1:], end], strict=True):
            run = Run(at if held is None else held, stop, *self._kind(at), depth)
            held = None
            before = found[-1] if found else None
            if self._header[at] and before is not None and not before.trained:
                found[-1] = replace(before, end=stop)
            elif stop < end and not run.trained and not self._trained[stop] and self._is_between(at, before):
                held = run.start
            else:
                found.append(run)
        return found

    def _kind(self, at: int) -> tuple[int, bool, int]:
        return int(self._roles.role[at]), bool(self._trained[at]), int(self._roles.message[at])

    def _is_between(self, at: int, before: Run | None) -> bool:
        """Whether these tokens are a header, or what the template writes after the end of a trained turn."""
        if before is None:
            return bool(self._header[at])
        return before.trained and before.message == self._roles.message[at] and self._roles.role[at] == COPY
