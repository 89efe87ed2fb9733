"""The module that is trained: a causal LM whose forward takes a pack and returns its loss.

The loss is computed inside forward, because FSDP gathers weights only there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtr.attention.autocast import is_autocast
from mtr.attention.interface import forget_rows, use_own_attention, use_tree_attention
from mtr.attention.layers import layer_spans
from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.attention.model_parts import base_model, decoder, output_embeddings, text_config
from mtr.errors import UserError
from mtr.model.loss import chunk_size, weighted_nll
from mtr.recipe.sections import Backend, Recipe
from mtr.recurrence.kinds import follow_tree
from mtr.tree.batch import Batch
from mtr.tree.mask import Span, Tree

Choose = Callable[[Sequence[Backend], Any, Tree, Sequence[Span], torch.dtype], Backend]
"""Picks one of several backends for a text config, a tree, the spans of its layers and a dtype."""


def use_tree(model: Any) -> None:
    """Let every layer of a model follow the tree that its decoder is handed, by attention or by its state.

    Raises:
        UserError: this release of transformers has moved what a recurrent layer calls.
    """
    use_tree_attention(model)
    follow_tree(decoder(model))


class TreeModel(nn.Module):
    """A causal LM whose forward takes a pack and returns its sum(weight * nll)."""

    def __init__(self, model: Any, *backends: Backend, choose: Choose | None = None) -> None:
        """
        Args:
            backends: of attention.
            choose: picks one of several on the first pack that has targets: `mtr.attention.choice.fastest`.
        """
        super().__init__()
        assert choose is not None or len(backends) == 1, "several backends, and nothing that picks one"
        self.model = model
        self.backends = backends
        self._choose = choose
        base = base_model(model)
        self.spans = layer_spans(text_config(base.config))
        self.head = OutputHead(base)

    def hidden(self, batch: Batch) -> Tensor:
        """[T, hidden size]: each token's last hidden state, equal to that of the separate pass of its turn."""
        if len(self.backends) > 1 and len(batch.predictor):  # not on an idle pack
            assert self._choose is not None
            config = text_config(base_model(self.model).config)
            self.backends = (self._choose(self.backends, config, batch.tree, self.spans, self._compute_dtype()),)
        attention = TreeAttention(batch.tree, self.spans, self.backends[0])
        output = decoder(self.model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, tree=TreeHandle(attention)
        ).last_hidden_state[0]
        if not attention.calls and _is_computed(output):
            raise UserError(
                "its attention does not go through transformers' attention interface, and no recurrent layer of it is "
                "known, so no tree reaches it"
            )
        hidden: Tensor = output
        return hidden

    def nll(self, batch: Batch) -> Tensor:
        """sum(weight * nll), a scalar."""
        hidden = self.hidden(batch)[batch.predictor]
        return weighted_nll(hidden, self.head, self.head.trainable(), batch.target_id, batch.weight, self.head.chunk)

    def _compute_dtype(self) -> torch.dtype:
        if torch.is_autocast_enabled("cuda"):
            return torch.get_autocast_dtype("cuda")
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, batch: Batch | None, touch: bool = False, run: Callable[[], Any] | None = None) -> Any:
        """sum(weight * nll) of a pack; 0 without one.

        Args:
            touch: let every trainable parameter take part in the graph, used or not: DDP averages gradients once
                all of them are ready.
            run: call this instead and return its result; sharded weights are gathered for it.
        """
        if run is not None:
            return run()
        loss = torch.zeros((), device=next(self.parameters()).device)
        if batch is not None:
            loss = self.nll(batch)
        if touch or batch is None:
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss


class RowModel(TreeModel):
    """For models over which no tree can be laid: a pack is one turn, computed as transformers would by itself, with the
    model's own attention, positions and logits."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "sdpa")
        self._keeps = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters

    def nll(self, batch: Batch) -> Tensor:
        assert np.array_equal(batch.parent, np.arange(len(batch.parent)) - 1), "a row holds one turn, without padding"
        forget_rows(self.model)
        length = batch.input_ids.shape[1]
        known = self._keeps and len(batch.predictor) and _is_computed(batch.predictor)
        start = int(batch.predictor.min()) if known else 0
        kept = {"logits_to_keep": length - start} if start else {}
        logits = self.model(input_ids=batch.input_ids, use_cache=False, **kept).logits[0, batch.predictor - start]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = nn.functional.cross_entropy(wide, batch.target_id, reduction="none")
        return (nll * batch.weight.to(nll)).sum()


def lay_out(model: Any, recipe: Recipe) -> None:
    """Switch a model to what its rows will be."""
    if recipe.sequence.unpacked:
        use_own_attention(model)
    else:
        use_tree(model)


def pack_model(model: Any, recipe: Recipe, backends: list[Backend], choose: Choose) -> TreeModel:
    """The module whose forward takes the packs of this recipe."""
    return RowModel(model) if recipe.sequence.unpacked else TreeModel(model, *backends, choose=choose)


def _is_computed(x: Tensor) -> bool:
    """Meta and fake tensors have shapes only: attention's operator does not run."""
    return not x.is_meta and type(x) is Tensor


_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Of logits, in configs. `mtr.model.probe` meets a model that changes them in yet another way."""
_MULTIPLIED = ("hyperclovax",)
"""Types of models for which `logits_scaling` is a factor."""
_UNSCALED = ("aya_vision", "cohere2_vision")
"""Types of models that leave out the scale that the config of their text part has."""


class OutputHead:
    """Hidden states to logits, with the scale and soft cap that the model applies. Not a module: it owns no weights."""

    def __init__(self, base: Any) -> None:
        config = text_config(base.config)
        self._base = base
        self.chunk = chunk_size(config.vocab_size)
        caps = (getattr(config, name, None) for name in _SOFT_CAPS)
        self.softcap: float | None = next((cap for cap in caps if cap is not None), None)
        scales = {name: float(getattr(config, name, None) or 1.0) for name in (*_FACTORS, *_DIVISORS)}
        if config.model_type in _MULTIPLIED:
            scales["logits_scaling"] **= -1
        self.scale = math.prod(scales[name] for name in _FACTORS) / math.prod(scales[name] for name in _DIVISORS)
        if getattr(base.config, "model_type", None) in _UNSCALED:
            self.scale = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        head = output_embeddings(self._base)
        logits: Tensor = head(_as_taken(hidden, getattr(head, "weight", None)))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in output_embeddings(self._base).parameters() if p.requires_grad]


def _as_taken(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """Decoders that add up in float32 end in it, whatever their weights are in."""
    if weight is None or is_autocast(hidden):
        return hidden
    narrower = weight.dtype in (torch.bfloat16, torch.float16) and hidden.dtype == torch.float32
    return hidden.to(weight.dtype) if narrower else hidden
