"""Claims: families of models of every kind are exact as `sequence.strategy: auto` takes them, and a fault in any of
them would be seen; `scripts/support_table` counts nothing as exact that differs; docs/models.md is what it made.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from support.families import evidence
from support.families.__main__ import PAGE, RESULTS
from support.families.catalogue import FAMILIES, KEYS, config_of
from support.families.evidence import Difference, compared, gather
from support.families.page import page
from support.masks import plain_causal

import mtr.attention.interface
from mtr.model.probe import Verdict

Patch = pytest.MonkeyPatch

ONE_PASS = (
    "qwen3", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "qwen3_5_text", "kimi_linear", "nemotron_h", "lfm2",
    "jamba", "recurrent_gemma", "gemma3",
)  # fmt: skip
ROWS = ("bloom", "doge", "deepseek_v32")


@pytest.mark.parametrize("family", [*ONE_PASS, *ROWS])
def test_a_family_is_exact(family: str) -> None:
    """Loss and all gradients, of all weights and of LoRA; and they would not be if the tree were ignored."""
    found = gather(config_of(family), cases=("none", "lora", "naive"))
    assert found.strategy == ("single_pass" if family in ONE_PASS else "per_turn_unpacked")
    assert found.problem is None
    assert max(found.differences[case].worst for case in ("none", "lora")) <= evidence.EXACT == 1e-9
    assert found.differences["naive"].worst > 1e-3
    assert [name for name in found.differences["lora"].zero if ".indexer." not in name] == []  # it picks, and no more


def test_turns_that_share_a_row(monkeypatch: Patch) -> None:
    monkeypatch.setattr(evidence, "judge", lambda *_: Verdict("a reason", None))
    found = gather(config_of("qwen3"), cases=("none",))
    assert (found.strategy, found.reason, found.problem) == ("per_turn", "a reason", None)


def test_dropout_of_a_config_is_off() -> None:
    """As `mtr train` has it; with dropout, two passes would differ by 1e-1."""
    config = config_of("gpt_bigcode")
    assert config.attn_pdrop == config.resid_pdrop == 0.1
    assert gather(config, cases=("full",)).problem is None


# --- what differs is a problem ----------------------------------------------------------------------------------------


def test_a_verdict_that_is_wrong_is_a_problem(monkeypatch: Patch) -> None:
    monkeypatch.setattr(evidence, "judge", lambda *_: Verdict(None, None))
    found = gather(config_of("doge"), cases=("none",))
    assert found.strategy == "single_pass"
    assert re.fullmatch(r"none: loss differs by [\d.e-]+, gradients by [\d.e+-]+ \(model\.\S+\)", str(found.problem))


def test_a_fault_that_the_probe_did_not_see_is_a_problem(monkeypatch: Patch) -> None:
    gather(config_of("qwen3"), cases=())  # the verdict is kept
    monkeypatch.setattr(mtr.attention.interface, "tile_plan", plain_causal)
    found = gather(config_of("qwen3"), cases=("lora",))
    assert str(found.problem).startswith("lora: loss differs by ")


ONE, NONE = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def test_gradients_of_zero() -> None:
    """One that is zero in plain passes is counted; one that is zero only in what is trained is an error of 1."""
    plain = (2.0, {"a": ONE, "b": NONE})
    assert compared(plain, plain) == Difference(0.0, 0.0, "", 2, ["b"])
    assert compared((2.0, {"a": NONE, "b": NONE}), plain) == Difference(0.0, 1.0, "a", 2, ["b"])
    assert compared((2.0, {"a": ONE, "b": ONE * 1e-6}), plain) == Difference(0.0, 1e-6, "b", 2, ["b"])
    assert compared((2.5, {"a": ONE, "b": NONE}), plain).worst == 0.25


def test_nan_is_not_exact() -> None:
    found = compared((2.0, {"a": ONE * torch.nan, "b": ONE}), (2.0, {"a": ONE, "b": ONE}))
    assert not found.worst <= evidence.EXACT
    assert found.where == "a"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_family_is_listed_once() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names)) >= 70
    assert set(KEYS) <= set(names)


def test_the_page_is_that_of_its_figures() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(results), "run scripts/support_table"
    rows = results["families"]
    assert list(rows) == [family.name for family in FAMILIES]
    assert [name for name, row in rows.items() if row["problem"]] == []
    assert max(row["probe_seconds"] for row in rows.values()) < 30


def rows(**changes: Any) -> dict[str, Any]:
    small = {"loss": 0.0, "gradient": 2e-15, "zero": [], "tensors": 3}
    differences = dict.fromkeys(("none", "full", "lora", "float32", "naive"), small)
    row = {"strategy": "single_pass", "reason": None, "problem": None, "differences": differences, **changes}
    return {"versions": {"a": "1", "b": "2"}, "date": "D", "cores": 2, "seconds": 61.0, "families": {"llama": row}}


def test_what_the_page_says() -> None:
    text = page(rows())
    assert "1 families: 1 exact in one pass, 0 trained per turn." in text
    assert "| `llama` | Llama 2, 3, R1 distills on Llama | 2e-15 | 2e-15 | 2e-15 |" in text
    assert "in 2 minutes on 2 CPU cores, with a 1 and b 2, on D" in text
    apart = page(rows(strategy="per_turn", reason="odd | reason"))
    assert "0 exact in one pass, 1 trained per turn." in apart
    assert "- odd \\| reason. `llama`" in apart
    zero = {"loss": 0.0, "gradient": 0.0, "zero": ["x", "y"], "tensors": 9}
    dead = page(rows(differences={**rows()["families"]["llama"]["differences"], "lora": zero}))
    assert "LoRA tensors that no gradient reaches, in plain passes either: `llama` (2 of 9)." in dead


def test_the_page_calls_no_problem_exact() -> None:
    text = page(rows(problem="none: loss differs"))
    assert "0 exact in one pass, 0 trained per turn, 1 not trained." in text
    assert "| `llama`" not in text
    assert "**Not shown to be exact**: `llama` (none: loss differs)." in text
