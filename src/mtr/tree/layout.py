"""Turn views of a group become one layout: a prefix tree, flattened.

    view 1:  H1 T1 A1                tree:  H1 ─┬─ A1 H2 ── T2 A2      trunk first (the largest child)
    view 2:  H1 A1 H2 T2 A2                     └─ T1 A1               branch

    index         0  1  2  3  4  5  6          H1 A1 H2 T2 A2 T1 A1
    position_ids  0  1  2  3  4  1  2          depth in the tree
    parent       -1  0  1  2  3  0  5
    subtree_end   7  5  5  5  5  7  7          visible(q, k) = (k <= q) & (q < subtree_end[k])

Every root-to-leaf path is a turn view, so a token that attends to its ancestors computes what the separate pass
would. Supervision is a list of triples (predictor, target_id, weight): at a fork one token predicts several
successors, and the token before a copy in memory is not its parent.

Invariants: `unroll(merge(views)) == views`, whatever the views share; targets of weight > 0 keep their weight sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """One turn as inference sees it, ready to merge."""

    prompt_ids: Ints
    completion_ids: Ints
    weights: Floats
    """Of each completion token in the loss."""
    turn: int = 0
    """Index of the turn in its conversation."""
    where: str = ""
    """File and row of the conversation, for messages."""

    @property
    def ids(self) -> Ints:
        return np.concatenate([self.prompt_ids, self.completion_ids])

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Layout:
    """One flattened tree (or forest) of T tokens with N targets."""

    input_ids: Ints
    """[T]"""
    position_ids: Ints
    """[T] depth in the tree."""
    subtree_end: Ints
    """[T] the index after the last descendant."""
    parent: Ints
    """[T] -1 at a root."""
    predictor: Ints
    """[N] the token whose hidden state predicts the target."""
    target_id: Ints
    """[N]"""
    weight: Floats
    """[N] > 0"""
    leaves: tuple[tuple[int, View], ...] = field(repr=False)
    """Last index of each view, and the view it came from."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class _Node:
    """A run of tokens without a fork."""

    __slots__ = ("children", "depth", "parent", "size", "start", "tokens")

    def __init__(self, tokens: Ints, parent: _Node | None, depth: int) -> None:
        self.tokens = tokens
        self.parent = parent
        self.depth = depth
        self.children: dict[int, _Node] = {}
        self.size = 0  # tokens of the subtree, set by Tree.layout
        self.start = 0  # index of the first token in the layout, likewise


