"""The ways to take the same conversations through a model, forward and backward.

    single_pass      one tree per conversation
    per_turn_packed  one sequence per turn, packed without padding, plain causal attention for each sequence, with the
                     fastest kernel there is: the fair baseline
    per_turn_padded  one sequence per turn, rows padded to the longest of their batch, the model's setup attention

All of them compute the same sum of weighted losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.interface import use_own_attention, use_tree_attention
from mtr.attention.model_parts import base_model, decoder
from mtr.bench.setup import Setup
from mtr.bench.timing import Case
from mtr.model.loss import weighted_nll
from mtr.model.tree_model import OutputHead, TreeModel
from mtr.recipe.sections import Backend
from mtr.tree.batch import build_batch
from mtr.tree.layout import Layout, View
from mtr.tree.packing import build_packs


def packed_case(setup: Setup, strategy: str, layouts: list[Layout], backend: Backend) -> Case:
    """Trees, or turns as trees of a single path, in packs without padding."""
    tree_model = TreeModel(setup.model, backend)
    packs = build_packs(layouts, setup.recipe.sequence.budget)[0]
    batches = [build_batch(pack, pad_to_multiple_of([backend])).to(setup.device) for pack in packs]

    def run() -> float:
        return _backward(tree_model(batch) for batch in batches)

    tokens = sum(batch.input_ids.shape[1] for batch in batches)
    return Case(strategy, backend, tokens, setup.counter.of_layouts(layouts), use_tree_attention, run)


def padded_case(setup: Setup, views: list[View], layouts: list[Layout], pad_id: int) -> Case:
    """Turns in padded batches.

    Args:
        views: the turns of all conversations.
        layouts: the same turns as the packed case has them, for the FLOPs that are needed.
    """
    batches = [_pad(rows, setup.device, pad_id) for rows in _rows(views, setup.recipe.sequence.budget)]
    head = OutputHead(base_model(setup.model))

    def loss(batch: _Padded) -> Tensor:
        hidden = decoder(setup.model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        at = hidden.flatten(0, 1)[batch.predictor]
        return weighted_nll(at, head, head.trainable(), batch.target_id, batch.weight, head.chunk)

    def run() -> float:
        return _backward(loss(batch) for batch in batches)

    attention = "sdpa" if base_model(setup.model)._supports_sdpa else "eager"
    tokens = sum(batch.input_ids.numel() for batch in batches)
    return Case("per_turn_padded", attention, tokens, setup.counter.of_layouts(layouts), use_own_attention, run)


def _backward(losses: Iterator[Tensor]) -> float:
    """Backward of each loss as soon as it is computed; the sum is read from the device once, at the end."""
    summed: Tensor | None = None
    for loss in losses:
        torch.autograd.backward(loss)
        summed = loss.detach() if summed is None else summed + loss.detach()
    return 0.0 if summed is None else float(summed)


@dataclass(frozen=True)
class _Padded:
    """R rows padded to T tokens, N targets."""

    input_ids: Tensor
    """[R, T]"""
    attention_mask: Tensor
    """[R, T]"""
    predictor: Tensor
    """[N], indices into the flattened rows"""
    target_id: Tensor
    """[N]"""
    weight: Tensor
    """[N]"""


def _rows(views: list[View], budget: int) -> list[list[View]]:
    """Views in their order, as many in a batch as fit the budget when padded to the longest of them."""
    groups: list[list[View]] = []
    for view in views:
        longest = max([view.num_tokens, *(other.num_tokens for other in (groups[-1] if groups else []))])
        if not groups or longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(view)
    return groups


def _pad(views: list[View], device: torch.device, pad_id: int) -> _Padded:
    longest = max(view.num_tokens for view in views)
    ids = np.full((len(views), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    predictor = []
    for row, view in enumerate(views):
        ids[row, : view.num_tokens] = view.ids
        mask[row, : view.num_tokens] = 1
        first = row * longest + len(view.prompt_ids) - 1
        predictor.append(np.arange(first, first + len(view.completion_ids)))
    arrays = (
        ids,
        mask,
        np.concatenate(predictor),
        np.concatenate([view.completion_ids for view in views]),
        np.concatenate([view.weights for view in views]),
    )
    return _Padded(*(torch.from_numpy(array).to(device) for array in arrays))
