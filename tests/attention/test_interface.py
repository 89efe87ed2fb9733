"""Claims: under a tree mask each model computes what it computes for every path alone, with every backend; a mask that
does not arrive is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention import run_flex_uncompiled
from support.masks import plain_causal
from support.models import EXACT, WITHOUT, chat, load
from support.trees import view

import mtr.attention.interface
from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Backend
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge, path_to
from mtr.tree.mask import FULL
from mtr.tree.packing import Pack
from mtr.tree.plan import tile_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def worst_difference(model: Any, backend: Backend) -> float:
    """Of hidden states and logits, tree against each path alone through the model's own eager attention."""
    trees = [merge(chat()), merge([view([7, 8, 9], range(30)), view([7, 8], range(5, 12))])]
    batch = build_batch(Pack(tuple(trees)), pad_to_multiple_of([backend]))
    with torch.no_grad():
        use_tree_attention(model)
        tree_model = TreeModel(model, backend)
        hidden = tree_model.hidden(batch)
        logits = tree_model.head(hidden)
        model.set_attn_implementation("eager")
        worst, start, paths = 0.0, 0, 0
        for layout in trees:
            for leaf, one in layout.leaves:
                alone = model(input_ids=torch.from_numpy(one.ids)[None], use_cache=False, output_hidden_states=True)
                at = torch.from_numpy(path_to(layout, leaf) + start)
                for ours, theirs in ((hidden, alone.hidden_states[-1][0]), (logits, alone.logits[0])):
                    worst = max(worst, float((ours[at] - theirs).abs().max() / theirs.abs().max()))
                paths += 1
            start += layout.num_tokens
    assert paths == 5
    return worst


@pytest.mark.parametrize("backend", ["segment", "varlen", "sdpa", "eager"])
@pytest.mark.parametrize("kind", EXACT)
def test_tree_equals_separate_passes(kind: str, backend: Backend, models: Callable[..., Path]) -> None:
    missing = WITHOUT.get((backend, kind))
    if missing:
        with pytest.raises(AssertionError, match=missing.split()[-1]):
            worst_difference(load(models(kind)), backend)
    else:
        assert worst_difference(load(models(kind)), backend) < 1e-6


@pytest.mark.parametrize("kind", EXACT)
def test_flex_equals_separate_passes(kind: str, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that a GPU's kernels are made from: the mask, its padding and the arguments are what it gets."""
    run_flex_uncompiled(monkeypatch)
    assert worst_difference(load(models(kind)), "flex") < 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_causal_row_is_seen(kind: str, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed row without the tree mask, positions right: what an ignored mask computes."""
    monkeypatch.setattr(mtr.attention.interface, "tile_plan", plain_causal)
    assert worst_difference(load(models(kind)), "segment") > 1e-2


def test_ignored_window_is_seen(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.attention.interface, "tile_plan", lambda tree, span: tile_plan(tree, FULL))
    assert worst_difference(load(models("gemma3")), "segment") > 1e-2


def test_tree_that_never_arrives_is_an_error(models: Callable[..., Path]) -> None:
    model = load(models("qwen3"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="no tree reaches it"):
        TreeModel(model, "segment").hidden(build_batch(Pack((merge(chat()),))))


def test_tree_attention_without_a_tree_is_an_error(models: Callable[..., Path]) -> None:
    model = load(models("qwen3"))
    use_tree_attention(model)
    with pytest.raises(UserError, match="tree mask would be lost"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
