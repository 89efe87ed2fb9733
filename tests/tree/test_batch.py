"""Claims: a pack's indices are those of its layouts, each moved to where the layout starts; padding sees and predicts
nothing; every tensor moves with the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import DRAWING, groups, view

from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View, merge
from mtr.tree.mask import dense_mask
from mtr.tree.packing import Pack

PAIR = Pack((merge([view([5], [6, 7])]), merge([view([8], [9, 1], [0.5, 2.0]), view([8], [3])])))


def test_indices_are_shifted() -> None:
    batch = build_batch(PAIR, pad_to_multiple_of=4, pad_token_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 3, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 1, 0]]
    assert batch.subtree_end.tolist() == [3, 3, 3, 7, 6, 6, 7, 8]
    assert batch.parent.tolist() == [-1, 0, 1, -1, 3, 4, 3, -1]
    triples = sorted(zip(batch.predictor.tolist(), batch.target_id.tolist(), batch.weight.tolist(), strict=True))
    assert triples == [(0, 6, 1.0), (1, 7, 1.0), (3, 3, 1.0), (3, 9, 0.5), (4, 1, 2.0)]
    assert batch.num_tokens == 7


def test_types() -> None:
    batch = build_batch(PAIR, 4)
    integers = (batch.input_ids, batch.position_ids, batch.subtree_end, batch.predictor, batch.target_id)
    assert {x.dtype for x in integers} == {torch.int64}
    assert batch.weight.dtype == torch.float64
    assert batch.parent.dtype == np.int64


@given(st.lists(groups, min_size=1, max_size=4), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_each_layout_is_alone(forest: list[list[View]], multiple: int) -> None:
    """Cut out of the pack and moved back, everything is as in the layout; nothing sees or predicts across."""
    layouts = [merge(views) for views in forest]
    batch = build_batch(Pack(tuple(layouts)), multiple)
    assert batch.input_ids.shape[1] % multiple == 0
    assert 0 <= batch.input_ids.shape[1] - batch.num_tokens < multiple
    seen, expected = dense_mask(batch.tree), torch.zeros(batch.input_ids.shape[1], batch.input_ids.shape[1]).bool()
    start, first = 0, 0
    for layout in layouts:
        end, last = start + layout.num_tokens, first + len(layout.predictor)
        alone = build_batch(Pack((layout,)))
        expected[start:end, start:end] = dense_mask(alone.tree)
        assert torch.equal(batch.input_ids[:, start:end], alone.input_ids)
        assert torch.equal(batch.position_ids[:, start:end], alone.position_ids)
        assert np.array_equal(np.maximum(batch.parent[start:end] - start, -1), layout.parent)
        assert torch.equal(batch.predictor[first:last] - start, alone.predictor)
        assert torch.equal(batch.target_id[first:last], alone.target_id)
        assert torch.equal(batch.weight[first:last], alone.weight)
        start, first = end, last
    assert first == len(batch.predictor)
    expected[start:, start:] = torch.eye(len(expected) - start).bool()
    assert torch.equal(seen, expected)


def test_no_padding_where_it_fits() -> None:
    assert build_batch(Pack((merge(DRAWING),)), 7).input_ids.shape == (1, 7)


def test_to_moves_every_tensor() -> None:
    batch = build_batch(PAIR, 4)
    moved = batch.to(torch.device("meta"))
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 6
    assert all(value.device.type == "meta" for value in tensors.values())
    assert isinstance(moved, Batch)
    assert moved.parent is batch.parent
    assert moved.num_tokens == batch.num_tokens
    assert batch.input_ids.device.type == "cpu"
