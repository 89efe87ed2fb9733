"""Claims: FLOPs are what a hand count of a small model gives, for frozen and trained weights, LoRA, modules trained
whole, tied embeddings, experts, MLA and windows; and what torch's own counter sees where attention is dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import ARCHITECTURES
from torch.utils.flop_counter import FlopCounterMode

from mtr.model.flops import FlopCounter, device_matrix_rate, visible_pairs
from mtr.tree.batch import build_batch
from mtr.tree.layout import Layout, View, merge
from mtr.tree.mask import FULL, Span, Tree, dense_mask
from mtr.tree.packing import Pack

Models = Callable[..., Path]
VOCABULARY = 64


def model_of(kind: str, **changes: Any) -> Any:
    import transformers

    name, options = ARCHITECTURES[kind]
    config = getattr(transformers, name)(**{**options, "vocab_size": VOCABULARY, "pad_token_id": None, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def with_lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": "all-linear"} | options)
    )


def forked() -> Layout:
    """1 2 and a fork into 3 4 5 and 6 7: positions 0 1, 2 3 4 and 2 3; the targets are 4, 5 and 7."""
    first = View(np.array([1, 2, 3]), np.array([4, 5]), np.ones(2), 0)
    return merge([first, View(np.array([1, 2, 6]), np.array([7]), np.ones(1), 1)])


TOKENS, PREDICTORS, PAIRS = 7, 3, 1 + 2 + 3 + 4 + 5 + 3 + 4
LLAMA = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)  # parameters in the products of its two layers
HEAD = 32 * VOCABULARY
ATTENTION = 2 * 4 * 6 * (8 + 8)  # layers, heads, FLOP per pair and head


def test_frozen_weights_by_hand() -> None:
    counter = FlopCounter(model_of("llama").requires_grad_(False))
    wanted = 4 * LLAMA * TOKENS + ATTENTION * PAIRS + 4 * HEAD * PREDICTORS
    assert counter.of_layouts([forked()]) == wanted
    assert counter.of_layouts([forked()] * 2) == 2 * wanted
    assert counter.count(TOKENS, PREDICTORS, {FULL: PAIRS}).total == wanted
    padded = build_batch(Pack((forked(), forked())), 128)
    assert counter.of_batches([padded]) == 2 * wanted


@pytest.mark.parametrize("tied", [False, True])
def test_trained_weights_cost_half_as_much_again(tied: bool) -> None:
    counter = FlopCounter(model_of("llama", tie_word_embeddings=tied))
    assert counter.per_token == 6 * LLAMA  # the embedding is a look-up, tied or not
    assert counter.per_predictor == 6 * HEAD


def test_lora_adds_its_factors_as_trained() -> None:
    model = with_lora(model_of("llama"))
    factors = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    counter = FlopCounter(model)
    assert factors == 2 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert counter.per_token == 4 * LLAMA + 6 * factors
    assert counter.per_predictor == 4 * HEAD


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_a_module_trained_whole_counts_once(tied: bool) -> None:
    counter = FlopCounter(
        with_lora(
            model_of("llama", tie_word_embeddings=tied),
            target_modules=["q_proj"],
            modules_to_save=["lm_head", "embed_tokens"],
        )
    )
    assert counter.per_token == 4 * LLAMA + 6 * 2 * 2 * (32 + 32)
    assert counter.per_predictor == 6 * HEAD


def test_a_token_pays_for_the_experts_it_meets() -> None:
    moe = FlopCounter(model_of("qwen3_moe").requires_grad_(False))
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    expert = 3 * 32 * 16
    assert moe.per_token == 4 * (attention + 2 * (4 * 32 + 2 * expert))  # the router, and two of four experts
    sinks = FlopCounter(model_of("gpt_oss").requires_grad_(False))  # biases and sinks are no products
    assert sinks.per_token == 4 * (attention + 2 * (4 * 32 + 2 * 3 * 32 * 48))


def test_an_unknown_number_of_active_experts_is_not_guessed() -> None:
    model = model_of("qwen3_moe")
    vars(model.config)["num_experts_per_tok"] = None
    assert math.isnan(FlopCounter(model).per_token)


def test_latent_attention_has_two_head_sizes() -> None:
    counter = FlopCounter(model_of("deepseek_v3").requires_grad_(False))
    projections = 32 * 16 + 16 * 4 * 12 + 32 * (16 + 4) + 16 * 4 * (8 + 8) + 4 * 8 * 32
    experts = 4 * 32 + (2 + 1) * 3 * 32 * 16  # the router, two routed and one shared
    assert counter.per_token == 4 * (2 * projections + 3 * 32 * 48 + experts)
    assert counter.per_pair == {FULL: 2 * 4 * 6 * (12 + 8)}


def test_a_window_limits_the_pairs_of_its_layers() -> None:
    counter = FlopCounter(model_of("gemma3"))
    window = Span("sliding", 24)
    assert counter.per_pair == {window: 2 * 4 * 6 * 16, FULL: 4 * 6 * 16}
    long = merge([View(np.arange(30), np.arange(30, 40), np.ones(10))])
    pairs = {window: sum(min(i + 1, 24) for i in range(40)), FULL: 40 * 41 // 2}
    assert counter.of_layouts([long]) == counter.count(40, 10, pairs).total


@pytest.mark.parametrize("span", [FULL, Span("sliding", 3), Span("chunked", 2)], ids=lambda span: span.kind)
def test_pairs_are_those_of_the_dense_mask(span: Span) -> None:
    layout = forked()
    tree = Tree(torch.from_numpy(layout.subtree_end), torch.from_numpy(layout.position_ids), layout.parent)
    assert visible_pairs(layout.position_ids, span) == int(dense_mask(tree, span).sum())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_torch_counts_the_same_where_attention_is_dense(kind: str) -> None:
    """Eager attention computes all T x T pairs and the head every token: with these numbers both must agree."""
    model = model_of(kind, attn_implementation="eager")
    model.set_experts_implementation("eager")
    ids = torch.arange(12)[None]
    counted = FlopCounterMode(display=False)
    with counted:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    rotary = sum(
        sum(flops.values()) for name, flops in counted.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    seen = counted.get_total_flops() - rotary
    assert FlopCounter(model).count(12, 12, {FULL: 12 * 12}).total == seen


def test_the_matrix_rate_is_measured() -> None:
    rate = device_matrix_rate(torch.device("cpu"), torch.float32, seconds=0.01)
    assert rate["dtype"] == "float32"
    assert 1e8 < rate["flops_per_second"] < 1e14
