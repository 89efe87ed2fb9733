"""The tree as segments: runs of tokens that are cut at every fork, so that each continues the end of another.

    index    0  1  2  3  4  5  6          segment 0: token  0       above it nothing      depth 0
             H1 A1 H2 T2 A2 T1 A1         segment 1: tokens 1-4     above it segment 0    depth 1
                                          segment 2: tokens 5-6     above it segment 0    depth 1

A chain of `mtr.tree.plan` may fork in its middle; a segment never does: what its last token leaves is what every
segment below it begins with. Padding at the end of the row is in no segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mtr.tree.layout import Ints
from mtr.tree.mask import Tree
from mtr.tree.plan import depths, on_device, without_padding


@dataclass(frozen=True)
class Segments:
    """S segments in the order of the row, which they cover up to the padding. On the host."""

    start: Ints
    """[S] first token"""
    end: Ints
    """[S] token after the last"""
    above: Ints
    """[S] the segment that it continues; -1 at a root"""
    depth: Ints
    """[S] segments above it"""

    @property
    def num_tokens(self) -> int:
        """Without the padding."""
        return int(self.end[-1])


def segments(tree: Tree) -> Segments:
    parent = without_padding(tree.parent)
    index = np.arange(len(parent))
    children = np.bincount(parent[parent >= 0], minlength=len(parent))
    begins = (parent != index - 1) | (children[index - 1] > 1)
    begins[0] = True
    start = np.flatnonzero(begins)
    above = np.where(parent[start] < 0, -1, np.searchsorted(start, parent[start], side="right") - 1)
    return Segments(start, np.append(start[1:], len(parent)), above, depths(above))


# --- levels -----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """n segments of one depth and of similar length as a batch of L tokens each."""

    shape: tuple[int, int]
    """(n, L)"""
    above: Tensor | None
    """[n] index of each one's parent among the segments of the level above; None at the roots"""


@dataclass(frozen=True)
class LevelPlan:
    """Segments level by level. The batches of all levels, flattened, are one gather of the row."""

    gather: Tensor
    """[G] token of each place of the batches; `num_tokens` where there is none"""
    back: Tensor
    """[num_tokens] place of each token in the batches"""
    levels: tuple[tuple[Rows, ...], ...]
    num_tokens: int


def level_plan(tree: Tree) -> LevelPlan:
    """Within a level, a row of a batch is at most twice as long as its segment."""
    found = segments(tree)
    length = found.end - found.start
    place = np.zeros(len(length), np.int64)
    back = np.empty(found.num_tokens, np.int64)
    gather: list[Ints] = []
    levels, offset = [], 0
    device = tree.subtree_end.device
    for depth in range(found.depth.max() + 1):
        members = np.flatnonzero(found.depth == depth)
        members = members[np.argsort(-length[members], kind="stable")]
        place[members] = np.arange(len(members))
        rows = []
        for group in _of_similar_length(members, length):
            step = np.arange(length[group[0]])
            token = found.start[group][:, None] + step
            taken = step < length[group][:, None]
            back[token[taken]] = offset + np.flatnonzero(taken)
            gather.append(np.where(taken, token, found.num_tokens).ravel())
            offset += token.size
            above = on_device(device, place[found.above[group]]) if depth else None
            rows.append(Rows((token.shape[0], token.shape[1]), above))
        levels.append(tuple(rows))
    return LevelPlan(
        on_device(device, np.concatenate(gather)), on_device(device, back), tuple(levels), found.num_tokens
    )


def _of_similar_length(members: Ints, length: Ints) -> list[Ints]:
    """Runs of members, which are ordered by falling length, whose last one has more than half the first one's."""
    groups, first = [], 0
    for number in range(1, len(members) + 1):
        if number == len(members) or 2 * length[members[number]] <= length[members[first]]:
            groups.append(members[first:number])
            first = number
    return groups


# --- convolution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvolutionPlan:
    """Runs of tokens, each after the last tokens of its path, one after another: G places."""

    gather: Tensor
    """[G] token of each place; `num_tokens` above a root"""
    keep: Tensor
    """[num_tokens] place of each token"""
    num_tokens: int


def convolution_plan(tree: Tree, width: int) -> ConvolutionPlan:
    """Each chain with the width - 1 tokens above it. A fork needs no cut: what is below it is another chain."""
    parent = without_padding(tree.parent)
    index = np.arange(len(parent))
    begins = parent != index - 1
    begins[0] = True
    start = np.flatnonzero(begins)
    history = np.empty((len(start), width - 1), np.int64)
    ancestor = parent[start]
    for back in range(width - 2, -1, -1):
        history[:, back] = np.where(ancestor < 0, len(parent), ancestor)
        ancestor = np.where(ancestor < 0, -1, parent[ancestor])
    chain = np.cumsum(begins) - 1
    keep = index + (chain + 1) * (width - 1)
    gather = np.empty(len(parent) + history.size, np.int64)
    gather[keep] = index
    gather[(start + np.arange(len(start)) * (width - 1))[:, None] + np.arange(width - 1)] = history
    device = tree.subtree_end.device
    return ConvolutionPlan(on_device(device, gather), on_device(device, keep), len(parent))
