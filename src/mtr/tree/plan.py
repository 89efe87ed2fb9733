"""The tree as plain causal attention over contiguous ranges, for kernels that know no tree mask.

A chain is a run of tokens each of which is the parent of the next: the trunk is one, each branch another. What a
chain sees is the path above it, a few contiguous pieces of the row, and itself causally:

    index   0  1  2  3  4  5  6          chain 0: tokens 0-4, nothing above
            H1 A1 H2 T2 A2 T1 A1         chain 1: tokens 5-6, above it the piece 0-0

    tiles   each piece is a plain call of its own, joined by its log-sum-exp (`mtr.attention.segment`, the CPU)
    rows    each chain is a row of a varlen batch, its keys gathered into one (`mtr.attention.varlen`, FlashAttention)

Both visit the pairs of the mask and no others; the work is the tree's pairs, not T squared. A sliding window or a
chunk leaves out the keys that no query reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtr.tree.layout import Ints
from mtr.tree.mask import FULL, Span, Tree


class Piece(NamedTuple):
    """Indices [start, end) of a path whose first token has this position; positions rise by one along it."""

    start: int
    end: int
    position: int


class Chain(NamedTuple):
    """Tokens [start, end), each the parent of the next."""

    start: int
    end: int
    position: int
    """Of the first token."""
    above: tuple[Piece, ...]
    """The path above, root first."""


def chains(parent: Ints) -> list[Chain]:
    """The chains of a layout in pre-order, in the order of the row; together they are the row."""
    starts = np.flatnonzero(parent != np.arange(len(parent)) - 1)
    if not len(starts) or starts[0] != 0:  # token 0 is a root: its parent -1 equals its index - 1
        starts = np.concatenate([[0], starts])
    holder = np.searchsorted(starts, parent[starts], side="right") - 1  # the chain that the parent is in
    found: list[Chain] = []
    for start, end, token, number in zip(
        starts.tolist(), [*starts[1:].tolist(), len(parent)], parent[starts].tolist(), holder.tolist(), strict=True
    ):
        if token < 0:
            found.append(Chain(start, end, 0, ()))
            continue
        above = found[number]
        piece = Piece(above.start, token + 1, above.position)
        found.append(Chain(start, end, above.position + token + 1 - above.start, (*above.above, piece)))
    return found


def without_padding(parent: Ints) -> Ints:
    """A root that nothing follows is padding: a turn has two tokens or more. One token is left at least."""
    used = np.flatnonzero(parent >= 0)
    return parent[: used[-1] + 1 if len(used) else 1]


def with_padding(x: Tensor, total: int) -> Tensor:
    """[n, ...] -> [1, total, ...], zeros at the padding"""
    return torch.cat([x, x.new_zeros(total - len(x), *x.shape[1:])])[None]


def depths(above: Ints) -> Ints:
    """How many are above each, where those above come first."""
    found = [0] * len(above)
    for number, parent in enumerate(above.tolist()):
        if parent >= 0:
            found[number] = found[parent] + 1
    return np.array(found, np.int64)


def _blocks(chain: Chain, span: Span, step: int | None) -> list[Piece]:
    """The chain cut into blocks of queries: at the borders of chunks, or every `step` tokens."""
    if span.kind == "chunked":
        first = chain.start + span.size - chain.position % span.size
        cuts = [chain.start, *range(first, chain.end, span.size), chain.end]
    else:
        cuts = [*range(chain.start, chain.end, step or chain.end - chain.start), chain.end]
    return [Piece(start, end, chain.position + start - chain.start) for start, end in itertools.pairwise(cuts)]


def _within(pieces: Sequence[Piece], first: int) -> list[Piece]:
    """What is left of a path from a position on."""
    kept = []
    for start, end, position in pieces:
        skipped = max(0, first - position)
        if start + skipped < end:
            kept.append(Piece(start + skipped, end, position + skipped))
    return kept


def _first_seen(block: Piece, span: Span) -> int:
    """The lowest position that some query of the block sees."""
    if span.kind == "sliding":
        return max(0, block.position - span.size + 1)
    return block.position // span.size * span.size if span.kind == "chunked" else 0


# --- rows of a varlen batch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarlenPlan:
    """R rows: queries in layout order, keys gathered; causal, aligned at the bottom right."""

    cu_seq_q: Tensor
    """[R + 1] int32"""
    cu_seq_k: Tensor
    """[R + 1] int32"""
    kv_index: Tensor
    """[G] int64: the keys of row 0, root first, then those of row 1, ..."""
    max_q: int
    max_k: int
    window: int
    """Keys that a query sees at most, itself included; 0: all of its row."""


def varlen_plan(tree: Tree, span: Span = FULL) -> VarlenPlan:
    """One row a chain (a chunk of a chain with chunked attention); its keys are its path."""
    num_q, num_k, keys = [], [], []
    for chain in chains(tree.parent):
        for block in _blocks(chain, span, None):
            own = Piece(chain.start, block.end, chain.position)
            path = _within([*chain.above, own], _first_seen(block, span))
            num_q.append(block.end - block.start)
            num_k.append(sum(piece.end - piece.start for piece in path))
            keys += [np.arange(piece.start, piece.end) for piece in path]
    device = tree.subtree_end.device
    cu_seq_q, cu_seq_k = (on_device(device, np.cumsum([0, *n]).astype(np.int32)) for n in (num_q, num_k))
    window = span.size if span.kind == "sliding" else 0
    return VarlenPlan(cu_seq_q, cu_seq_k, on_device(device, np.concatenate(keys)), max(num_q), max(num_k), window)


def on_device(device: torch.device, values: NDArray[Any]) -> Tensor:
    """On the device. The host does not wait for a copy to CUDA, nor for what the device does first."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- tiles ------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A range of queries that attends to a range of keys in one plain call."""

    start: int
    end: int
    """Queries [start, end)."""
    key_start: int
    key_end: int
    """Keys [key_start, key_end), all before the queries."""
    mask: Tensor | None = None
    """[queries, keys] boolean, where a window cuts through the tile."""

    @property
    def own(self) -> bool:
        """The keys are the queries' own tokens: causal, unless a mask says otherwise."""
        return self.start == self.key_start


