"""Claims: a plan counts exactly what `mtr bench` counts and what training takes: tokens, FLOPs, trees, packs, steps; it
says what later prompts hold of a turn; a count that is wrong by a little is noticed.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import tiny_config
from support.paths import QUICKSTART, SHARED, needs_shared
from support.plans import counts_of_bench, counts_of_plan, without_timing
from support.rows import chat, conversation_row, copy_tokenizer
from support.templates import CONTENT, template, thinking

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.mixture import Mixture
from mtr.data.opening import open_training_data
from mtr.model.flops import FlopCounter
from mtr.model.loading import load_model
from mtr.plan.model import read_model
from mtr.plan.planning import plan
from mtr.plan.result import Plan
from mtr.prepare.builder import Builder
from mtr.prepare.counts import Counts
from mtr.prepare.steps import IndexedSteps
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe
from mtr.tree.mask import Span
from mtr.tree.packing import merge_conversations

Write = Callable[..., Path]
ROWS = [conversation_row(turns) for turns in (1, 2, 3, 5, 8)]


@pytest.fixture(params=["conversations", "cut", "merged"])
def recipe(request: pytest.FixtureRequest, write_recipe: Write, write_rows: Write) -> Recipe:
    """Conversations each a tree, cut into several, or merged where they share a prefix; with LoRA."""
    rows = ROWS
    sequence: dict[str, Any] = {}
    if request.param == "cut":
        sequence = {"max_length": 192, "max_tokens": 256}
    if request.param == "merged":
        rows = [*ROWS, *(chat(*row["messages"], {"role": "user", "content": "And now?"}) for row in ROWS[2:])]
        sequence = {"merge": "step"}
    return load_recipe(
        write_recipe(
            data={"train": str(write_rows(rows)), "shuffle": False},
            lora={"r": 4},
            sequence=sequence,
            training={"conversations_per_step": 100, "max_steps": None},
        )
    )


def test_counts_are_those_of_mtr_bench(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    without_timing(monkeypatch)
    measured = counts_of_bench(recipe)
    assert counts_of_plan(recipe) == measured

    def without_one(views: list[Any], strategy: Any, *others: Any) -> Any:
        """Of the longest conversation the last turn is forgotten where it is computed in one pass."""
        longest = max(map(len, views))
        kept = [group[:-1] if len(group) == longest else group for group in views]
        return merge_conversations(kept if strategy == "single_pass" else views, strategy, *others)

    monkeypatch.setattr("mtr.plan.counting.merge_conversations", without_one)
    wrong = counts_of_plan(recipe)
    assert wrong["num_tokens"]["single_pass"] != measured["num_tokens"]["single_pass"]
    assert wrong["flops"]["single_pass"] != measured["flops"]["single_pass"]


def test_a_pair_too_few_is_noticed(write_recipe: Write, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(data={"train": str(write_rows(ROWS[:2]))}))
    right = counts_of_plan(recipe)
    monkeypatch.setattr("mtr.plan.ways.visible_pairs", lambda ids, span: int((ids + 1).sum()) - 1)
    assert counts_of_plan(recipe)["flops"] != right["flops"]


DATA = sorted(path.name for path in (SHARED / "data").glob("*.jsonl"))
TOKENIZERS = ("qwen3", "gpt-oss", "r1-distill-qwen")
QUICK = {("mathchat_followup.jsonl", "qwen3"), ("tau2_retail_string_arguments.jsonl", "gpt-oss")}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in itertools.product(DATA, TOKENIZERS)
]


@needs_shared
@pytest.mark.parametrize(("data", "tokenizer"), PAIRS)
def test_counts_are_those_of_mtr_bench_on_real_conversations(
    data: str, tokenizer: str, tmp_path: Path, write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_timing(monkeypatch)
    folder = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers" / tokenizer, folder)
    tiny_config("qwen3", vocab_size=201_088).save_pretrained(folder)
    recipe = load_recipe(
        write_recipe(
            model={"name_or_path": str(folder)},
            data={"train": str(SHARED / "data" / data), "on_bad_row": "skip"},
            lora={"r": 4},
            sequence={"max_length": 16384, "max_tokens": 20000},
        )
    )
    found = counts_of_plan(recipe)
    assert found == counts_of_bench(recipe, random_weights=True)
    assert found["num_tokens"]["single_pass"] < found["num_tokens"]["per_turn"]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_counter_is_that_of_the_loaded_model(
    kind: str, lora: dict[str, Any] | None, models: Callable[..., Path], write_recipe: Write
) -> None:
    import torch

    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}, lora=lora))
    loaded = load_model(recipe, torch.device("cpu"))
    known, of_weights = read_model(recipe), FlopCounter(loaded)
    assert known.counter is not None
    assert vars(known.counter) == vars(of_weights)
    assert known.model.parameters == sum(p.numel() for p in loaded.parameters())
    assert known.model.trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert set(known.counter.per_pair) <= {Span("full"), *(Span("sliding", n) for n in (24,))}


def test_counts_are_those_of_the_steps_of_training(write_recipe: Write, write_rows: Write) -> None:
    """With rows that are filtered, bad or held out, turns that are too long, and weights of sources."""
    rows: list[Any] = [*ROWS * 5, {"messages": "none"}, conversation_row(30)]
    recipe = load_recipe(
        write_recipe(
            data={
                "train": [{"path": str(write_rows(rows)), "weight": 1.5}],
                "on_bad_row": "skip",
                "filter": {"max_turns": 20},
                "eval": 0.1,
            },
            sequence={"max_length": 170, "max_tokens": 300, "strategy": "single_pass"},
            training={"conversations_per_step": 4, "num_train_epochs": 2, "max_steps": None},
        )
    )
    renderer = load_renderer(recipe, load_tokenizer(recipe))
    data, _ = open_training_data(recipe.data, recipe.training.seed)
    assert isinstance(data, Mixture)
    builder = Builder(recipe, renderer, cost=read_model(recipe).cost)
    order = IndexedSteps(builder.step, data, recipe.training, recipe.data.shuffle)
    total, packs = Counts(), 0
    for step in order.first_epoch():
        total.add(step.counts)
        packs += len(step.batches)
    found = plan(recipe)
    assert found.single_pass.way.tokens == total.tokens
    assert found.per_turn.way.tokens == total.per_turn_tokens
    assert found.supervised == total.supervised_tokens
    assert (found.turns, found.conversations) == (total.turns, total.conversations)
    assert found.untrained == total.untrained_turns
    assert found.single_pass.way.trees == total.trees
    skipped = sum(found.report.filtered.values()) + sum(found.report.unreadable.values())
    assert skipped == sum(total.skipped_rows.values())
    assert found.run.steps_per_epoch == order.steps_per_epoch
    assert found.run.steps == 2 * order.steps_per_epoch
    assert (found.run.tokens, found.run.packs) == (2 * total.tokens, 2 * packs)
    assert found.rows.held_out > 0
    assert found.report.filtered
    assert found.untrained


# --- what later prompts hold of a turn ---

KEEPS = template(thinking() + CONTENT)
DROPS = template(thinking(when="loop.index0 > at.user") + CONTENT)
ENDS_OTHERWISE = template(
    thinking() + CONTENT,
    end="{%- if loop.last and message.role == 'assistant' -%}{{- '<|endoftext|>' -}}{%- else -%}{{- '<|im_end|>' -}}"
    "{%- endif -%}",
)
CALL = {"id": "a", "type": "function", "function": {"name": "count", "arguments": {"who": "Ana"}}}
LOOP = chat(
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "a"},
    {"role": "assistant", "content": "Seven.", "reasoning_content": "It said 7."},
    {"role": "user", "content": "And Ben?"},
    {"role": "assistant", "content": "Eight.", "reasoning_content": "One more."},
)


def planned(folder: Path, source: str, rows: list[Any], write_recipe: Write, write_rows: Write) -> Plan:
    model = {"name_or_path": str(copy_tokenizer(folder / "tokenizer", source))}
    return plan(load_recipe(write_recipe(model=model, data={"train": str(write_rows(rows))})))


@pytest.mark.parametrize(
    ("source", "rows", "history"),
    [
        (KEEPS, ROWS, "kept"),
        (DROPS, ROWS, "dropped"),
        (DROPS, [conversation_row(3, thinking=False)], "kept"),
        (ENDS_OTHERWISE, [conversation_row(3)], "kept"),
        (KEEPS, [conversation_row(1)], "single"),
    ],
)
def test_history(
    source: str, rows: list[Any], history: str, tmp_path: Path, write_recipe: Write, write_rows: Write
) -> None:
    found = planned(tmp_path, source, rows, write_recipe, write_rows)
    assert found.turns > 0
    assert found.history == history
    assert (found.single_pass.way.trees == found.conversations) is True


def test_thinking_that_is_kept_within_a_tool_loop_is_mixed(
    tmp_path: Path, write_recipe: Write, write_rows: Write
) -> None:
    calls = "{%- for call in message.tool_calls or [] -%}{{- (call.function | tojson) -}}{%- endfor -%}"
    source = template(thinking(when="loop.index0 > at.user") + CONTENT + calls)
    found = planned(tmp_path, source, [LOOP], write_recipe, write_rows)
    assert found.turns == 3, found.untrained
    assert (found.history, found.continued) == ("mixed", (1, 1))


def test_a_template_that_keeps_history_is_one_path(tmp_path: Path, write_recipe: Write, write_rows: Write) -> None:
    """One pass then has the tokens of the whole conversation and no others: those of its last turn."""
    found = planned(tmp_path, KEEPS, [conversation_row(4)], write_recipe, write_rows)
    longest = found.lengths["prompt"].maximum + found.lengths["completion"].maximum
    assert found.single_pass.way.tokens <= longest
    assert found.per_turn.way.tokens > 2 * found.single_pass.way.tokens


def test_the_quickstart_needs_no_weights(write_recipe: Write, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    (folder / "config.json").write_bytes((QUICKSTART / "base" / "config.json").read_bytes())
    found = plan(load_recipe(write_recipe(model={"name_or_path": str(folder)})), rows=20)
    assert found.limit is not None
    assert 1.5 < found.limit < 2
