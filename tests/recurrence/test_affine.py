"""Claims: states composed in rounds are those of the recurrence from node to node, with their gradients, for matrices
and for numbers; the rounds are as many as the depth has binary digits, and the products about as many as nodes.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrences import worst_difference
from torch import Tensor

from mtr.recurrence.affine import compose, reduction
from mtr.tree.layout import Ints
from mtr.tree.plan import depths

CPU = torch.device("cpu")
H, D, E = 2, 3, 4


@st.composite
def forests_of_nodes(draw: st.DrawFn) -> Ints:
    """The node above each; deep and bushy ones, one root or more."""
    above = [-1]
    for node in range(1, draw(st.integers(1, 24))):
        above.append(draw(st.one_of(st.just(node - 1), st.integers(-1, node - 1))))
    return np.array(above, np.int64)


def given_of(above: Ints, number: bool) -> tuple[Tensor, Tensor]:
    """Of all nodes in their own order, decays of roots included."""
    generator = torch.Generator().manual_seed(len(above))
    size = 1 if number else D
    decay = torch.randn(len(above), H, size, size, generator=generator, dtype=torch.float64) * size**-0.5
    return decay, torch.randn(len(above), H, D, E, generator=generator, dtype=torch.float64)


def in_rounds(decay: Tensor, update: Tensor, above: Ints) -> Tensor:
    order, plan = reduction(above, CPU)
    roots = plan.num_roots
    found = compose(decay[order][roots:], update[order], plan)
    return found[np.argsort(order)] + 0 * decay.sum()


def one_by_one(decay: Tensor, update: Tensor, above: Ints) -> Tensor:
    found: list[Tensor] = []
    for node, parent in enumerate(above.tolist()):
        before = found[parent] if parent >= 0 else torch.zeros_like(update[0])
        found.append((decay[node] * before if decay.shape[-1] == 1 else decay[node] @ before) + update[node])
    return torch.stack(found) + 0 * decay.sum()


@pytest.mark.parametrize("number", [False, True], ids=["matrices", "numbers"])
@settings(deadline=None, max_examples=40)
@given(forests_of_nodes())
def test_they_are_the_states_of_the_recurrence(number: bool, above: Ints) -> None:
    decay, update = given_of(above, number)
    worst = worst_difference(lambda d, u: in_rounds(d, u, above), lambda d, u: one_by_one(d, u, above), [decay, update])
    assert worst < 1e-10


@settings(deadline=None, max_examples=40)
@given(forests_of_nodes())
def test_as_many_rounds_as_the_depth_has_digits(above: Ints) -> None:
    order, plan = reduction(above, CPU)
    depth = depths(above)
    assert len(plan.rounds) == int(depth.max()).bit_length()
    assert sorted(order) == list(range(len(above)))
    assert plan.num_roots == (depth == 0).sum()
    assert (depth[order][: plan.num_roots] == 0).all()


def test_a_chain_takes_about_as_many_products_as_it_has_nodes() -> None:
    above = np.arange(256) - 1
    order, plan = reduction(above, CPU)
    decay, update = given_of(above, number=False)
    products: list[int] = []

    def counted(one: Tensor, other: Tensor) -> Tensor:
        products.append(len(one))
        return one @ other

    with mock.patch.object(torch, "matmul", counted):
        compose(decay[order][plan.num_roots :], update[order], plan)
    assert len(products) <= 3 * 8
    assert sum(products) <= 3 * 256


def test_another_parent_is_noticed() -> None:
    above = np.array([-1, 0, 1, 2, 2, 4, 5])
    wrong = above.copy()
    wrong[6] = 4
    decay, update = given_of(above, number=False)
    assert (
        worst_difference(lambda d, u: in_rounds(d, u, wrong), lambda d, u: one_by_one(d, u, above), [decay, update])
        > 0.01
    )
