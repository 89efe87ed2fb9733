"""torch's Muon for the matrices of hidden layers and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

Group = dict[str, Any]


class MuonWithAdamW(torch.optim.Optimizer):
    """The groups of both in one list and their states in one, so that schedules and checkpoints see one optimizer.

    Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`, https://arxiv.org/abs/2502.16982), so that both
    have the same learning rate and weight decay.
    """

    def __init__(self, matrices: list[Group], others: list[Group], lr: float) -> None:
        """
        Args:
            matrices: groups whose parameters have two dimensions.
        """
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr))
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})
        self._parts = parts
        self._share()

    @property
    def sizes(self) -> tuple[int, int]:
        """How many weights Muon trains, and how many AdamW."""
        found = {type(part): sum(p.numel() for g in part.param_groups for p in g["params"]) for part in self._parts}
        return found.get(torch.optim.Muon, 0), found.get(torch.optim.AdamW, 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state of this optimizer."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def split(groups: Iterable[Group], outer: Iterable[nn.Parameter]) -> tuple[list[Group], list[Group]]:
    """The groups of Muon and those of AdamW.

    Args:
        outer: parameters of embeddings and head, which are no hidden layers.
    """
    kept_out = {id(parameter) for parameter in outer}

    def part(is_muon: bool) -> Iterator[Group]:
        for group in groups:
            chosen = [p for p in group["params"] if (p.dim() == 2 and id(p) not in kept_out) == is_muon]
            if chosen:
                yield {**group, "params": chosen}

    groups = list(groups)
    return list(part(True)), list(part(False))
