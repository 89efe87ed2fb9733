"""The tree as chunks of equal size: what happens inside them is one batch, and only states go from one to the next.

Each chain is cut every C tokens. A chunk continues another one from the middle, if the path forks there: from its
first `used` tokens.

    chain 0   [ 0 .. 63 ][ 64 .. 127 ][ 128 .. 150 ]
    chain 1                    └─ from token 100, used = 37 of the second chunk  [ 151 .. 190 ]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr.tree.mask import Tree
from mtr.tree.plan import depths, on_device, with_padding, without_padding

CHUNK = 32
"""Tokens of a chunk."""


class Level(NamedTuple):
    """Chunks [start, end), all of one depth."""

    start: int
    end: int
    above: Tensor
    """[end - start] the chunks that they continue"""


@dataclass(frozen=True)
class Pieces:
    """The tokens of a pack as N pieces of C places."""

    gather: Tensor
    """[N * C] token of each place; the last one of its piece where that is shorter, after all that is read"""
    valid: Tensor
    """[N, C] whether the place holds a token"""
    back: Tensor
    """[num_tokens] place of each token"""

    @property
    def num_tokens(self) -> int:
        """Without the padding."""
        return len(self.back)

    def cut(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [N, C, ...]"""
        return torch.unflatten(x[0].index_select(0, self.gather), 0, tuple(self.valid.shape))

    def joined(self, x: Tensor, total: int) -> Tensor:
        """[N, C, ...] -> [1, total, ...], zeros at the padding"""
        return with_padding(x.flatten(0, 1).index_select(0, self.back), total)


@dataclass(frozen=True)
class ChunkPlan(Pieces):
    """N chunks in the order of their depth: the R roots first, then the E = N - R that continue another."""

    above: Tensor
    """[E] the chunk that each continues"""
    used: Tensor
    """[E] tokens of it that are on the path, at least 1"""
    levels: tuple[Level, ...]
    """Of all but the roots."""

    @property
    def num_roots(self) -> int:
        return len(self.valid) - len(self.above)

    @cached_property
    def lower(self) -> Tensor:
        """[C, C] whether the place of a column is not after that of the row"""
        size = self.valid.shape[1]
        return torch.ones(size, size, dtype=torch.bool, device=self.valid.device).tril()

    @cached_property
    def before_fork(self) -> Tensor:
        """[E, C] whether a place of the chunk above is on the path"""
        return torch.arange(self.valid.shape[1], device=self.used.device) < self.used[:, None]

    def at_fork(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [E, ...]: of the chunk above, at the last token of the path"""
        return x[self.above, self.used - 1]


def chunk_plan(tree: Tree, size: int = CHUNK) -> ChunkPlan:
    parent = without_padding(tree.parent)
    total = len(parent)
    begins = parent != np.arange(total) - 1
    begins[0] = True
    chain_start = np.flatnonzero(begins)
    chain_end = np.append(chain_start[1:], total)
    first = np.concatenate([np.arange(s, e, size) for s, e in zip(chain_start, chain_end, strict=True)])
    end = np.minimum(first + size, np.append(first[1:], total))
    holder = np.repeat(np.arange(len(first)), end - first)
    above = np.where(parent[first] < 0, -1, holder[parent[first]])
    used = np.where(above < 0, 0, parent[first] - first[above] + 1)

    depth = depths(above)
    order = np.argsort(depth, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    step = np.arange(size)
    token = first[order][:, None] + step
    valid = token < end[order][:, None]
    back = np.empty(total, np.int64)
    back[token[valid]] = np.flatnonzero(valid)
    roots = int((depth == 0).sum())
    device = tree.subtree_end.device
    above_all = on_device(device, place[above[order][roots:]])
    ends = np.cumsum(np.bincount(depth))
    levels = tuple(Level(int(s), int(e), above_all[s - roots : e - roots]) for s, e in itertools.pairwise(ends))
    return ChunkPlan(
        gather=on_device(device, np.minimum(token, end[order][:, None] - 1).ravel()),
        valid=on_device(device, valid),
        back=on_device(device, back),
        above=above_all,
        used=on_device(device, used[order][roots:]),
        levels=levels,
    )
