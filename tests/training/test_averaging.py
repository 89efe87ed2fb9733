"""Claims: a schedule-free optimizer's averages are in the model within `averaged_weights`, and what it trains is there
again afterwards, bit for bit and whatever happens; generation during training has the averages, as the exported
adapter has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.paths import QUICKSTART
from support.runs import trained_run

import mtr.training.generation
from mtr.data.parsing import parse_row
from mtr.talk.finding import find_voice
from mtr.talk.loading import load_speakers
from mtr.training.averaging import averaged_weights
from mtr.training.generation import generate_turns

pytest.importorskip("schedulefree")
FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-2}
BETA = 0.9


def trained_a_bit() -> tuple[torch.nn.Linear, Any]:
    import schedulefree

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1, betas=(BETA, 0.999))
    optimizer.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_the_averages_are_there_within_it_and_the_trained_weights_after_it() -> None:
    model, optimizer = trained_a_bit()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with averaged_weights(optimizer) as are_others:
        assert are_others
        for name, parameter in model.named_parameters():
            z = optimizer.state[parameter]["z"]  # y = beta x + (1 - beta) z, in the words of the paper
            torch.testing.assert_close(BETA * parameter + (1 - BETA) * z, before[name], atol=1e-6, rtol=0)
            assert not torch.equal(parameter, before[name])
    with pytest.raises(RuntimeError, match="in between"), averaged_weights(optimizer):
        raise RuntimeError("in between")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_other_optimizers_have_no_averages() -> None:
    model = torch.nn.Linear(4, 4)
    with averaged_weights(torch.optim.AdamW(model.parameters())) as are_others:
        assert not are_others


def test_what_is_generated_is_what_the_exported_adapter_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watched(model: Any, *others: Any) -> Any:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
        return generate_turns(model, *others)

    monkeypatch.setattr(mtr.training.generation, "generate_turns", watched)
    run = trained_run(
        tmp_path,
        data={"eval": str(QUICKSTART / "eval.jsonl")},
        training={**FREE, "save_steps": 1},
        generation={"conversations": 2, "max_new_tokens": 32},
    )
    lines = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 3}
    _, weights = seen
    saved = load_file(run / "checkpoint-3" / "training_state.safetensors")
    assert weights
    assert all(torch.equal(weights[name], saved[f"average.{name}"]) for name in weights)
    assert not any(torch.equal(weights[name], saved[f"parameter.{name}"]) for name in weights)

    speakers = load_speakers(find_voice(str(run)), torch.device("cpu"))
    rows = (QUICKSTART / "eval.jsonl").read_text().splitlines()[:2]
    held_out = [
        parse_row(json.loads(row), f"{QUICKSTART}/eval.jsonl, line {number}")
        for number, row in enumerate(rows, start=1)
    ]
    again = generate_turns(speakers.model, speakers.renderer, held_out, 32)
    told = {(line["conversation"], line["turn"]): line["response"] for line in lines if line["step"] == 3}
    assert {(turn.conversation, turn.turn): turn.response for turn in again} == told
