"""Completions of prompts, a token at a time with a KV cache: greedy or sampled, until a stop token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtr.model.compiled import uncompiled

Watch = Callable[[list[int]], None]
"""Is given the newest token of each prompt. An exception that it raises ends the generation."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """0: the likeliest token, without drawing."""
    top_p: float = 1.0
    top_k: int = 0
    """0: of all tokens."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = GREEDY,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Token ids after each prompt, without the stop token; prompts are padded on the left and run as one batch.

    Args:
        model: in eval mode, with its own attention.
        stop_ids: what ends a completion.
        watch: sees each token as it comes, stop tokens included.
    """
    longest, pad = max(map(len, prompts)), min(pad_id, model.get_input_embeddings().num_embeddings - 1)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not sampling.is_greedy:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        options["top_k"] = sampling.top_k
    options |= {"num_beams": 1, "num_return_sequences": 1}  # whatever generation_config.json says
    if watch is not None:
        options["stopping_criteria"] = [_Watching(watch)]
    with uncompiled():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=list(stop_ids),
            pad_token_id=pad,
            **options,
        )
    return [before_stop(row, stop_ids) for row in out[:, longest:].tolist()]


def before_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids up to the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


class _Watching:
    """A stopping criterion of transformers that stops nothing: it is called after each token."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._watch(input_ids[:, -1].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