_GROUP = 1024
"""Most queries of several chains that share a tile: by then what a call costs beside its pairs is small."""


def tile_plan(tree: Tree, span: Span = FULL) -> list[Tile]:
    """Each chain with itself, then with the path above it.

    The first tiles are `own` and cover every token once, as query and as key. Of the paths above, chains that follow
    one another share a tile over what is common to them: the branches of a trunk are in the row by the depth of their
    fork, deepest first. With a window, chains are cut into blocks of about its size, keys out of every query's reach
    are left out, and a mask cuts what is left.
    """
    found = chains(tree.parent)
    if span.kind == "full":
        own = [Tile(chain.start, chain.end, chain.start, chain.end) for chain in found]
        return own + [tile for group in _groups(found) for tile in group.tiles()]
    own, above = [], []
    step = max(span.size, 64) if span.kind == "sliding" else None
    for chain in found:
        for block in _blocks(chain, span, step):
            before = Piece(chain.start, block.start, chain.position)
            path = _within([*chain.above, before], _first_seen(block, span))
            above += [tile for piece in path for tile in _tiles(piece, block, span)]
            own.append(_own_tile(block, span))
    return own + above


class _Group(NamedTuple):
    """Chains that follow one another, and what the paths above them have in common."""

    chains: list[Chain]
    common: list[Piece]
    above: int
    """Tokens of the paths above, each counted."""

    @property
    def num_keys(self) -> int:
        """Keys that the tiles visit: what is common once, the rest chain by chain."""
        shared = _length(self.common)
        return shared + self.above - len(self.chains) * shared

    def joined(self, other: _Group) -> _Group:
        """Two paths of a tree part once: up to there their pieces begin at the same tokens."""
        pairs = itertools.takewhile(
            lambda pair: pair[0].start == pair[1].start, zip(self.common, other.common, strict=False)
        )
        common = [one._replace(end=min(one.end, two.end)) for one, two in pairs]
        return _Group([*self.chains, *other.chains], common, self.above + other.above)

    def tiles(self) -> Iterator[Tile]:
        for piece in self.common:
            yield Tile(self.chains[0].start, self.chains[-1].end, piece.start, piece.end)
        for chain in self.chains:
            for piece in _within(chain.above, _length(self.common)):
                yield Tile(chain.start, chain.end, piece.start, piece.end)


def _groups(found: Sequence[Chain]) -> Iterator[_Group]:
    """Chains are joined as long as that spares keys."""
    group: _Group | None = None
    for chain in found:
        if not chain.above:
            continue
        single = _Group([chain], list(chain.above), _length(chain.above))
        if group and group.chains[-1].end == chain.start and chain.end - group.chains[0].start <= _GROUP:
            joined = group.joined(single)
            if joined.num_keys < group.num_keys + single.num_keys:
                group = joined
                continue
        if group:
            yield group
        group = single
    if group:
        yield group


def _length(path: Iterable[Piece]) -> int:
    return sum(piece.end - piece.start for piece in path)


def _tiles(keys: Piece, block: Piece, span: Span) -> list[Tile]:
    """A piece of the path above: as it is, or cut where some queries' window ends."""
    if span.kind != "sliding":
        return [Tile(block.start, block.end, keys.start, keys.end)]
    last = block.position + block.end - block.start - 1
    seen_by_all = min(keys.end, max(keys.start, keys.start + last - span.size + 1 - keys.position))
    tiles = []
    if keys.start < seen_by_all:
        q = torch.arange(block.position, last + 1)[:, None]
        k = torch.arange(keys.position, keys.position + seen_by_all - keys.start)[None, :]
        tiles.append(Tile(block.start, block.end, keys.start, seen_by_all, q - k < span.size))
    if seen_by_all < keys.end:
        tiles.append(Tile(block.start, block.end, seen_by_all, keys.end))
    return tiles


def _own_tile(block: Piece, span: Span) -> Tile:
    start, end, _ = block
    if span.kind != "sliding" or end - start <= span.size:
        return Tile(start, end, start, end)
    index = torch.arange(end - start)
    distance = index[:, None] - index[None, :]
    return Tile(start, end, start, end, (distance >= 0) & (distance < span.size))