class Tree:
    """A prefix tree that grows by views; `layout()` flattens it."""

    def __init__(self) -> None:
        self.root = _Node(np.empty(0, np.int64), None, 0)
        self.num_tokens = 0
        self._views: list[tuple[View, Ints, _Node]] = []
        """Each view, its ids and the run of tokens that it ends with; splitting a run keeps its end."""

    def add(self, view: View, max_tokens: int | None = None) -> bool:
        """Add a view, unless the tree would grow beyond `max_tokens`; returns whether it was added."""
        ids = view.ids
        node, offset, matched = self._descend(ids)
        if max_tokens is not None and self._views and self.num_tokens + len(ids) - matched > max_tokens:
            return False
        if offset < len(node.tokens):
            node = self._split(node, offset)
        if matched < len(ids):
            child = node.children[int(ids[matched])] = _Node(ids[matched:], node, matched)
            self.num_tokens += len(ids) - matched
            node = child
        self._views.append((view, ids, node))
        return True

    def add_all(self, other: Tree) -> None:
        """Add every view of another tree."""
        for view, *_ in other._views:
            self.add(view)

    def shared_tokens(self, other: Tree) -> int:
        """How many tokens of the other tree this one contains: what merging them saves."""
        shared = 0
        pairs = [(self.root, 0, other.root, 0)]
        while pairs:
            one, i, two, j = pairs.pop()
            same = _common_prefix(one.tokens[i:], two.tokens[j:])
            shared, i, j = shared + same, i + same, j + same
            if i < len(one.tokens) and j < len(two.tokens):
                continue
            if i < len(one.tokens):
                child = two.children.get(int(one.tokens[i]))
                pairs += [(one, i, child, 0)] if child else []
            elif j < len(two.tokens):
                child = one.children.get(int(two.tokens[j]))
                pairs += [(child, 0, two, j)] if child else []
            else:
                pairs += [(one.children[t], 0, child, 0) for t, child in two.children.items() if t in one.children]
        return shared

    def _descend(self, ids: Ints) -> tuple[_Node, int, int]:
        """Follow `ids` as far as the tree goes: the last node, how much of it matched, how much of ids matched.

        The views of a conversation repeat each other, so the search starts where `ids` leave the path of the last one.
        """
        node, matched = self.root, 0
        if self._views:
            _, last_ids, node = self._views[-1]
            matched = _common_prefix(last_ids, ids)
            while node.depth >= matched and node.parent is not None:
                node = node.parent
            if matched < node.depth + len(node.tokens):
                return node, matched - node.depth, matched
        while matched < len(ids) and (child := node.children.get(int(ids[matched]))) is not None:
            shared = _common_prefix(child.tokens, ids[matched:])
            node, matched = child, matched + shared
            if shared < len(child.tokens):
                return node, shared, matched
        return node, len(node.tokens), matched

    def _split(self, node: _Node, offset: int) -> _Node:
        """Split a run in two; returns the upper part."""
        assert node.parent is not None
        upper = _Node(node.tokens[:offset], node.parent, node.depth)
        node.parent.children[int(upper.tokens[0])] = upper
        upper.children[int(node.tokens[offset])] = node
        node.parent, node.tokens, node.depth = upper, node.tokens[offset:], node.depth + offset
        return upper

    def layout(self) -> Layout:
        nodes = self._preorder()
        total = self.num_tokens
        input_ids, position_ids, parent = (np.empty(total, np.int64) for _ in range(3))
        subtree_end = np.empty(total, np.int64)
        for node in nodes:
            run = slice(node.start, node.start + len(node.tokens))
            input_ids[run] = node.tokens
            position_ids[run] = np.arange(node.depth, node.depth + len(node.tokens))
            parent[run] = np.arange(run.start - 1, run.stop - 1)
            above = node.parent
            assert above is not None
            parent[run.start] = above.start + len(above.tokens) - 1 if above is not self.root else -1
            subtree_end[run] = node.start + node.size
        leaves, predictor, target_id, weight = [], [], [], []
        for view, _, node in self._views:
            end = self._path_end(node, len(view.completion_ids) + 1)
            leaves.append((int(end[-1]), view))
            kept = view.weights > 0
            predictor.append(end[:-1][kept])
            target_id.append(view.completion_ids[kept])
            weight.append(view.weights[kept])
        merged = _add_up(np.concatenate(predictor), np.concatenate(target_id), np.concatenate(weight))
        return Layout(input_ids, position_ids, subtree_end, parent, *merged, leaves=tuple(leaves))

    def _preorder(self) -> list[_Node]:
        """Depth first, the largest child first: the trunk stays contiguous and the block mask sparse."""
        order, stack = [], [self.root]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(node.children.values())
        for node in reversed(order):
            node.size = len(node.tokens) + sum(child.size for child in node.children.values())
        order, stack, start = [], [self.root], 0
        while stack:
            node = stack.pop()
            node.start = start
            start += len(node.tokens)
            order.append(node)
            stack.extend(sorted(node.children.values(), key=lambda child: child.size))
        return order[1:]

    def _path_end(self, node: _Node, length: int) -> Ints:
        """Layout indices of the last tokens of the path that ends with a run."""
        runs, found = [], 0
        while found < length:
            runs.append(np.arange(node.start, node.start + len(node.tokens)))
            found += len(node.tokens)
            assert node.parent is not None
            node = node.parent
        return np.concatenate(runs[::-1])[-length:]


def merge(views: Sequence[View]) -> Layout:
    """The tree of a group of views: each needs a prompt and a completion of at least one token."""
    assert views, "a layout needs a view"
    tree = Tree()
    for view in views:
        assert len(view.prompt_ids), "a completion without a prompt has no predictor"
        assert len(view.completion_ids) == len(view.weights) > 0
        tree.add(view)
    return tree.layout()


def path_to(layout: Layout, index: int) -> Ints:
    """Indices from the root to a token, read from `parent`."""
    path = [index]
    while (index := int(layout.parent[index])) >= 0:
        path.append(index)
    return np.array(path[::-1], dtype=np.int64)


def unroll(layout: Layout) -> list[View]:
    """The inverse of `merge`: ids from the paths of the tree; lengths, weights and turns from its leaves."""
    views = []
    for leaf, view in layout.leaves:
        ids = layout.input_ids[path_to(layout, leaf)]
        first = len(view.prompt_ids)
        views.append(View(ids[:first], ids[first:], view.weights, view.turn, view.where))
    return views


def _common_prefix(one: Ints, two: Ints) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(one), len(two))
    differs = one[:length] != two[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _add_up(predictor: Ints, target_id: Ints, weight: Floats) -> tuple[Ints, Ints, Floats]:
    """Targets that several views share become one, with the sum of the weights."""
    if not len(target_id):
        return predictor, target_id, weight
    base = int(target_id.max()) + 1
    pairs, inverse = np.unique(predictor * base + target_id, return_inverse=True)
    return pairs // base, pairs % base, np.bincount(inverse, weight, len(pairs)).astype(np.float64)


def count_pairs(position_ids: Ints, window: int | None = None) -> int:
    """Query-key pairs that attention has to visit, at most `window` a query where there is one."""
    seen = position_ids + 1
    return int(np.minimum(seen, window).sum() if window else seen.sum())
