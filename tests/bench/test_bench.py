"""Claims: the bench does the same work in every case, counts and bounds it right, and shows it in 80 columns; a sweep
needs neither data nor weights; the picture is drawn; TRL, where it is installed, computes the same loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import QUICKSTART

from mtr.bench.plot import plot
from mtr.bench.runs import bench, sweep
from mtr.bench.setup import Options
from mtr.bench.synthetic import Shape, make_views, shapes_of
from mtr.model.loading import load_model
from mtr.model.tree_model import TreeModel
from mtr.recipe.loading import load_recipe
from mtr.tree.layout import View, merge
from mtr.tree.packing import merge_conversations

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A model folder with neither weights nor tokenizer."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_bytes((QUICKSTART / "base" / "config.json").read_bytes())
    return folder


def test_the_cases_do_the_same_work(write_recipe: Recipes, tmp_path: Path) -> None:
    result = bench(load_recipe(write_recipe()), conversations=3, repeats=1)
    assert [case["strategy"] for case in result["cases"]] == ["single_pass", "per_turn_packed", "per_turn_padded"]
    assert result["max_relative_loss_difference"] < 1e-5
    tokens = result["shape"]["num_tokens"]
    assert tokens["single_pass"] < tokens["per_turn_packed"] <= tokens["per_turn_padded"]
    assert result["limit"]["tokens"] == pytest.approx(tokens["per_turn_packed"] / tokens["single_pass"])
    assert 1 < result["limit"]["flops"] < result["limit"]["tokens"] * 1.05
    plot(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_a_case_that_does_less_is_seen_in_the_loss(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:

    def without_the_last_turn(views: list[list[View]], strategy: Any, *others: Any) -> Any:
        kept = [group[:-1] for group in views] if strategy == "single_pass" else views
        return merge_conversations(kept, strategy, *others)

    monkeypatch.setattr("mtr.bench.runs.merge_conversations", without_the_last_turn)
    result = bench(load_recipe(write_recipe()), conversations=2, repeats=1)
    assert result["max_relative_loss_difference"] > 1e-2


def test_rates_follow_from_the_counts(write_recipe: Recipes) -> None:
    result = bench(load_recipe(write_recipe()), conversations=2, repeats=1)
    shape = result["shape"]
    for case in result["cases"]:
        median = case["seconds"]["median"]
        assert case["tokens_per_second"] == pytest.approx(case["num_tokens"] / median)
        equivalent = shape["num_tokens"]["per_turn_packed"] / median
        assert case["per_turn_equivalent_tokens_per_second"] == pytest.approx(equivalent)
        assert case["flops_per_second"] == pytest.approx(case["flops"] / median)
        assert case["mfu"] == pytest.approx(case["flops_per_second"] / result["matrix_rate"]["flops_per_second"])
    one, packed, padded = result["cases"]
    assert packed["flops"] == padded["flops"]  # what is needed, padding left out
    assert result["limit"]["flops"] == packed["flops"] / one["flops"]
    assert sum(result["limit"]["by_part"]["single_pass"].values()) == pytest.approx(one["flops"])
    assert sum(result["limit"]["by_part"]["per_turn"].values()) == pytest.approx(packed["flops"])
    faster = min(packed["seconds"]["median"], padded["seconds"]["median"]) / one["seconds"]["median"]
    assert result["figure_of_merit"] == pytest.approx(faster / result["limit"]["flops"])


def test_further_backends_are_further_cases(write_recipe: Recipes) -> None:
    recipe = load_recipe(write_recipe())
    result = bench(recipe, 1, 1, Options(attention=("segment", "eager", "sdpa")))
    kinds = [(case["strategy"], case["attention"]) for case in result["cases"]]
    assert kinds == [
        ("single_pass", "segment"),
        ("per_turn_packed", "segment"),
        ("per_turn_padded", "sdpa"),
        ("single_pass", "eager"),
        ("single_pass", "sdpa"),
        ("per_turn_packed", "eager"),
        ("per_turn_packed", "sdpa"),
    ]
    assert result["max_relative_loss_difference"] < 1e-5


def test_the_padded_baseline_can_be_left_out(write_recipe: Recipes, mtr: Mtr) -> None:
    arguments = ("--conversations", 1, "--repeats", 1, "--no-padded")
    code, out, _ = mtr("bench", write_recipe(), *arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert [case["strategy"] for case in result["cases"]] == ["single_pass", "per_turn_packed"]
    assert set(result["speedup"]) == {"vs_per_turn_packed"}
    code, out, _ = mtr("bench", write_recipe(), *arguments)
    assert code == 0
    assert "- vs padded" in out


def test_the_packed_baseline_has_the_fastest_kernel(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.bench.runs.usable_backends", lambda *_: ["eager", "segment"])
    slow = TreeModel.forward

    def forward(self: Any, batch: Any, touch: bool = False) -> torch.Tensor:
        if self.backends == ("eager",):
            time.sleep(0.3)
        loss: torch.Tensor = slow(self, batch, touch)
        return loss

    monkeypatch.setattr(TreeModel, "forward", forward)
    result = bench(load_recipe(write_recipe()), 1, 1, Options(all_backends=True))
    kinds = [(case["strategy"], case["attention"]) for case in result["cases"]]
    assert kinds[1] == ("per_turn_packed", "segment")
    assert kinds[3:] == [("single_pass", "eager"), ("per_turn_packed", "eager")]


def test_out_of_memory_is_a_result_of_a_further_case(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, mtr: Mtr
) -> None:
    forward = TreeModel.forward

    def fails(self: Any, batch: Any, touch: bool = False) -> torch.Tensor:
        if self.backends == ("eager",):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB.")
        loss: torch.Tensor = forward(self, batch, touch)
        return loss

    monkeypatch.setattr(TreeModel, "forward", fails)
    arguments = ("--conversations", 1, "--repeats", 1, "--attention", "segment")
    code, out, _ = mtr("bench", write_recipe(), *arguments, "--attention", "eager")
    assert code == 0
    assert "single_pass eager: out of memory: CUDA out of memory. Tried to allocate 40 GiB." in out
    code, _, err = mtr("bench", write_recipe(), *arguments[:4], "--attention", "eager")
    assert code == 2
    assert "lower sequence.max_tokens" in err


def test_the_command_prints_json_alone(write_recipe: Recipes, mtr: Mtr) -> None:
    code, out, _ = mtr("bench", write_recipe(), "--conversations", 1, "--repeats", 1, "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) >= {"device", "shape", "cases", "speedup", "limit", "max_relative_loss_difference"}
    keys = {
        "strategy",
        "attention",
        "seconds",
        "conversations_per_second",
        "tokens_per_second",
        "supervised_tokens_per_second",
        "peak_memory_bytes",
        "loss",
    }
    assert all(set(case) >= keys and set(case["seconds"]) == {"min", "median", "max"} for case in result["cases"])


def test_the_tables_fit_80_columns(write_recipe: Recipes, mtr: Mtr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = mtr("bench", write_recipe(), "--conversations", 1, "--repeats", 1)
    assert code == 0
    assert "of the FLOP limit against the faster baseline" in out
    assert "per_turn_padded sdpa" in out
    assert "…" not in out
    code, out, _ = mtr("bench", write_recipe(), "--sweep", "--turns", "2,3", "--words", 4, 4, "--repeats", 1)
    assert code == 0
    assert "of limit" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_sweep_needs_no_weights_no_tokenizer_and_no_data(
    write_recipe: Recipes, config_only: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(config_only)}, data={"train": "nothing.jsonl"}))
    result = sweep(recipe, shapes_of([2, 4], [0, 20], 5, 6), 2, 1, Options(random_weights=True))
    assert [(point["turns"], point["thinking"]) for point in result["points"]] == [(2, 0), (4, 0), (2, 20), (4, 20)]
    for point in result["points"]:
        tokens, turns, thinking = point["shape"]["num_tokens"], point["turns"], point["thinking"]
        written = thinking + 2 if thinking else 0
        assert tokens["single_pass"] == 2 * (turns * (17 + written) + ((turns - 1) * (6 + 1) if thinking else 0))
        assert tokens["per_turn_packed"] == 2 * sum(17 * (i + 1) + written for i in range(turns))
        assert point["max_relative_loss_difference"] < 1e-5
        assert point["figure_of_merit"] > 0
    plot(result, tmp_path / "sweep.svg")
    assert "share of limit" in (tmp_path / "sweep.svg").read_text() or (tmp_path / "sweep.svg").stat().st_size > 10_000


def test_without_weights_bench_says_what_is_missing(write_recipe: Recipes, config_only: Path, mtr: Mtr) -> None:
    recipe = write_recipe(model={"name_or_path": str(config_only)})
    code, _, err = mtr("bench", recipe, "--sweep", "--turns", "2", "--repeats", 1)
    assert code == 2
    assert "no weights can be loaded" in err
    code, _, err = mtr("bench", recipe, "--random-weights")
    assert code == 2
    assert "no tokenizer can be loaded" in err


def test_random_weights_are_built_in_their_dtype(write_recipe: Recipes, config_only: Path) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(config_only), "dtype": "bfloat16"}, lora=None))
    one, other = (load_model(recipe, torch.device("cpu"), random_weights=True) for _ in range(2))
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert float(one.lm_head.weight.detach().std()) == pytest.approx(one.config.initializer_range, rel=0.1)
    assert one.dtype == torch.bfloat16
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vs", "axolotl"], "--vs: 'axolotl' is not a trainer that mtr can time; the only one is trl"),
        (["--sweep", "--turns", "2,x"], "--turns: '2,x' is not a comma-separated list of integers from 1 up"),
        (["--sweep", "--turns", "0"], "--turns: '0' is not a comma-separated list"),
        (["--sweep", "--thinking", ""], "--thinking: '' is not a comma-separated list of integers from 0 up"),
        (["--sweep", "--words", "0", "3"], "--words: both numbers must be at least 1"),
        (["--attention", "fast"], "--attention: 'fast' is not one of"),
        (["--plot", "x.doc"], "--plot: x.doc must end in"),
    ],
)
def test_wrong_options_are_one_line(write_recipe: Recipes, mtr: Mtr, options: list[str], words: str) -> None:
    code, out, err = mtr("bench", write_recipe(), *options)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_without_trl_the_install_line(write_recipe: Recipes, mtr: Mtr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = mtr("bench", write_recipe(), "--vs", "trl")
    assert code == 2
    assert err == "error: --vs trl: TRL is not installed; pip install 'mtr[trl]', or pip install trl\n"


def test_trl_computes_the_same_loss(write_recipe: Recipes) -> None:
    pytest.importorskip("trl")
    result = bench(load_recipe(write_recipe()), 2, 1, Options(versus_trl=True))
    assert result["trl"]["relative_loss_difference"] < 1e-5
    assert result["trl"]["seconds"]["forward_backward"]["median"] < result["trl"]["seconds"]["step"]["median"]


@pytest.mark.parametrize("shape", [Shape(1, 2, 3, 4), Shape(3, 5, 0, 7), Shape(4, 6, 15, 6)])
def test_synthetic_conversations_have_their_shape(shape: Shape) -> None:
    (views,) = make_views(shape, 1, vocabulary=100)
    assert len(views) == shape.turns
    assert views[-1].num_tokens == shape.longest
    written = shape.thinking + 2 if shape.thinking else 0
    assert {len(view.completion_ids) for view in views} == {written + shape.response + 1}
    assert max(int(view.ids.max()) for view in views) < 100
    layout = merge(views)
    if not shape.thinking:  # every turn continues the one before: a single path
        assert np.array_equal(layout.parent, np.arange(layout.num_tokens) - 1)
