"""Claims: the probe accepts models that are exact under a tree mask and refuses those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.masks import plain_causal
from support.models import EXACT, tiny_config

import mtr.attention.interface
from mtr.attention.layers import refusal
from mtr.errors import UserError
from mtr.model.probe import TOLERANCE, check_exact, probe, shrink


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
