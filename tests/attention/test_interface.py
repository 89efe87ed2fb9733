"""Claims: under a tree mask each model computes what it computes for every path alone, with every backend; a model that
cannot is refused with the reason, by its config or by the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.models import ARCHITECTURES, EXACT, WITHOUT, chat, load, tiny_config
from support.trees import view
from torch.nn.attention.flex_attention import flex_attention

import mtr.attention.flex
import mtr.attention.interface
from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.attention.layers import layer_spans, refusal
from mtr.attention.masks import Backend
from mtr.attention.model_parts import text_config
from mtr.errors import UserError
from mtr.model.probe import TOLERANCE, check_exact, probe, shrink
from mtr.model.tree_model import TreeModel
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge, path_to
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.packing import Pack
from mtr.tree.plan import Tile, tile_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- configs ----------------------------------------------------------------------------------------------------------


def config(**keys: Any) -> Any:
    return SimpleNamespace(**{"num_hidden_layers": 2, "model_type": "test", **keys})


@pytest.mark.parametrize(
    ("keys", "spans"),
    [
        ({}, [FULL, FULL]),
        ({"sliding_window": None}, [FULL, FULL]),
        ({"sliding_window": 9}, [Span("sliding", 9)] * 2),
        ({"sliding_window": 9, "use_sliding_window": False}, [FULL, FULL]),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}, [Span("sliding", 9), FULL]),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, [FULL, FULL]),
        (
            {"attention_chunk_size": 7, "layer_types": ["full_attention", "chunked_attention"]},
            [FULL, Span("chunked", 7)],
        ),
    ],
)
def test_layer_spans(keys: dict[str, Any], spans: list[Span]) -> None:
    assert layer_spans(config(**keys)) == spans


def test_layer_spans_of_real_configs() -> None:
    assert layer_spans(tiny_config("llama")) == [FULL, FULL]
    assert layer_spans(tiny_config("gemma3")) == [Span("sliding", 24), FULL, Span("sliding", 24)]
    assert layer_spans(tiny_config("gpt_oss")) == [Span("sliding", 24), FULL]


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"alibi": True}, "ALiBi"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 512}, "at most 512"),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 256}},
            "at most 256",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 512},
            "at most 512",
        ),
    ],
)
def test_refusal_names_the_reason(keys: dict[str, Any], word: str) -> None:
    reason = refusal(config(**keys), 1024)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]},
        {"alibi": False, "output_router_logits": False, "is_encoder_decoder": False},
        {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 1024},
        {"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 16},
    ],
)
def test_nothing_to_refuse(keys: dict[str, Any]) -> None:
    assert refusal(config(**keys), 1024) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_refusal_of_real_configs(kind: str) -> None:
    reason = refusal(text_config(tiny_config(kind)), 1024)
    assert (reason is None) == (kind in EXACT), reason


# --- models -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", EXACT)
def test_flex_equals_separate_passes(kind: str, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own uncompiled flex attention: the mask, its padding and the arguments are what a GPU gets."""
    monkeypatch.setattr(mtr.attention.flex, "_kernel", lambda: flex_attention)
    assert worst_difference(load(models(kind)), "flex") < 1e-6


def plain_causal(tree: Tree, span: Span = FULL) -> list[Tile]:
    length = len(tree.subtree_end)
    return [Tile(0, length, 0, length)]


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
    with pytest.raises(UserError, match="no mask reaches it"):
        TreeModel(model, "segment").hidden(build_batch(Pack((merge(chat()),))))


def test_tree_attention_without_a_tree_is_an_error(models: Callable[..., Path]) -> None:
    model = load(models("qwen3"))
    use_tree_attention(model)
    with pytest.raises(UserError, match="tree mask would be lost"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


# --- probe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_probe_of_exact_models(kind: str) -> None:
    assert probe(shrink(tiny_config(kind))) < TOLERANCE == 1e-3


def test_probe_sees_a_broken_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shrink(tiny_config("qwen3"))
    assert probe(small) < TOLERANCE
    monkeypatch.setattr(mtr.attention.interface, "tile_plan", plain_causal)
    assert probe(small) > 1e-2


def test_probe_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    probe(shrink(tiny_config("qwen3")))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_check_refuses_what_is_not_exact(name: str, options: dict[str, Any]) -> None:
    asked = getattr(transformers, name)(**options)
    with pytest.raises(
        UserError, match=rf"{asked.model_type} models cannot be (trained exactly|shown to be exact): \w+"
    ):
        check_exact(asked)


def test_check_refuses_linear_attention() -> None:
    """Were the config silent about it, the probe would find the state that it carries along the row."""
    asked = tiny_config("qwen3_next")
    assert "linear_attention" in str(refusal(asked, 1024))
    with pytest.raises(UserError, match="qwen3_next models cannot be"):
        check_exact(asked)


def test_check_accepts_the_exact() -> None:
    check_exact(tiny_config("qwen3"))
