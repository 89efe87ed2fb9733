"""Claims: a tree that goes in the place of a mask is found by what the mixer calls, and only while it runs; again where
checkpointing runs a layer a second time, on another thread too; a mixer that is handed a tree uses that one. A decoder
that does not hand its mask on, and a release without the scan, are refused.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.forests import chain_of_forks
from support.models import chat, tiny_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recurrence.carried import carried_tree, sends_tree, takes_tree
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge
from mtr.tree.mask import FULL
from mtr.tree.packing import Pack


class Mixer(nn.Module):
    """As those of Mamba: what it calls is handed nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[TreeHandle | None] = []

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attention_mask is None
        self.found.append(carried_tree())
        return x * x

    forward = takes_tree(forward)


class Decoder(nn.Module):
    """Two layers of this type, under checkpointing; masks by type, unless there is one type."""

    def __init__(self, *types: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(layer_types=types)
        self.mixers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, x: Tensor, attention_mask: Any = None, **_: Any) -> Tensor:
        if isinstance(attention_mask, dict):
            assert attention_mask["full_attention"] is None
            attention_mask = attention_mask["linear_attention"]
        for mixer in self.mixers:
            x = checkpoint(mixer, x, attention_mask=attention_mask, use_reentrant=False)
        return x

    forward = sends_tree(forward)

    def found(self) -> list[TreeHandle | None]:
        return [tree for mixer in self.mixers for tree in mixer.found]  # type: ignore[union-attr]


@pytest.fixture
def handle() -> TreeHandle:
    return TreeHandle(TreeAttention(chain_of_forks(2, 2), [FULL], "segment"))


@pytest.mark.parametrize(
    "types", [["linear_attention"], ["linear_attention", "full_attention"], ["linear_attention", "hybrid"]]
)
def test_what_a_mixer_calls_finds_the_tree(handle: TreeHandle, types: list[str]) -> None:
    decoder = Decoder(*types)
    out = decoder(torch.ones(3, requires_grad=True), tree=handle)
    assert decoder.found() == [handle] * 2
    assert carried_tree() is None
    # in a backward that begins after all that, as autograd does it for CUDA
    backward = threading.Thread(target=torch.autograd.backward, args=[out.sum()])
    backward.start()
    backward.join()
    assert decoder.found() == [handle] * 4


def test_without_a_tree_there_is_none() -> None:
    decoder = Decoder("linear_attention")
    torch.autograd.backward(decoder(torch.ones(3, requires_grad=True)).sum())
    assert decoder.found() == [None] * 4


def test_a_mixer_may_be_handed_the_tree(handle: TreeHandle) -> None:
    mixer = Mixer()
    mixer(torch.ones(3), tree=handle)
    assert mixer.found == [handle]


def test_an_error_leaves_nothing_behind(handle: TreeHandle) -> None:
    with pytest.raises(TypeError):
        Mixer()("not a tensor", tree=handle)
    assert carried_tree() is None


def test_a_mask_is_not_displaced(handle: TreeHandle) -> None:
    with pytest.raises(AssertionError, match="a pack has no mask"):
        Decoder("linear_attention")(torch.ones(3), tree=handle, attention_mask=torch.ones(1, 3))


class Forgetful(Decoder):
    def forward(self, x: Tensor, attention_mask: Any = None, **_: Any) -> Tensor:
        for mixer in self.mixers:
            x = mixer(x)
        return x

    forward = sends_tree(forward)


def test_a_decoder_that_loses_its_mask_is_refused(handle: TreeHandle) -> None:
    with pytest.raises(UserError, match=r"^Forgetful of transformers \d.* does not hand its attention_mask on"):
        Forgetful("linear_attention")(torch.ones(3), tree=handle)


def test_a_release_without_the_scan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("jamba"))
    monkeypatch.delattr("transformers.models.jamba.modeling_jamba.mamba_selective_scan")
    with pytest.raises(UserError, match=r"^JambaMambaMixer of .* mamba_selective_scan \(selective scan\)"):
        use_tree(model)


@pytest.mark.usefixtures("unswitched")
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_fused_kernel_is_not_called_over_a_tree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It convolves and scans along the row; in training, and where its package is installed."""
    called = []

    def fused(xz: Tensor, *_: Any, **__: Any) -> None:
        called.append(True)

    monkeypatch.setattr(f"transformers.models.{family}.modeling_{family}.mamba_inner_fn", fused)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=600)).train()
    use_tree(model)
    batch = build_batch(Pack((merge(chat()),)))
    TreeModel(model, "segment")(batch)
    assert not called
    model(input_ids=batch.input_ids, use_cache=False)
    assert called
