"""Claims: the probe accepts models that are exact over a tree, hybrids among them, and says of others whether their
turns can share a row; a fault in any kind of layer is caught, wherever it begins; it takes a moment.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.families.catalogue import config_of
from support.hybrids import HYBRIDS
from support.masks import plain_causal
from support.models import ARCHITECTURES, tiny_config

import mtr.attention.interface
import mtr.recurrence.kinds
from mtr.attention.model_parts import decoder
from mtr.model.probe import TOLERANCE, Verdict, judge, probe, small_model
from mtr.model.shrink import shrink
from mtr.model.tree_model import OutputHead
from mtr.recurrence.chunks import CHUNK
from mtr.tree.mask import Tree

EXACT = Verdict(tree=None, packed=None)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *HYBRIDS])
def test_probe_of_exact_models(kind: str) -> None:
    assert probe(shrink(tiny_config(kind))) < 1e-10 < TOLERANCE == 1e-6


RELEASED = (
    "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "qwen3_vl", "nemotron_h", "falcon_h1", "jamba", "minimax",
    "gemma3n", "llama4", "mimo_v2_flash", "phi3", "ministral3", "hyperclovax", "granite", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize("family", RELEASED)
def test_released_sizes_are_judged_in_a_moment(family: str) -> None:
    """A second time from memory. Measured: 0.5 s at most, which leaves room for a busy machine."""
    config = config_of(family)
    started = time.perf_counter()
    assert judge(config, 4096) == EXACT
    assert time.perf_counter() - started < 5
    started = time.perf_counter()
    assert judge(config, 4096) == EXACT
    assert time.perf_counter() - started < 0.2


# --- what is not exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bloom", "does not go through transformers' attention interface"),
        ("stablelm", "does not hand keyword arguments on to attention"),
        ("deepseek_v32", "layers of type indexed_attention choose or merge keys by their place in the row"),
        ("doge", "a small doge model computes other logits over a tree than turn by turn, by "),
        ("rwkv", "no recurrent layer of it is known"),
    ],
)
def test_what_takes_a_row_for_each_turn(family: str, words: str) -> None:
    verdict = judge(config_of(family), 1024)
    assert words in str(verdict.tree)
    assert verdict.packed is not None
    assert verdict.alone is None


@pytest.mark.parametrize(
    ("family", "changes"), [("paligemma", {}), ("gemma3_text", {"use_bidirectional_attention": True})]
)
def test_what_sees_later_tokens_is_not_trained(family: str, changes: dict[str, Any]) -> None:
    """PaliGemma takes a text without images for a prompt, and a prompt is read in both directions."""
    verdict = judge(config_of(family, **changes), 64)
    assert verdict.tree is not None
    assert verdict.packed is not None
    assert f"a small {family} model computes other logits if later tokens change" in str(verdict.alone)


def test_what_a_config_rules_out_is_tried_for_that_too() -> None:
    config = config_of("phi3")
    assert judge(config, 4097).alone is None
    beyond = judge(config_of("gemma3_text", use_bidirectional_attention=True, alibi=True), 64)
    assert "ALiBi" in str(beyond.tree)
    assert "if later tokens change" in str(beyond.alone)


def test_a_limit_of_length_is_a_matter_of_length() -> None:
    assert judge(config_of("phi3"), 4096) == EXACT
    beyond = judge(config_of("phi3"), 4097)
    assert "longrope RoPE" in str(beyond.tree)
    assert "set sequence.max_length to at most 4096" in str(beyond.packed)


def test_logits_that_the_loss_would_not_have() -> None:
    """A head of more than one layer."""
    assert judge(config_of("modernbert-decoder"), 1024).tree is not None
    assert probe(shrink(config_of("falcon_h1"))) < TOLERANCE


@pytest.mark.parametrize("family", ["falcon_h1", "hyperclovax", "granite"])
def test_a_factor_of_the_logits_that_is_missed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputHead, "scale", property(lambda _: 1.0, lambda *_: None), raising=False)
    assert probe(shrink(config_of(family))) > 0.1


def test_what_cannot_be_tried_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("mtr.model.probe.small_model", fails)
    said = "a small llama model cannot be tried (RuntimeError: no such thing)"
    assert judge(tiny_config("llama", rms_norm_eps=1e-4), 64) == Verdict(said, said)


def test_the_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    probe(shrink(tiny_config("qwen3")))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- planted faults ---------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def broken_mask(patch: Patch, module: Any) -> None:
    patch.setattr(mtr.attention.interface, "tile_plan", plain_causal)


def left_out(name: str) -> Callable[[Patch, Any], None]:
    """A function of the modelling module that does not follow the tree."""

    def leave_out(patch: Patch, module: Any) -> None:
        original = getattr(module, name).mtr_original

        @functools.wraps(original)
        def call(*arguments: Any, tree: Any = None, **options: Any) -> Any:
            return original(*arguments, **options)

        call.mtr_original = original  # type: ignore[attr-defined]
        patch.setattr(module, name, call)

    return leave_out


def with_parents(name: str, parents: Callable[[Tree], Any]) -> Callable[[Patch, Any], None]:
    """A plan of recurrent layers that is made for another tree."""

    def plan_another(patch: Patch, module: Any) -> None:
        right = getattr(mtr.recurrence.kinds, name)

        def plan(tree: Tree, *arguments: Any) -> Any:
            return right(dataclasses.replace(tree, parent=parents(tree)), *arguments)

        patch.setattr(mtr.recurrence.kinds, name, plan)

    return plan_another


def row_before(tree: Tree) -> Any:
    """At forks, too, the token before in the row; each tree begins anew."""
    return np.where(tree.parent < 0, -1, np.arange(len(tree.parent)) - 1)


def no_state_beyond_a_chunk(tree: Tree) -> Any:
    """Each path begins anew every 64 tokens."""
    return np.where(tree.position_ids.numpy() % CHUNK == 0, -1, tree.parent)


FAULTS: dict[str, tuple[list[str], Callable[[Patch, Any], None]]] = {
    "attention without its mask": (["qwen3", "qwen3_next", "jamba", "recurrent_gemma"], broken_mask),
    "a convolution left out": (["lfm2", "qwen3_next", "bamba", "jamba"], left_out("causal_conv1d_fn")),
    "a delta rule left out": (["qwen3_next", "olmo_hybrid"], left_out("torch_chunk_gated_delta_rule")),
    "a scan left out": (["bamba", "nemotron_h", "mamba2"], left_out("mamba2_chunk_scan")),
    "a selective scan left out": (["jamba", "falcon_mamba"], left_out("mamba_selective_scan")),
    "convolution history across a branch": (["lfm2", "kimi_linear"], with_parents("convolution_plan", row_before)),
    "a state across a branch": (["qwen3_5", "bamba", "minimax"], with_parents("chunk_plan", row_before)),
    "no state beyond a chunk": (
        ["qwen3_5", "kimi_linear", "bamba", "minimax"],
        with_parents("chunk_plan", no_state_beyond_a_chunk),
    ),
}
CASES = [(fault, kind) for fault, (names, _) in FAULTS.items() for kind in names]


@pytest.mark.parametrize(("fault", "kind"), CASES)
def test_a_planted_fault_is_caught(fault: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = shrink(tiny_config(kind))
    assert probe(small) < 1e-10
    FAULTS[fault][1](monkeypatch, sys.modules[type(decoder(small_model(small))).__module__])
    assert probe(small) > 1e-3


def test_a_leak_at_forks_alone_leaves_rows_that_turns_share(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("lfm2", norm_eps=1e-4)
    with_parents("convolution_plan", row_before)(monkeypatch, None)
    verdict = judge(config, 64)
    assert "a small lfm2 model computes other logits over a tree than turn by turn, by " in str(verdict.tree)
    assert verdict.packed is None


def test_the_probe_is_sharper_than_its_noise() -> None:
    """Weights of a state are drawn so that it is felt beyond a chunk: without it, logits are others."""
    small = shrink(tiny_config("mamba2"))
    with torch.no_grad():
        model = small_model(small)
        ids = torch.arange(2 * CHUNK)[None] % 100
        changed = ids.clone()
        changed[0, 0] = 101
        last = [model(input_ids=x, use_cache=False).logits[0, -1] for x in (ids, changed)]
    assert float((last[0] - last[1]).abs().max() / last[0].abs().max()) > 1e3 * TOLERANCE


def test_a_text_config_inside_another_is_tried_in_it() -> None:
    """Transformers has no causal language model for the text config of Qwen2.5-VL."""
    small = shrink(transformers.Qwen2_5_VLConfig())
    assert type(small).__name__ == "Qwen2_5_VLConfig"
    assert judge(transformers.Qwen2_5_VLConfig(), 1024) == EXACT
