"""Claims: a model with recurrent layers goes through a whole run as any other does: one pass is one pass per turn, with
every mode of checkpointing, LoRA on all its linear layers or all weights trained, compiled or not, on one process or
two; it resumes bit for bit, merges, and loads where the checkpoint it came from loads; it learns the quickstart's task.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.paths import QUICKSTART
from support.processes import in_processes
from support.recipes import quickstart_recipe

from mtr.model.compiled import compile_layers
from mtr.recipe.loading import load_recipe
from mtr.recurrence.chunks import ChunkPlan, chunk_plan
from mtr.training.loop import train
from mtr.training.state import RunState

Models = Callable[..., Path]
Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
Lines = list[dict[str, Any]]
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
NUMBERS = ("loss", "grad_norm", "eval_loss")


def lines(folder: Path) -> Lines:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differs(one: Path, other: Path) -> float:
    """The largest relative difference of losses and gradient norms, step by step."""
    pairs = [
        (mine[key], theirs[key])
        for mine, theirs in zip(lines(one), lines(other), strict=True)
        for key in NUMBERS
        if key in mine
    ]
    assert len(pairs) >= 4
    return float(max(abs(a - b) / abs(a) for a, b in pairs))


SMALL: dict[str, dict[str, Any]] = {
    "small": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
"""A Qwen3.5 of a layer of each kind, where each is compiled."""


def recipes_in(folder: Path, models: Models) -> Recipes:
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(rows[:9]))

    def write(name: str, kind: str = "qwen3_5", **sections: Any) -> Path:
        training = {
            "output_dir": str(folder / name),
            "max_steps": 4,
            "conversations_per_step": 3,
            "gradient_checkpointing": False,
            **sections.pop("training", {}),
        }
        base = models("qwen3_5", **SMALL[kind]) if kind in SMALL else models(kind)
        model = {"name_or_path": str(base), "dtype": "float32"}
        data = {"train": str(folder / "few.jsonl"), **sections.pop("data", {})}
        return quickstart_recipe(folder, model=model, training=training, data=data, date="2026-01-31", **sections)

    return write


@pytest.fixture
def recipe_of(models: Models, tmp_path: Path) -> Recipes:
    """`recipe_of("name", ...)` trains a tiny Qwen3.5 in that folder, three conversations a step."""
    return recipes_in(tmp_path, models)


@pytest.fixture(scope="module")
def plain(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    train(load_recipe(recipes_in(folder, models)("one")))
    return folder / "one"


@pytest.fixture
def go(recipe_of: Recipes, tmp_path: Path) -> Callable[..., tuple[Path, RunState]]:
    def run(name: str, resume: bool = False, **sections: Any) -> tuple[Path, RunState]:
        return tmp_path / name, train(load_recipe(recipe_of(name, **sections)), resume=resume)

    return run


Go = Callable[..., tuple[Path, RunState]]

WAYS: dict[str, dict[str, Any]] = {
    "in small packs": {"sequence": {"max_length": 200, "max_tokens": 200}},
    "layers computed twice": {"training": {"gradient_checkpointing": "full"}},
    "all but products computed twice": {"training": {"gradient_checkpointing": "products"}},
    "all but attention computed twice": {"training": {"gradient_checkpointing": "selective"}},
}


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "all weights"])
def test_one_pass_is_one_pass_per_turn(go: Go, lora: dict[str, Any] | None) -> None:
    one, _ = go("one", lora=lora, sequence={"strategy": "single_pass"})
    apart, _ = go("apart", lora=lora, sequence={"strategy": "per_turn"})
    assert differs(one, apart) < 2e-5
    computed = [sum(line["num_tokens"] for line in lines(folder)) for folder in (one, apart)]
    assert 1.2 * computed[0] < computed[1]


@pytest.mark.parametrize("way", WAYS)
def test_how_a_step_is_computed_does_not_change_it(plain: Path, go: Go, way: str) -> None:
    assert differs(plain, go("other", **WAYS[way])[0]) < 2e-5


def test_a_state_that_is_not_forked_is_seen(plain: Path, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other direction: every chunk continues the one before it in the row, as in a model that knows no tree."""

    def chain(tree: Any, *size: int) -> ChunkPlan:
        tree.parent[:] = range(-1, len(tree.parent) - 1)
        return chunk_plan(tree, *size)

    monkeypatch.setattr("mtr.recurrence.kinds.chunk_plan", chain)
    assert differs(plain, go("other")[0]) > 1e-3


