"""Claims: which layers attend, which carry a state, and which cost the same is read from the config of any hybrid."""

from __future__ import annotations

import pytest
from support.models import tiny_config

from mtr.model.layer_kinds import attends, kinds_of_layers, layer_kinds, recurs


@pytest.mark.parametrize(
    ("kind", "attending", "recurrent"),
    [
        ("llama", [0, 1], []),
        ("gemma3", [0, 1, 2], []),
        ("qwen3_5", [2], [0, 1, 3]),
        ("lfm2", [2], [0, 1, 3]),
        ("nemotron_h", [1], [0, 3, 5]),  # its other layers are experts and an MLP
        ("falcon_h1", [0, 1, 2], [0, 1, 2]),
        ("zamba2", [2, 4], [0, 1, 2, 3, 4]),
        ("mamba2", [], [0, 1, 2]),
        ("recurrent_gemma", [2], [0, 1, 3]),
    ],
)
def test_layers_attend_or_recur(kind: str, attending: list[int], recurrent: list[int]) -> None:
    kinds = layer_kinds(tiny_config(kind))
    assert [layer for layer, name in enumerate(kinds) if attends(name)] == attending
    assert [layer for layer, name in enumerate(kinds) if recurs(name)] == recurrent


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("llama", [[0, 1]]),
        ("gemma3", [[0, 1, 2]]),  # a window costs no other memory
        ("deepseek_v3", [[0], [1]]),  # the first layer has no experts
        ("qwen3_5", [[0, 1, 3], [2]]),
        ("nemotron_h", [[0, 3, 5], [1], [2], [4]]),
        ("lfm2_moe", [[0], [1, 3], [2]]),
    ],
)
def test_layers_that_cost_the_same(kind: str, groups: list[list[int]]) -> None:
    kinds = kinds_of_layers(tiny_config(kind))
    found = [[layer for layer, other in enumerate(kinds) if other == one] for one in dict.fromkeys(kinds)]
    assert found == groups
