"""What a pass spends its FLOPs on, in words."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {"linear": "linear layers", "attention": "attention", "recurrence": "recurrence", "head": "output head"}


def shares(flops: Mapping[str, float]) -> str:
    """Of the fields of `mtr.model.flops.Flops`: linear layers 70%, ...; what there is nothing of is left out."""
    total = sum(flops.values())
    return ", ".join(f"{_NAMES[part]} {share / total:.0%}" for part, share in flops.items() if share)


def with_unit(flops: float) -> str:
    """1.23 GFLOP"""
    for unit in "MGT":
        if flops < 1e9:
            return f"{flops / 1e6:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops / 1e6:,.3g} PFLOP"
