"""What only a CUDA device can show: flex and varlen are exact, forward and backward, in packs of odd shapes; models
with them equal one pass per turn; they train, in every mode of checkpointing.

Each body also runs on the CPU, with stand-ins for the kernels (`support.gpu`), so that it is known to be right but for
them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.config import parse_warning_filter
from accelerate.state import AcceleratorState
from support.attention import CASES, Case, difference
from support.gpu import CONFIGS, LIBRARY_WARNINGS, on_cuda, random_tree, stand_in_for_cuda
from support.models import ARCHITECTURES
from support.paths import QUICKSTART

import mtr.attention.flex_kernels
from mtr.bench.runs import bench
from mtr.checks.verify import verify
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Backend
from mtr.training.loop import train
from mtr.tree.mask import FULL, Span

Recipes = Callable[..., Path]
Models = Callable[..., Path]

WINDOWS = [Span("sliding", 100), Span("chunked", 96)]
TOLERANCE = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Of attention against float64, relative to the largest element; float32 may be TF32 inside a kernel."""
LENGTHS: dict[str, tuple[int, ...]] = {"flex": (128, 640, 1280), "varlen": (5, 77, 640, 1283)}
"""Flex takes packs of whole blocks."""


def wide(case: Case) -> Case:
    """With heads of 64 and more, as models have them."""
    return case._replace(key_size=case.key_size * 8, value_size=case.value_size * 8)


HEADS = {name: wide(case) for name, case in CASES.items()} | {
    "7 query heads to a key head": Case(heads=14, key_size=128, value_size=128),
    "heads of 256": Case(key_size=256, value_size=256),
    "heads of 8": Case(),
}
KERNELS: list[tuple[Backend, str, Span, str]] = [
    *(("flex", name, FULL, "bfloat16") for name in HEADS),
    *(("flex", name, FULL, "float32") for name in ("grouped heads", "wide values", "soft cap", "sinks")),
    *(("flex", name, span, "bfloat16") for name in ("grouped heads", "sinks") for span in WINDOWS),
    *(("varlen", name, FULL, "bfloat16") for name, case in HEADS.items() if case.softcap is None),
    *(("varlen", name, span, "bfloat16") for name in ("grouped heads", "sinks") for span in WINDOWS),
    ("varlen", "grouped heads", FULL, "float16"),
]


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph of another test counts towards torch.compile's limits, and none decides the precision of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cuda":
        torch.compiler.reset()
    else:
        stand_in_for_cuda(monkeypatch)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@on_cuda(
    "backend, name, span, dtype",
    KERNELS,
    rehearsed=[("flex", "soft cap", WINDOWS[1], "float32"), ("varlen", "sinks", WINDOWS[0], "bfloat16")],
)
def test_kernels_equal_dense_attention(device: str, backend: Backend, name: str, span: Span, dtype: str) -> None:
    """Output and every gradient, for packs of several lengths."""
    for length in LENGTHS[backend]:
        tree = random_tree(length, length, device)
        worst = difference(tree, span, HEADS[name], dtype=getattr(torch, dtype), backend=backend)
        assert max(worst.values()) < TOLERANCE[dtype], (length, worst)


