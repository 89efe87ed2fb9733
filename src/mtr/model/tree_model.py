"""The module that is trained: a causal LM whose forward takes a pack and returns its loss.

The loss is computed inside forward, because FSDP gathers weights only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtr.attention.interface import use_tree_attention
from mtr.attention.layers import layer_spans
from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.attention.model_parts import base_model, decoder, text_config
from mtr.errors import UserError
from mtr.model.loss import chunk_size, weighted_nll
from mtr.recipe.sections import Backend
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
    follow_tree(base_model(model))


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
            hidden = self.hidden(batch)[batch.predictor]
            loss = weighted_nll(
                hidden, self.head, self.head.trainable(), batch.target_id, batch.weight, self.head.chunk
            )
        if touch or batch is None:
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss


def _is_computed(x: Tensor) -> bool:
    """Meta and fake tensors have shapes only: attention's operator does not run."""
    return not x.is_meta and type(x) is Tensor


class OutputHead:
    """Hidden states to logits, with the scale and soft cap that the model applies. Not a module: it owns no weights."""

    def __init__(self, base: Any) -> None:
        config = text_config(base.config)
        self._base = base
        self.chunk = chunk_size(config.vocab_size)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._base.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self._base.get_output_embeddings().parameters() if p.requires_grad]
