"""Claims: trees over the conversations of a step hold fewer tokens, by the arithmetic, and the same targets; loss and
gradients are those of separate conversations; several processes still share the work evenly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import chats, check_layout, targets_of_layouts, targets_of_views, view

from mtr.attention.interface import use_tree_attention
from mtr.bench.runs import bench
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.verify import fill_lora_b, verify
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.model.device import pick_device
from mtr.model.loading import load_model
from mtr.model.tree_model import TreeModel
from mtr.prepare.builder import Builder
from mtr.prepare.step import Step
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe
from mtr.training.loop import train
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View
from mtr.tree.packing import Pack, build_layouts, build_packs, merge_conversations

Recipes = Callable[..., Path]
K = 8
FIRST_WORDS = ("Take", "Before", "Now", "First", "Start", "Add", "So", "Well")


def samples(questions: int, system: str = "") -> list[dict[str, Any]]:
    """K answers to each question. The thinking of each starts with another letter."""
    rows = []
    for question in range(questions):
        asked = f"{'ABCDEFGH'[question]}na has {question + 3} apples and gets {question + 5} more. " * 10
        for word in FIRST_WORDS[:K]:
            messages = [{"role": "system", "content": system}] if system else []
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "reasoning_content": f"{word}: 3 + 5.", "content": f"{word}, 8 apples."},
            ]
            rows.append({"id": question, "messages": messages})
    return rows


@pytest.fixture
def recipe_of(write_recipe: Recipes, write_rows: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(rows: list[dict[str, Any]], merge: str = "step", **sections: Any) -> Recipe:
        sections["sequence"] = {"merge": merge, **sections.get("sequence", {})}
        sections["data"] = {"train": str(write_rows(rows)), **sections.get("data", {})}
        return load_recipe(write_recipe(**sections))

    return make


RecipeOf = Callable[..., Recipe]


def builder_of(recipe: Recipe) -> Builder:
    return Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))


def step_of(builder: Builder) -> Step:
    """All rows as one step."""
    data = open_data(builder.recipe.data, builder.recipe.data.train)
    assert isinstance(data, Mixture)
    return builder.step([data.conversation(i) for i in range(len(data))], len(data), 1.0)


def num_prefixes(sequences: list[list[int]]) -> int:
    """Tokens of the prefix tree, counted without building one."""
    return len({tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))})


def common(sequences: list[list[int]]) -> int:
    return next(i for i, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1)


def test_samples_of_a_question_share_it_by_the_arithmetic(recipe_of: RecipeOf) -> None:
    rows = samples(questions=3)
    apart, together = (builder_of(recipe_of(rows, merge=merge)) for merge in ("conversation", "step"))
    data = open_data(apart.recipe.data, apart.recipe.data.train)
    views = [apart.views(conversation) for conversation in data.first(len(rows))]
    sequences = [[*view.ids.tolist()] for (view,) in views]
    questions = [sequences[i : i + K] for i in range(0, len(rows), K)]
    shared = [common(question) for question in questions]
    prompts = [len(views[i][0].prompt_ids) for i in range(0, len(rows), K)]
    assert all(s >= p for s, p in zip(shared, prompts, strict=True)), "the whole prompt is shared"

    one, two = step_of(apart).counts, step_of(together).counts
    assert one.tokens == sum(map(len, sequences))
    # each question once, and of each answer what is its own
    assert two.tokens == sum(s + sum(len(ids) - s for ids in q) for s, q in zip(shared, questions, strict=True))
    assert two.tokens == one.tokens - (K - 1) * sum(shared)
    assert two.tokens == sum(map(num_prefixes, questions))
    assert (one.trees, two.trees) == (len(rows), 3)
    for name in ("conversations", "turns", "supervised_tokens", "per_turn_tokens", "untrained_turns"):
        assert getattr(one, name) == getattr(two, name)


def test_a_long_system_prompt_is_held_once(recipe_of: RecipeOf) -> None:
    rows = samples(questions=4, system="Count the apples with care. " * 20)
    builder = builder_of(recipe_of(rows))
    data = open_data(builder.recipe.data, builder.recipe.data.train)
    sequences = [view.ids.tolist() for row in data.first(len(rows)) for view in builder.views(row)]
    counts = step_of(builder).counts
    assert counts.trees == 1
    assert counts.tokens == num_prefixes(sequences)


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
@pytest.mark.parametrize("max_tokens", [16384, 200])
def test_gradients_are_those_of_separate_conversations(recipe_of: RecipeOf, weighting: str, max_tokens: int) -> None:
    one, two = (
        gradients(recipe_of(samples(2), merge=merge, loss={"weighting": weighting},
                            sequence={"max_length": min(max_tokens, 4096), "max_tokens": max_tokens}))
        for merge in ("conversation", "step")
    )  # fmt: skip
    assert furthest(one, two) < 1e-5


def test_a_sample_that_sees_another_changes_the_gradients(recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients(recipe_of(samples(2)))

    def seeing(pack: Pack, *arguments: int) -> Batch:
        batch = build_batch(pack, *arguments)
        return replace(batch, subtree_end=torch.full_like(batch.subtree_end, batch.num_tokens))

    monkeypatch.setattr("mtr.prepare.builder.build_batch", seeing)
    broken = gradients(recipe_of(samples(2), model={"attention": "sdpa"}))
    assert furthest(right, broken) > 1e-2


def gradients(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the step's loss, by parameter; `loss` is there too."""
    builder = builder_of(recipe)
    device = pick_device()
    model = load_model(recipe, device)
    fill_lora_b(model, 1)
    use_tree_attention(model)
    step = step_of(builder)
    backend: Any = "sdpa" if recipe.model.attention == "sdpa" else "segment"
    tree_model, total = TreeModel(model, backend), torch.zeros((), dtype=torch.float64)
    for batch in step.batches:
        loss = tree_model(batch.to(device)) / step.weight_sum
        loss.backward()
        total += loss.detach().cpu()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": total}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    assert len(one) > 10
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def test_training_gives_the_same_losses_and_norms_from_fewer_tokens(recipe_of: RecipeOf, tmp_path: Path) -> None:
    def run(merge: str) -> list[dict[str, Any]]:
        training = {"output_dir": str(tmp_path / merge), "max_steps": 3, "conversations_per_step": 16}
        train(recipe_of(samples(4), merge=merge, training=training, data={"group_by": "id"}))
        lines = [json.loads(line) for line in (tmp_path / merge / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 3
        return lines

    for apart, together in zip(run("conversation"), run("step"), strict=True):
        assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-4)
        assert together["num_tokens"] < apart["num_tokens"] / 2
        for name in ("num_supervised_tokens", "num_per_turn_tokens", "num_turns", "num_conversations"):
            assert together[name] == apart[name]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_verify_takes_the_conversations_as_one_step(
    recipe_of: RecipeOf, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[Pack] = []

    def seen(pack: Pack, *arguments: int) -> Batch:
        packs.append(pack)
        return build_batch(pack, *arguments)

    monkeypatch.setattr("mtr.checks.verify.build_batch", seen)
    result = verify(recipe_of(samples(1)), conversations=K, dtype=dtype)
    assert result["passed"], result
    assert result["conversations"] == K
    (pack,) = packs
    assert [len(layout.leaves) for layout in pack.layouts] == [K], "the conversations were not merged"


def test_bench_times_the_merged_trees(recipe_of: RecipeOf) -> None:
    shape = bench(recipe_of(samples(1)), conversations=K, repeats=1)["shape"]
    apart = bench(recipe_of(samples(1), merge="conversation"), conversations=K, repeats=1)["shape"]
    assert (shape["merge"], apart["merge"]) == ("step", "conversation")
    assert shape["num_tokens"]["single_pass"] < apart["num_tokens"]["single_pass"] / 3
    assert shape["num_tokens"]["per_turn_packed"] == apart["num_tokens"]["per_turn_packed"]
    assert shape["num_supervised_tokens"] == apart["num_supervised_tokens"]


def test_verify_fails_where_a_shared_target_is_lost(recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(pack: Pack, *arguments: int) -> Batch:
        batch = build_batch(pack, *arguments)
        weight = batch.weight.clone()
        weight[weight.argmax()] = 1.0  # a target that K samples share counts K times
        return replace(batch, weight=weight)

    recipe = recipe_of(samples(1))
    assert verify(recipe, conversations=K)["passed"]
    monkeypatch.setattr("mtr.checks.verify.build_batch", losing)
    assert not verify(recipe, conversations=K)["passed"]


# --- grouping ---------------------------------------------------------------------------------------------------------

steps = st.lists(chats(), min_size=1, max_size=5)


@given(steps, st.integers(0, 40), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_merging_keeps_all_targets_within_the_budget(
    conversations: list[list[View]], room: int, processes: int
) -> None:
    views = [one for own in conversations for one in own]
    budget = max(one.num_tokens for one in views) + room
    layouts = merge_conversations(conversations, "single_pass", "step", budget, processes)
    assert all(layout.num_tokens <= budget for layout in layouts)
    assert targets_of_layouts(*layouts) == targets_of_views(views)
    for layout in layouts:
        check_layout(layout, [one for _, one in layout.leaves])
    if processes == 1:
        apart = merge_conversations(conversations, "single_pass", "conversation", budget)
        assert sum(x.num_tokens for x in layouts) <= sum(x.num_tokens for x in apart)


def long_view(*parts: tuple[int, int]) -> list[View]:
    """A conversation of one turn: runs of (token, length), the last one supervised."""
    prompt = [token for token, length in parts[:-1] for _ in range(length)]
    return [view(prompt, [parts[-1][0]] * parts[-1][1])]


def test_what_shares_too_little_stays_apart() -> None:
    worth, not_worth = long_view((1, 4), (2, 60), (3, 36)), long_view((1, 3), (4, 61), (5, 36))
    first = long_view((1, 4), (6, 60), (7, 36))
    assert len(merge_conversations([first, worth], "single_pass", "step", 1000)) == 1
    assert len(merge_conversations([first, not_worth], "single_pass", "step", 1000)) == 2


def test_conversations_that_share_most_come_together_whatever_their_order() -> None:
    groups = [[long_view((9, 50), (group, 50), (10 * group + i, 20)) for i in range(4)] for group in range(1, 4)]
    mixed = [groups[i % 3][i // 3] for i in range(12)]
    layouts = merge_conversations(mixed, "single_pass", "step", 200)
    assert sorted(len(layout.leaves) for layout in layouts) == [4, 4, 4]
    assert all(layout.num_tokens == 50 + 50 + 4 * 20 for layout in layouts)


def test_per_turn_merges_nothing() -> None:
    conversations = [long_view((1, 50), (i, 5)) for i in range(2, 6)]
    layouts = merge_conversations(conversations, "per_turn", "step", 1000)
    assert [layout.num_tokens for layout in layouts] == [55] * 4


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_processes_stay_balanced(processes: int) -> None:
    """All conversations share a prefix, so one tree would hold them all and leave every other process idle."""
    conversations = [long_view((1, 100), (i, 100)) for i in range(2, 34)]
    alone = merge_conversations(conversations, "single_pass", "step", 10**6)
    assert len(alone) == 1, "the case is not what it says"
    layouts = merge_conversations(conversations, "single_pass", "step", 10**6, processes)
    shares = build_packs(layouts, 10**6, processes)
    loads = [sum(pack.num_tokens for pack in packs) for packs in shares]
    assert max(loads) <= 1.25 * sum(loads) / processes
    assert max(loads) < 200 * 32 / processes, "no better than separate trees"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_a_merged_step(recipe_of: RecipeOf, processes: int) -> None:
    alone = builder_of(recipe_of(samples(3)))
    whole = step_of(alone)
    parts = [step_of(replace(alone, process=i, num_processes=processes)) for i in range(processes)]
    assert all(part.weight_sum == pytest.approx(whole.weight_sum, rel=1e-12) for part in parts)
    assert len({part.weight_sum for part in parts}) == 1
    assert sum(float(b.weight.sum()) for part in parts for b in part.batches) == pytest.approx(whole.weight_sum)
    assert all(part.counts == parts[0].counts for part in parts)
    assert sum(b.num_tokens for part in parts for b in part.batches) == parts[0].counts.tokens
    assert all(part.batches for part in parts)


def test_a_conversation_alone_is_what_it_was() -> None:
    views = [view([1, 2], [3, 4]), view([1, 2], [5, 6]), view([1, 2], [7, 8])]
    (merged,) = merge_conversations([views], "single_pass", "step", 100)
    (own,) = build_layouts(views, "single_pass", 100)
    assert np.array_equal(merged.input_ids, own.input_ids)