@on_cuda("", [()], rehearsed=[()])
def test_flex_compiles_once_for_packs_of_all_lengths(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    own = mtr.attention.flex_kernels._compile

    def count(*arguments: Any) -> Any:
        compiled.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(mtr.attention.flex_kernels, "_compile", count)
    monkeypatch.setattr(mtr.attention.flex_kernels, "_kernels", {})
    for length in (256, 640, 1280, 384):
        worst = difference(
            random_tree(length, length, device), FULL, HEADS["grouped heads"], dtype=torch.bfloat16, backend="flex"
        )
        assert max(worst.values()) < TOLERANCE["bfloat16"], (length, worst)
    assert len(compiled) == 2, "one forward, one backward"


def model(models: Models, kind: str) -> dict[str, Any]:
    return {"name_or_path": str(models(kind, **CONFIGS[kind]))}


EXACT = [*((kind, way) for kind in ("qwen3", "gemma3", "qwen3_moe") for way in ("flex", "sdpa"))]
EXACT += [("gpt_oss", "flex"), ("gemma2", "flex"), ("deepseek_v3", "flex")]


@on_cuda("kind, attention", EXACT, rehearsed=[("gpt_oss", "flex")])
def test_models_are_exact_in_float32(
    device: str, kind: str, attention: str, write_recipe: Recipes, models: Models
) -> None:
    result = verify(
        load_recipe(write_recipe(model=model(models, kind))), conversations=2, dtype="float32", attention=attention
    )
    assert result["attention"] == attention
    assert result["passed"], result


ROUNDED = [(kind, "auto") for kind in ("qwen3", "llama", "gemma3", "gpt_oss", "deepseek_v3")]
ROUNDED += [(kind, way) for kind in ("qwen3", "deepseek_v3") for way in ("flex", "varlen")]


@on_cuda("kind, attention", ROUNDED, rehearsed=[("deepseek_v3", "auto")])
def test_models_in_bfloat16(device: str, kind: str, attention: str, write_recipe: Recipes, models: Models) -> None:
    result = verify(
        load_recipe(write_recipe(model=model(models, kind))), conversations=2, dtype="bfloat16", attention=attention
    )
    assert result["attention"] in (("flex", "varlen") if attention == "auto" else (attention,))
    assert result["passed"], result


@on_cuda("", [()], rehearsed=[()])
def test_float64_is_exact_with_a_dense_mask(device: str, write_recipe: Recipes) -> None:
    result = verify(load_recipe(write_recipe()), conversations=2)
    assert result["attention"] == "sdpa"
    assert result["passed"], result


def losses(recipe: Path) -> list[float]:
    """Of each step of a run, and of its evaluations."""
    asked = load_recipe(recipe)
    train(asked, overwrite=True)
    lines = (Path(asked.training.output_dir) / "metrics.jsonl").read_text().splitlines()
    values = [value for line in map(json.loads, lines) for key, value in line.items() if key in TRACKED]
    return [value for value in values if value is not None]  # of a float16 step that overflowed


TRACKED = ("loss", "eval_loss", "grad_norm")
LORA = {"r": 8}
TRAINED = [("auto", "bfloat16", LORA), ("auto", "bfloat16", None), ("varlen", "float16", LORA)]
TRAINED += [("flex", "float32", LORA), ("flex", "float32", None)]


@on_cuda("attention, dtype, lora", TRAINED, rehearsed=[("auto", "bfloat16", None)])
def test_training_is_like_per_turn(
    device: str, attention: str, dtype: str, lora: dict[str, Any] | None, write_recipe: Recipes, tmp_path: Path
) -> None:
    """Steps, evaluation and generation of both strategies."""
    runs = [
        losses(
            write_recipe(
                model={"dtype": dtype, "attention": attention},
                lora=lora,
                data={"eval": _few_rows(tmp_path)},
                generation={"conversations": 1, "max_new_tokens": 4},
                sequence={"strategy": strategy},
                training={"max_steps": 2, "eval_steps": 1},
            )
        )
        for strategy in ("single_pass", "per_turn")
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3 if dtype == "float32" else 3e-2)


def _few_rows(folder: Path) -> str:
    path = folder / "few.jsonl"
    path.write_text("\n".join((QUICKSTART / "eval.jsonl").read_text().splitlines()[:2]) + "\n")
    return str(path)


MODES = ("none", "products", "selective", "full", "offload")


@on_cuda("attention, modes", [("flex", MODES), ("varlen", MODES)], rehearsed=[("varlen", MODES[:3])])
def test_checkpointing_changes_no_number(
    device: str, attention: str, modes: tuple[str, ...], write_recipe: Recipes
) -> None:
    runs = [
        losses(
            write_recipe(model={"dtype": "bfloat16", "attention": attention}, training={"gradient_checkpointing": mode})
        )
        for mode in modes
    ]
    for mode, run in zip(modes[1:], runs[1:], strict=True):
        assert run == pytest.approx(runs[0], rel=1e-2), mode


@on_cuda("lora", [LORA, None], rehearsed=[None])
def test_packs_are_fitted_to_the_memory(device: str, lora: dict[str, Any] | None, write_recipe: Recipes) -> None:
    """The probe runs under the same autocast as the steps."""
    recipe = write_recipe(model={"dtype": "bfloat16"}, lora=lora, sequence={"max_tokens": "auto", "max_length": 512})
    assert losses(recipe)


@on_cuda("", [()], rehearsed=[()])
def test_the_bench_runs_on_the_device(device: str, write_recipe: Recipes) -> None:
    result = bench(load_recipe(write_recipe()), conversations=1, repeats=1)
    assert result["cases"][0]["attention"] in ("flex", "varlen")
    assert result["max_relative_loss_difference"] < 1e-3


# --- what kernels and libraries ask of these tests -------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads_of_the_models_fit_the_kernels(kind: str) -> None:
    """16 for a matrix product in Triton, a multiple of 8 for FlashAttention; rows of experts of 16 bytes."""
    options = {**ARCHITECTURES[kind][1], **CONFIGS[kind]}
    if "qk_nope_head_dim" in options:
        sizes = [options["qk_nope_head_dim"] + options["qk_rope_head_dim"], options["v_head_dim"]]
    else:
        sizes = [options["head_dim"]]
    assert all(16 <= size <= 256 and size % 8 == 0 for size in sizes), sizes
    widths = [options[key] for key in ("hidden_size", "moe_intermediate_size") if key in options]
    assert all(width % 8 == 0 for width in widths), widths


@pytest.mark.parametrize(
    ("module", "is_error"),
    [("torch._inductor.compile_fx", False), ("triton.compiler", False), ("mtr.training.loop", True), ("torchao", True)],
)
def test_a_hint_of_torch_is_no_failure_and_a_warning_of_ours_is(module: str, is_error: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in LIBRARY_WARNINGS:
            warnings.filterwarnings(*parse_warning_filter(text, escape=False))
        raised = pytest.raises(UserWarning) if is_error else nullcontext()
        with raised:
            warnings.warn_explicit("TensorFloat32 tensor cores are not enabled", UserWarning, "file.py", 1, module)
