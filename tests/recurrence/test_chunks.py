"""Claims: chunks hold each token once, a run of a path in order; each continues a chunk of an earlier level after so
many of its tokens as lie on the path.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forests import chain_of_forks, forests, num_used

from mtr.recurrence.chunks import ChunkPlan, chunk_plan
from mtr.tree.mask import Tree


def check_chunks(plan: ChunkPlan, tree: Tree, size: int) -> None:
    parent, chunks = tree.parent, len(plan.valid)
    assert plan.valid.shape == (chunks, size)
    assert plan.num_tokens == len(plan.back) == num_used(tree)
    gather = plan.gather.view(chunks, size)
    assert gather[plan.valid].sort().values.tolist() == list(range(plan.num_tokens)), "a token twice or never"
    assert plan.gather[plan.back].tolist() == list(range(plan.num_tokens))
    assert plan.valid.flatten()[plan.back].all()
    for tokens, valid in zip(gather, plan.valid, strict=True):
        count = int(valid.sum())
        assert valid[:count].all()
        assert all(parent[b] == a for a, b in itertools.pairwise(tokens[:count].tolist()))
        assert tokens[count:].tolist() == [int(tokens[count - 1])] * (size - count)

    first, roots = gather[:, 0].numpy(), plan.num_roots
    assert (parent[first[:roots]] == -1).all()
    at_fork = plan.at_fork(gather)
    assert parent[first[roots:]].tolist() == at_fork.tolist(), "not continued where the path forks"
    assert plan.valid[plan.above].gather(1, plan.used[:, None] - 1).all()
    assert torch.equal(plan.before_fork.sum(1), plan.used)
    borders = [roots, *(level.end for level in plan.levels)]
    assert [level.start for level in plan.levels] == borders[:-1]
    assert borders[-1] == chunks
    for start, end, above in plan.levels:
        assert above.tolist() == plan.above[start - roots : end - roots].tolist()
        assert (above < start).all()
    assert torch.equal(plan.lower, torch.ones(size, size).tril().bool())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 4, 16, 64]).flatmap(lambda size: st.tuples(forests(size), st.just(size))))
def test_chunks_continue_where_the_path_forks(case: tuple[Tree, int]) -> None:
    tree, size = case
    check_chunks(chunk_plan(tree, size), tree, size)


def test_few_chunks_are_short() -> None:
    """A chain is cut at multiples of the size, not at its forks: a trunk with a branch every 5 tokens."""
    plan = chunk_plan(chain_of_forks(8, 5), 16)
    assert plan.valid.sum(1).tolist().count(16) == 2
    assert len(plan.valid) == 3 + 7


def test_another_place_of_the_fork_is_noticed() -> None:
    tree = chain_of_forks(3, 6)
    plan = chunk_plan(tree, 4)
    plan.used[plan.used < 4] += 1
    with pytest.raises(AssertionError, match="not continued where the path forks"):
        check_chunks(plan, tree, 4)
