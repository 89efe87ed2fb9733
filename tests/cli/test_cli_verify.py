"""Claims: `mtr verify` takes its options and overrides, exits with 1 when it fails, and writes its result where
`--json` says: with a file the table stays on standard output, without one the JSON is all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


def verified(passed: bool = True) -> dict[str, Any]:
    both = {"loss": 0.0, "gradient": 0.0}
    return {
        "conversations": 1,
        "turns": 2,
        "dtype": "float64",
        "attention": "segment",
        "device": "cpu",
        "strategy": "single_pass",
        "loss": {"trained": 1.0, "per_turn": 1.0},
        "max_relative_difference": both,
        "tolerance": both,
        "tensors": 3,
        "zero_gradients": [],
        "passed": passed,
    }


@pytest.fixture
def verify_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments that `mtr verify` hands on; nothing is computed."""
    calls: list[tuple[Any, ...]] = []

    def verify(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return verified()

    monkeypatch.setattr("mtr.checks.verify.verify", verify)
    return calls


@pytest.mark.usefixtures("verify_calls")
@pytest.mark.parametrize("before", [True, False])
def test_json_without_a_file_is_all_of_standard_output(mtr: Mtr, write_recipe: Write, before: bool) -> None:
    recipe = write_recipe()
    code, out, _ = mtr("verify", *(["--json", recipe] if before else [recipe, "--json"]))
    assert code == 0
    assert json.loads(out) == verified()
    assert out.count("\n") == 1


@pytest.mark.usefixtures("verify_calls")
@pytest.mark.parametrize("before", [True, False])
def test_json_with_a_file_leaves_the_table_on_standard_output(
    mtr: Mtr, write_recipe: Write, tmp_path: Path, before: bool
) -> None:
    recipe, file = write_recipe(), tmp_path / "new" / "out.json"
    code, out, _ = mtr("verify", *(["--json", file, recipe] if before else [recipe, "--json", file]))
    assert code == 0
    assert json.loads(file.read_text()) == verified()
    assert "what is trained, compared with one plain pass per turn" in out
    assert "passed" in out


def test_options_and_overrides_reach_the_command(
    mtr: Mtr, write_recipe: Write, verify_calls: list[tuple[Any, ...]]
) -> None:
    code, out, _ = mtr(
        "verify", write_recipe(), "loss.weighting=turn", "--conversations", 7, "--dtype", "float32",
        "--attention", "eager", "training.seed=5",
    )  # fmt: skip
    assert code == 0
    assert "passed" in out
    ((recipe, conversations, dtype),) = verify_calls
    assert (conversations, dtype) == (7, "float32")
    assert (recipe.loss.weighting, recipe.training.seed, recipe.model.attention) == ("turn", 5, "eager")


def test_verify_exits_with_1_when_it_fails(mtr: Mtr, write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.checks.verify.verify", lambda *_: verified(passed=False))
    code, out, err = mtr("verify", write_recipe())
    assert (code, err) == (1, "")
    assert "FAILED" in out
    code, out, _ = mtr("verify", write_recipe(), "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False


@pytest.mark.usefixtures("verify_calls")
def test_a_result_that_cannot_be_written_is_an_error(mtr: Mtr, write_recipe: Write) -> None:
    recipe = write_recipe()
    code, _, err = mtr("verify", recipe, "--json", recipe / "out.json")
    assert code == 2
    assert err.startswith("error: ")
    assert str(recipe / "out.json") in err