def test_a_run_resumes_bit_for_bit(go: Go, tmp_path: Path) -> None:
    whole, _ = go("whole", training={"save_steps": 2})
    part, _ = go("part", training={"save_steps": 2, "max_steps": 4})
    shutil.rmtree(part / "checkpoint-4")
    go("part", resume=True, training={"save_steps": 2, "max_steps": 4})
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, part)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert differs(whole, part) == 0


def test_an_adapter_merges_and_loads_where_its_base_does(go: Go, mtr: Mtr, models: Models) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, _ = go("run", training={"learning_rate": 1e-2})
    code, _, err = mtr("merge", run)
    assert (code, err) == (0, "")
    merged = AutoModelForCausalLM.from_pretrained(str(run / "merged"), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(str(models("qwen3_5")), dtype=torch.float32)
    assert type(merged) is type(base)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, str(run))(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


def test_lora_reaches_every_linear_layer_of_a_mixer(go: Go) -> None:
    run, _ = go("run", lora={"r": 2, "target_modules": "all-linear"})
    names = {name.split(".")[-3] for name in load_file(run / "adapter_model.safetensors") if ".linear_attn." in name}
    assert names == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    moved = load_file(run / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in moved.items() if "lora_B" in name)


@pytest.mark.distributed
def test_two_processes_are_one(recipe_of: Recipes, tmp_path: Path) -> None:
    train(load_recipe(recipe_of("one", training={"max_steps": 3})))
    done = in_processes(2, "train", recipe_of("two", training={"max_steps": 3}))
    assert done.returncode == 0, done.stderr
    assert differs(tmp_path / "one", tmp_path / "two") < 1e-5


@TRACED
def test_layers_that_are_traced_train_alike(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = go("one", kind="small", training={"max_steps": 2})
    monkeypatch.setattr("mtr.model.kernels.compile_layers", partial(compile_layers, backend="eager"))
    assert differs(one, go("other", kind="small", training={"max_steps": 2, "torch_compile": True})[0]) < 1e-6


@TRACED
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5", "bamba"])
def test_compiled_layers_train_alike(go: Go, kind: str) -> None:
    """Through Inductor."""
    one, _ = go("one", kind=kind, training={"max_steps": 2})
    other, _ = go("other", kind=kind, training={"max_steps": 2, "torch_compile": True})
    assert differs(one, other) < 1e-4


@pytest.mark.slow
def test_it_learns_conversations_of_the_quickstart(
    models: Models, write_recipe: Recipes, tmp_path: Path, mtr: Mtr
) -> None:
    """From random weights, by heart: each turn, generated from the model's own earlier responses, is the row's."""
    base = models(
        "qwen3_5",
        hidden_size=128,
        intermediate_size=384,
        head_dim=32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=True,
    )
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    recipe = write_recipe(
        model={"name_or_path": str(base)},
        lora=None,
        data={"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")},
        generation={"conversations": 12, "max_new_tokens": 48},
        training={
            "conversations_per_step": 6,
            "max_steps": 120,
            "learning_rate": 4e-3,
            "warmup_steps": 10,
            "gradient_checkpointing": False,
            "seed": 1,
        },
    )
    code, _, err = mtr("train", recipe)
    assert code == 0, err
    turns = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    right = {step: [t["response"] == t["reference"] for t in turns if t["step"] == step] for step in (0, 120)}
    assert sum(right[0]) == 0
    assert sum(right[120]) > 0.9 * len(right[120]) > 30
