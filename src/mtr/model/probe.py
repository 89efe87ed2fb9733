"""Is a model exact under a tree mask? Tested by behaviour, because a config does not tell.

A small random model of the same architecture (every layer type once, few layers, small experts, a small vocabulary,
windows shrunk so that they bite) runs a three-leaf tree in float32 and the three paths separately. Where state
leaks across branches, the hidden states differ by 1e-1; where the mask works, by 1e-6.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import numpy as np
import torch

from mtr.attention.interface import use_own_attention
from mtr.errors import UserError, one_line
from mtr.model.tree_model import TreeModel, use_tree
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge, path_to
from mtr.tree.packing import Pack

TOLERANCE = 1e-3
"""Relative to the largest hidden state or logit; right models stay below 5e-6, wrong ones above 9e-2."""
_WINDOW = 24
_VOCABULARY = 128


def check_exact(config: Any, trust_remote_code: bool = False) -> None:
    """
    Raises:
        UserError: the architecture is not exact under a tree mask, with the reason.
    """
    _check(
        json.dumps(config.to_dict(), default=str, sort_keys=True),
        _Held(config),
        trust_remote_code,
    )


class _Held:
    """A config that is not part of the cache key; the JSON next to it is."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=8)
def _check(key: str, held: _Held, trust_remote_code: bool) -> None:
    config = held.config
    try:
        difference = probe(shrink(config), trust_remote_code)
    except UserError as error:
        raise UserError(f"{config.model_type} models cannot be trained exactly: {error}") from None
    except Exception as error:  # whatever an unknown architecture raises, it has not been shown to be exact
        reason = one_line(error)
        kind = type(error).__name__
        raise UserError(
            f"{config.model_type} models cannot be shown to be exact: the probe of a small one fails ({kind}: {reason})"
        ) from error
    if difference > TOLERANCE:
        raise UserError(
            f"{config.model_type} models cannot be trained exactly: a tree mask changes what they compute "
            f"(a probe differs by {difference:.1e} from separate passes; something carries state along the row). "
            "Use a model whose layers mix tokens by attention alone"
        )


def shrink(config: Any) -> Any:
    """A config of the same architecture, small enough to run in a moment on a CPU."""
    small = copy.deepcopy(config)
    text = small.get_text_config() if hasattr(small, "get_text_config") else small
    layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None)
    kept = sorted({types.index(kind) for kind in types} | {0, 1} if types else {0, 1})
    kept = [i for i in kept if i < layers]
    dense_first = getattr(text, "first_k_dense_replace", None)  # a dense layer and one with experts
    if isinstance(dense_first, int):
        text.first_k_dense_replace = min(1, dense_first)
    if types:
        text.layer_types = [types[i] for i in kept]
    for name in ("mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, [getattr(text, name)[i] for i in kept])
    text.num_hidden_layers = len(kept)
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, _WINDOW)
    if getattr(text, "attention_chunk_size", None):
        text.attention_chunk_size = min(text.attention_chunk_size, _WINDOW)
    text.vocab_size = _VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, None)
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), 128))
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), max(8, getattr(text, "n_group", None) or 0)))
    for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), 4))
    return small


def probe(config: Any, trust_remote_code: bool = False) -> float:
    """The largest relative difference of hidden states and logits between a tree and its paths run separately."""
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    trunk, *tails = (rng.integers(0, _VOCABULARY, n) for n in (40, 30, 28, 20))
    paths = [np.concatenate([trunk[:share], tail]) for share, tail in zip((40, 33, 20), tails, strict=True)]
    layout = merge([View(path[:1], path[1:], np.ones(len(path) - 1)) for path in paths])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        for parameter in model.parameters():  # with initial weights, which are small, a leak would hardly show
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.eval()
        use_tree(model)
        tree_model = TreeModel(model, "segment")
        hidden = tree_model.hidden(build_batch(Pack((layout,))))
        logits = tree_model.head(hidden)
        use_own_attention(model)
        worst = 0.0
        for (leaf, _), path in zip(layout.leaves, paths, strict=True):
            ids = torch.from_numpy(path)[None]
            alone = model(input_ids=ids, use_cache=False).logits[0]
            ours = logits[torch.from_numpy(path_to(layout, leaf))]
            worst = max(worst, float((ours - alone).abs().max() / alone.abs().max()))
    return worst
