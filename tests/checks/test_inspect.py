"""`mtr inspect` tells the truth: against an independent rendering of real data, and of what the tree looks like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import SHARED, needs_shared
from support.rows import conversation_row

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.inspect import check, inspect_conversation
from mtr.checks.inspection import Inspection, describe, segments
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.prepare.builder import Builder
from mtr.recipe.loading import load_recipe
from mtr.tree.layout import View, merge

Recipes = Callable[..., Path]
FILES = (
    "mathchat_followup",
    "multichallenge_no_thinking",
    "reason_tool_use",
    "tau2_retail",
    "tau2_retail_string_arguments",
)


def targets_of_tree(described: dict[str, Any]) -> Counter[tuple[int, int, float]]:
    """(hash of the path to the predictor, target, weight) over all trees of a conversation."""
    found: Counter[tuple[int, int, float]] = Counter()
    layouts, targets = described["layout"], described["targets"]
    if isinstance(layouts, dict):
        layouts, targets = [layouts], [targets]
    for layout, target in zip(layouts, targets, strict=True):
        hashes: list[int] = []
        for token, parent in zip(layout["input_ids"], layout["parent"], strict=True):
            hashes.append(hash((hashes[parent] if parent >= 0 else 0, token)))
        for p, t, w in zip(target["predictor"], target["target_id"], target["weight"], strict=True):
            found[hashes[p], t, round(w, 9)] += 1
    return found


def targets_of_sequences(sequences: Sequence[tuple[list[int], list[int]]]) -> Counter[tuple[int, int, float]]:
    """The same of prompt and completion ids, each completion token with weight 1; equal targets add up."""
    weights: Counter[tuple[int, int]] = Counter()
    for prompt, completion in sequences:
        path = 0
        for i, token in enumerate([*prompt, *completion]):
            if i >= len(prompt):
                weights[path, token] += 1
            path = hash((path, token))
    return Counter((path, token, float(weight)) for (path, token), weight in weights.items())


@needs_shared
@pytest.mark.parametrize(
    ("tokenizer", "file"), [*(("qwen3", file) for file in FILES), ("gpt-oss", FILES[0]), ("gpt-oss", FILES[1])]
)
def test_turns_are_what_the_template_renders(write_recipe: Recipes, tokenizer: str, file: str) -> None:
    """Every turn of real rows, against the template called here, on the rows as they are."""
    data = SHARED / "data" / f"{file}.jsonl"
    recipe = load_recipe(
        write_recipe(
            model={"name_or_path": str(SHARED / "tokenizers" / tokenizer)},
            data={"train": str(data)},
            sequence={"max_length": 40_000, "max_tokens": 60_000},
        )
    )
    template = load_tokenizer(recipe)
    builder = Builder(recipe, load_renderer(recipe, template))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    stop = {"qwen3": "<|im_end|>", "gpt-oss": "<|return|>"}[tokenizer]
    rows = data.read_text().splitlines()[: 4 if file.startswith("tau2") else 30]
    for index, line in enumerate(rows):
        row = json.loads(line)
        inspection = inspect_conversation(builder, opened.conversation(index), index)
        described = describe(inspection)
        sequences = []
        assistants = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        assert [turn["message_index"] for turn in described["turns"]] == assistants
        for turn in described["turns"]:
            assert turn["trained"], turn.get("reason")
            at = turn["message_index"]
            prompt = template.apply_chat_template(
                row["messages"][:at], tools=row.get("tools"), add_generation_prompt=True, tokenize=False
            )
            own = template.apply_chat_template(row["messages"][: at + 1], tools=row.get("tools"), tokenize=False)
            assert own.startswith(prompt)
            completion = own[len(prompt) :]
            completion = completion[: completion.rindex(stop) + len(stop)]
            sequence = tuple(template(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
            assert (turn["prompt_ids"], turn["completion_ids"]) == sequence
            sequences.append(sequence)
        assert targets_of_tree(described) == targets_of_sequences(sequences)
        assert described["num_tokens"]["per_turn"] == sum(len(p) + len(c) for p, c in sequences)
        assert described["num_tokens"]["supervised"] == sum(len(c) for _, c in sequences)


@needs_shared
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("tokenizer", ["qwen3", "gpt-oss", "r1-distill-qwen"])
def test_real_rows_verify_and_what_is_not_trained_says_why(write_recipe: Recipes, tokenizer: str, file: str) -> None:
    recipe = load_recipe(
        write_recipe(
            model={"name_or_path": str(SHARED / "tokenizers" / tokenizer)},
            data={"train": str(SHARED / "data" / f"{file}.jsonl")},
            sequence={"max_length": 40_000, "max_tokens": 60_000},
        )
    )
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    trained = 0
    for index in range(0, 10, 3):
        inspection = inspect_conversation(builder, opened.conversation(index), index)
        trained += sum(turn.trained for turn in inspection.turns)
        for turn in describe(inspection)["turns"]:
            assert turn["trained"] == ("reason" not in turn)
        assert check(inspection, "token") == []
    assert trained > 0


@pytest.fixture
def inspection(write_recipe: Recipes, write_rows: Callable[..., Path]) -> Inspection:
    recipe = load_recipe(write_recipe(data={"train": str(write_rows([conversation_row(turns=4)]))}))
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    return inspect_conversation(builder, opened.conversation(0), 0)


def test_a_good_tree_has_no_problem(inspection: Inspection) -> None:
    assert check(inspection, "token") == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("position_ids", "not the depth of its token"),
        ("subtree_end", "other tokens than its ancestors and itself"),
        ("parent", "a different sequence"),
        ("input_ids", "a different sequence"),
        ("predictor", "targets of the tree"),
        ("target_id", "targets of the tree"),
        ("weight", "targets of the tree"),
    ],
)
def test_a_broken_tree_is_found(inspection: Inspection, name: str, problem: str) -> None:
    (layout,) = inspection.layouts
    broken = getattr(layout, name).copy()
    broken[len(broken) // 2] -= 0.5 if name == "weight" else 1
    found = check(replace(inspection, layouts=[replace(layout, **{name: broken})]), "token")
    assert any(problem in text for text in found), found


def test_segments_of_the_drawing() -> None:
    """H1 A1 H2 T2 A2 with T1 A1 as a branch: trunk 0, trunk 1, branch 1, branch 0."""
    first = View(np.array([1, 2]), np.array([30, 3]), np.ones(2), turn=0)
    second = View(np.array([1, 2, 3, 4, 5]), np.array([31, 6]), np.ones(2), turn=1)
    parts = [(part.start, part.end, part.kind, part.turn) for part in segments(merge([first, second]))]
    assert parts == [(0, 2, "trunk", 0), (2, 5, "trunk", 1), (5, 7, "branch", 1), (7, 9, "branch", 0)]
