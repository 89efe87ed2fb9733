"""Claims: a model is trained in one pass where that is exact, else per turn in the rows that are; what the recipe asks
for and is not exact is refused; whatever is taken computes loss and gradients of plain passes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import save_random_model, tiny_config
from support.paths import QUICKSTART
from support.processes import in_processes

from mtr.attention.interface import use_own_attention
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.sample import first_views
from mtr.checks.verify import verify
from mtr.errors import UserError
from mtr.model import strategy
from mtr.model.probe import Verdict
from mtr.model.strategy import decide
from mtr.model.tree_model import RowModel
from mtr.prepare.builder import Builder
from mtr.recipe.loading import load_recipe
from mtr.recurrence import kinds
from mtr.recurrence.segments import ConvolutionPlan, convolution_plan
from mtr.training.loop import train
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge
from mtr.tree.mask import Tree
from mtr.tree.packing import Pack

Recipes = Callable[..., Path]
Models = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]

EXACT, FOREST, ROWS = Verdict(None, None), Verdict("T", None), Verdict("T", "P")


@pytest.mark.parametrize(
    ("asked", "verdict", "taken", "reason"),
    [
        ("auto", EXACT, "single_pass", None),
        ("auto", FOREST, "per_turn", "T"),
        ("auto", ROWS, "per_turn_unpacked", "T"),
        ("single_pass", EXACT, "single_pass", None),
        ("per_turn", EXACT, "per_turn", None),
        ("per_turn", FOREST, "per_turn", None),
        ("per_turn", ROWS, "per_turn_unpacked", "P"),
        ("per_turn_unpacked", EXACT, "per_turn_unpacked", None),
        ("per_turn_unpacked", ROWS, "per_turn_unpacked", None),
    ],
)
def test_what_is_exact_is_taken(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, asked: str, verdict: Verdict, taken: str, reason: str | None
) -> None:
    monkeypatch.setattr(strategy, "judge", lambda *_: verdict)
    decision = decide(load_recipe(write_recipe(sequence={"strategy": asked})), transformers.Qwen3Config())
    assert (decision.strategy, decision.reason) == (taken, reason)
    assert len(decision.notes) == (reason is not None)


@pytest.mark.parametrize("verdict", [FOREST, ROWS])
def test_one_pass_that_is_not_exact_is_refused(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    monkeypatch.setattr(strategy, "judge", lambda *_: verdict)
    message = r"sequence\.strategy: .*\(qwen3\) cannot be trained exactly in one pass: T\. With auto"
    with pytest.raises(UserError, match=message):
        decide(load_recipe(write_recipe(sequence={"strategy": "single_pass"})), transformers.Qwen3Config())


@pytest.mark.parametrize("asked", ["auto", "single_pass", "per_turn", "per_turn_unpacked"])
def test_a_model_that_sees_what_it_predicts_is_refused(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(strategy, "judge", lambda *_: Verdict("T", "P", "A"))
    with pytest.raises(
        UserError, match=r"model\.name_or_path: .*\(qwen3\) is no causal language model: A, so it would"
    ):
        decide(load_recipe(write_recipe(sequence={"strategy": asked})), transformers.Qwen3Config())


SINGLE_PASS = "sequence.strategy=single_pass"
OTHERS: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: tiny_config(
        "llama",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0},
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "rwkv": lambda: transformers.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=8192
    ),
}
"""ALiBi, a recurrence that is handed nothing, and a head of several layers: no tree can be laid over them."""


@pytest.fixture
def other(tmp_path: Path) -> Callable[[str], str]:
    def save(kind: str) -> str:
        save_random_model(OTHERS[kind](), QUICKSTART / "base", tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_one_turn_are_plain_passes(write_recipe: Recipes, other: Callable[[str], str], kind: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": other(kind)}, lora=None))
    result = verify(recipe, conversations=2)
    assert result["strategy"] == "per_turn_unpacked"
    assert result["passed"], result


def test_dynamic_rope_computes_each_row_as_the_first(
    write_recipe: Recipes, other: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the longest row before it, as the model does by itself."""
    folder = other("dynamic")
    recipe = load_recipe(write_recipe(model={"name_or_path": folder}, lora=None))
    views = first_views(recipe, Builder(recipe, load_renderer(recipe, load_tokenizer(recipe))).turns, 2)
    rows = sorted((view for group in views for view in group), key=lambda view: -view.num_tokens)
    assert rows[0].num_tokens > rows[-1].num_tokens > 16

    def losses(fresh: bool) -> list[float]:
        found: list[float] = []
        for view in rows:
            if fresh or not found:
                model = RowModel(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
                use_own_attention(model.model)
            found.append(float(model(build_batch(Pack((merge([view]),)))).detach()))
        return found

    assert losses(fresh=False) == pytest.approx(losses(fresh=True), rel=1e-12)
    monkeypatch.setattr("mtr.model.tree_model.forget_rows", lambda model: None)
    assert losses(fresh=False)[-1] != pytest.approx(losses(fresh=True)[-1], rel=1e-6)


def _along_the_row(tree: Tree, width: int) -> ConvolutionPlan:
    return convolution_plan(replace(tree, parent=np.arange(len(tree.parent)) - 1), width)


def test_rows_that_turns_cannot_share_are_noticed(
    write_recipe: Recipes, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose convolutions read along the row: the verdict on rows decides whether the loss is right."""
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models("lfm2"))}))
    monkeypatch.setattr(kinds, "convolution_plan", _along_the_row)
    monkeypatch.setattr(strategy, "judge", lambda *_: FOREST)
    assert not verify(recipe, conversations=2)["passed"]
    monkeypatch.setattr(strategy, "judge", lambda *_: ROWS)
    assert verify(recipe, conversations=2)["passed"]


def test_strategies_agree_on_a_model_that_can_do_all(write_recipe: Recipes, models: Models, tmp_path: Path) -> None:
    losses = []
    for taken in ("auto", "per_turn", "per_turn_unpacked"):
        output = tmp_path / taken
        model = {"name_or_path": str(models("qwen3"))}
        train(
            load_recipe(write_recipe(model=model, sequence={"strategy": taken}, training={"output_dir": str(output)}))
        )
        lines = (output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_says_what_it_took_and_why(
    mtr: Mtr, write_recipe: Recipes, other: Callable[[str], str], tmp_path: Path
) -> None:
    code, out, err = mtr("train", write_recipe(model={"name_or_path": other("bloom")}))
    assert code == 0, err
    said = " ".join((out + err).split())
    assert "turns are trained one by one, each in a row of its own, with the model's own attention" in said
    assert "(per_turn_unpacked): " in said
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["strategy"]["taken"] == "per_turn_unpacked"
    assert "no tree reaches it" in environment["strategy"]["reason"]
    output = f"training.output_dir={tmp_path / 'other'}"
    code, _, err = mtr("train", write_recipe(), f"model.name_or_path={tmp_path / 'bloom'}", SINGLE_PASS, output)
    assert code == 2
    assert "sequence.strategy: " in err


def test_each_pack_is_one_turn(
    write_recipe: Recipes, other: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """More packs than one a step, none with padding, a split that has nothing to split, memory for the longest turn."""
    path = write_recipe(
        model={"name_or_path": other("bloom")},
        sequence={"on_oom": "split", "max_length": 300, "max_tokens": "auto"},
        training={"gradient_checkpointing": "auto"},
    )
    assert train(load_recipe(path)).steps == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "checkpointing none (none 0.0 of" in said
    assert "estimated for 300 tokens)" in said


def test_what_is_not_one_pass_is_not_timed_as_one(mtr: Mtr, write_recipe: Recipes, other: Callable[[str], str]) -> None:
    code, _, err = mtr("bench", write_recipe(model={"name_or_path": other("bloom")}))
    assert code == 2
    assert "is trained per turn, so one pass cannot be timed: its attention does not go through" in " ".join(
        err.split()
    )


@pytest.fixture
def go(write_recipe: Recipes, other: Callable[[str], str], tmp_path: Path) -> Callable[..., Path]:
    """`go("name", ...)` trains a model of rows in that folder."""
    model = other("bloom")

    def run(name: str, resume: bool = False, steps: int = 4, **sections: Any) -> Path:
        training = {"output_dir": str(tmp_path / name), "max_steps": steps, "save_steps": 2}
        training |= {"gradient_checkpointing": False, **sections.pop("training", {})}
        path = write_recipe(model={"name_or_path": model}, training=training, date="2026-01-31", **sections)
        train(load_recipe(path), resume=resume)
        return tmp_path / name

    return run


def numbers(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("loss", "grad_norm", "eval_loss") if key in line] for line in lines]


def test_rows_resume_bit_for_bit(go: Callable[..., Path]) -> None:
    whole = go("whole")
    part = go("part")
    shutil.rmtree(part / "checkpoint-4")
    go("part", resume=True)
    assert numbers(part) == numbers(whole)
    name = "adapter_model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_rows_are_checkpointed(go: Callable[..., Path]) -> None:
    one = np.concatenate(numbers(go("one", steps=2)))
    for mode in ("products", "selective", "full"):
        other = np.concatenate(numbers(go(mode, steps=2, training={"gradient_checkpointing": mode})))
        assert other == pytest.approx(one, rel=1e-5), mode


@pytest.mark.distributed
def test_rows_on_two_processes_are_those_of_one(go: Callable[..., Path], tmp_path: Path) -> None:
    """Rows are shared out by cost."""
    one = go("one", steps=2, sequence={"on_oom": "split"})
    done = in_processes(2, "train", tmp_path / "recipe.yaml", f"training.output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert np.concatenate(numbers(tmp_path / "two")) == pytest.approx(np.concatenate(numbers(one)), rel=1e-5)


def test_a_resume_notices_another_strategy(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = go("run", steps=2)
    go("run", resume=True, steps=2)
    assert "laid out by" not in "".join(capsys.readouterr())
    monkeypatch.setattr(strategy, "judge", lambda *_: EXACT)
    monkeypatch.setattr("mtr.training.setup.lay_out", lambda model, _: use_own_attention(model))
    monkeypatch.setattr("mtr.training.setup.pack_model", lambda model, *_: RowModel(model))
    go("run", resume=True, steps=2)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "turns are laid out by single_pass (was per_turn_unpacked)" in said
    assert json.loads((run / "environment.json").read_text())["strategy"]["taken"] == "single_pass"


def test_inspect_lays_out_as_training_does(
    mtr: Mtr, write_recipe: Recipes, other: Callable[[str], str], models: Models
) -> None:
    shown = {}
    for kind, model in (("qwen3", str(models("qwen3"))), ("bloom", other("bloom"))):
        code, out, err = mtr("inspect", write_recipe(model={"name_or_path": model}))
        assert code == 0
        shown[kind] = " ".join((out + err).split())
    assert "one by one" not in shown["qwen3"]
    assert "one by one, each in a row of its own" in shown["bloom"]
    assert ["tree 1 of" in text for text in shown.values()] == [False, True]
