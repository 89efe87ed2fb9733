"""Claims: a run gets a backend that can compute its model on its device, the fastest by measurement where there are
several, and one that cannot is refused with the way out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.masks import tree_of
from support.models import EXACT, WITHOUT, chat, load, tiny_config

import mtr.attention.choice
from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of, usable_backends
from mtr.attention.interface import use_tree_attention
from mtr.attention.layers import HeadShapes, head_shapes
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import BACKENDS, Backend
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge
from mtr.tree.mask import FULL, Span
from mtr.tree.packing import Pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


def config(**keys: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    return SimpleNamespace(**{"num_hidden_layers": 2, "model_type": "test", **sizes, **keys})


@pytest.mark.parametrize(
    ("keys", "device", "dtype", "backends"),
    [
        ({}, CPU, torch.float32, ["segment"]),
        ({"attn_logit_softcapping": 5.0}, CPU, torch.float64, ["segment"]),
        ({}, CUDA, BF16, ["flex", "varlen"]),
        ({}, CUDA, torch.float16, ["flex", "varlen"]),
        ({}, CUDA, torch.float32, ["flex"]),
        ({}, CUDA, torch.float64, ["sdpa"]),
        ({"model_type": "gpt_oss"}, CUDA, torch.float64, ["eager"]),
        ({"model_type": "gpt_oss"}, CUDA, BF16, ["flex", "varlen"]),
        ({"attn_logit_softcapping": 5.0}, CUDA, BF16, ["flex"]),
        ({"head_dim": 320}, CUDA, BF16, ["flex"]),
    ],
)
def test_what_runs_a_model_somewhere(
    keys: dict[str, Any], device: torch.device, dtype: torch.dtype, backends: list[str]
) -> None:
    assert usable_backends(config(**keys), device, dtype) == backends
    assert choose_backends("auto", config(**keys), device, dtype) == backends


def test_what_is_asked_for_is_what_runs() -> None:
    for asked in BACKENDS:
        device = CUDA if asked == "flex" else CPU
        assert choose_backends(asked, config(), device, torch.float32) == [asked]


@pytest.mark.parametrize(
    ("asked", "keys", "device", "dtype", "message"),
    [
        ("flex", {}, CPU, torch.float32, r"flex trains on CUDA.*attention: auto"),
        ("segment", {}, CUDA, BF16, r"segment runs on the CPU.*attention: auto"),
        ("varlen", {}, CUDA, torch.float32, r"varlen has no float32 .*attention: auto"),
        ("varlen", {"attn_logit_softcapping": 5.0}, CPU, BF16, r"varlen has no soft cap.*attention: auto"),
        ("varlen", {"head_dim": 320}, CUDA, BF16, r"varlen has no head size above 256"),
    ],
)
def test_refused_with_the_way_out(
    asked: str, keys: dict[str, Any], device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_backends(asked, config(**keys), device, dtype)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("asked", ["sdpa", "varlen"])
def test_refused_where_it_lacks_something(kind: str, asked: Backend) -> None:
    if missing := WITHOUT.get((asked, kind)):
        with pytest.raises(UserError, match=missing):
            choose_backends(asked, tiny_config(kind), CPU, torch.float32)
    else:
        assert choose_backends(asked, tiny_config(kind), CPU, torch.float32) == [asked]


def test_packs_are_padded_for_flex_alone() -> None:
    assert pad_to_multiple_of(["flex", "varlen"]) == 128
    assert pad_to_multiple_of(["varlen"]) == pad_to_multiple_of(["segment"]) == 1


def test_head_shapes() -> None:
    assert head_shapes(config()) == HeadShapes(4, 2, 16, 16)
    assert head_shapes(config(head_dim=8, num_key_value_heads=None)) == HeadShapes(4, 4, 8, 8)
    assert head_shapes(tiny_config("deepseek_v3")) == HeadShapes(4, 4, 12, 8)


@pytest.mark.parametrize("slow", ["segment", "varlen"])
def test_the_fastest_is_measured(
    slow: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over all layers together: a full layer costs as much as it does, a window layer twice as often."""
    asked: list[tuple[Backend, Span]] = []

    def seconds(backend: Backend, tree: object, span: Span, *_: object) -> float:
        asked.append((backend, span))
        return 2.0 if backend == slow else 1.0

    monkeypatch.setattr(mtr.attention.choice, "_seconds", seconds)
    spans = [FULL, Span("sliding", 4), Span("sliding", 4)]
    with caplog.at_level(logging.INFO, logger="mtr"):
        best = fastest(["segment", "varlen"], config(), tree_of(chat()), spans, torch.float32)
    assert best == ({"segment", "varlen"} - {slow}).pop()
    assert len(asked) == 4
    assert f"{slow} 6000.0 ms" in caplog.text
    assert f"{best} 3000.0 ms" in caplog.text


def test_layers_of_a_kind_count_as_often_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {("segment", "full"): 5.0, ("segment", "sliding"): 1.0, ("varlen", "full"): 1.0, ("varlen", "sliding"): 3.0}
    monkeypatch.setattr(mtr.attention.choice, "_seconds", lambda backend, tree, span, *_: cost[backend, span.kind])
    tree, window = tree_of(chat()), Span("sliding", 4)
    assert fastest(["segment", "varlen"], config(), tree, [FULL, window], torch.float32) == "varlen"
    assert fastest(["segment", "varlen"], config(), tree, [FULL, *[window] * 3], torch.float32) == "segment"


def test_a_model_measures_once_and_stays_exact(models: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """For real, between the two that run here; whichever wins computes the same."""
    model = load(models("gemma3"))
    use_tree_attention(model)
    batch = build_batch(Pack((merge(chat()),)))
    tree_model = TreeModel(model, "segment", "varlen", choose=fastest)
    with caplog.at_level(logging.INFO, logger="mtr"), torch.no_grad():
        hidden = tree_model.hidden(batch)
        tree_model.hidden(batch)
        alone = TreeModel(model, "sdpa").hidden(batch)
    assert len(tree_model.backends) == 1
    assert caplog.text.count("the fastest on the first pack") == 1
    assert np.allclose(hidden.numpy(), alone.numpy(), atol=1e-6)


def fails_to_compile(*broken: Backend) -> Callable[..., float]:
    def seconds(backend: Backend, *_: Any) -> float:
        if backend in broken:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    return seconds


def test_a_candidate_that_does_not_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mtr.attention.choice, "_seconds", fails_to_compile("flex"))
    caplog.set_level(logging.INFO, logger="mtr")
    assert fastest(["flex", "varlen"], config(), tree_of(chat()), [FULL], BF16) == "varlen"
    assert "flex is left out, it does not run here (RuntimeError: out of resource: shared memory)" in caplog.text


def test_that_no_candidate_runs_is_told_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.attention.choice, "_seconds", fails_to_compile("flex", "varlen"))
    with pytest.raises(UserError, match=r"no backend runs here \(flex: RuntimeError.*; varlen: RuntimeError"):
        fastest(["flex", "varlen"], config(), tree_of(chat()), [FULL], BF16)


def test_memory_that_runs_out_is_no_reason_to_leave_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(mtr.attention.choice, "_seconds", seconds)
    with pytest.raises(torch.OutOfMemoryError):
        fastest(["flex", "varlen"], config(), tree_of(chat()), [FULL], BF16)
