"""Claims: what fits a GPU is told from the config alone, as benchmarks/memory.py counts it; settings that fit are
found, the fastest first; 4-bit weights take a quarter of those in 16 bits; several GPUs share with FSDP2 only.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from support.paths import ROOT

from mtr.errors import UserError
from mtr.model.checkpointing import MODES
from mtr.plan.fit import CONTEXT, Fit
from mtr.plan.gpus import Gpu, find_gpu
from mtr.plan.memory import Finder, Needs, fits
from mtr.recipe.model_config import read_config
from mtr.recipe.sections import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
GIB = 2**30


def recipe_of(shape: str = "qwen3-8b", **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "model": {"name_or_path": str(ROOT / "benchmarks" / "shapes" / shape), "dtype": "bfloat16"},
        "lora": {"r": 16},
        "data": {"train": "rows.jsonl"},
        "training": {"output_dir": "run"},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys} if keys is not None else None
    return Recipe.model_validate(raw)


def small_recipe(**sections: Any) -> Recipe:
    """Of the quickstart's model, with packs that take a few hundred MiB."""
    model = {"name_or_path": str(ROOT / "recipes" / "quickstart" / "base"), **sections.pop("model", {})}
    return recipe_of(model=model, lora={"r": 4}, **sections)


@pytest.fixture(scope="module")
def small() -> Needs:
    recipe = small_recipe()
    return Needs(recipe, read_config(recipe.model))


@pytest.fixture(scope="module")
def needs() -> Needs:
    recipe = recipe_of()
    return Needs(recipe, read_config(recipe.model))


@pytest.fixture(scope="module")
def finder(needs: Needs) -> Finder:
    return Finder(needs.recipe, needs.config)


def gpu_with(taken: int) -> Gpu:
    """A GPU that holds so many bytes, and little more."""
    return Gpu("made up", (taken + 2**20) / GIB, 100.0, "")


def test_a_gpu_without_bfloat16_gets_float16(small: Needs) -> None:
    found = Finder(small.recipe, small.config).settings_for(find_gpu("T4"))
    assert found is not None
    assert found.recipe.model.dtype == found.changes["model.dtype"] == "float16"


def test_an_8b_model_is_told_in_seconds_without_weights() -> None:
    began = time.process_time()
    fit = fits(recipe_of(), find_gpu("H100 SXM"))
    assert time.process_time() - began < 10
    assert fit.weights == pytest.approx(2 * 8.19e9, rel=0.03)  # with the adapters, in float32
    assert (fit.checkpointing, fit.tokens, fit.in_words) == ("full", 16384, "fits")
    assert fit.low < fit.high < fit.low / 0.92 + 2 * CONTEXT


def test_modes_of_checkpointing_are_in_their_order(small: Needs) -> None:
    taken = [small.with_mode(mode, find_gpu("L4")).activations for mode in MODES]
    assert taken == sorted(taken, reverse=True)
    half = small.with_mode("full", find_gpu("L4"), tokens=8192).activations
    assert taken[MODES.index("full")] / 2 <= half < taken[MODES.index("full")]


@pytest.mark.parametrize("mode", ["none", "products", "full"])
def test_what_fits_is_found_with_the_least_checkpointing(small: Needs, mode: Any) -> None:
    gpu = gpu_with(small.with_mode(mode, find_gpu("L4")).high)
    found = small.largest(gpu)
    assert found is not None
    assert (found.checkpointing, found.tokens, found.fits) == (mode, 16384, True)
    auto = Needs(small.recipe.replace(training={"gradient_checkpointing": "auto"}), small.config)
    if mode == "products":
        assert auto.on(gpu).checkpointing == mode


@pytest.mark.slow
def test_packs_are_halved_before_4_bits_are_taken(small: Needs) -> None:
    gpu = gpu_with(small.with_mode("offload", find_gpu("L4"), tokens=8192).high)
    found = Finder(small.recipe, small.config).settings_for(gpu)
    assert found is not None
    assert found.changes["sequence.max_tokens"] == found.recipe.sequence.max_tokens == 8192
    assert found.fit.fits
    assert Finder(small.recipe, small.config).settings_for(Gpu("none", 0.5, 1.0, "")) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("B200", "none"), ("H100 SXM", "products"), ("RTX 5090", "full")])
def test_settings_recompute_no_more_than_they_must(needs: Needs, finder: Finder, name: str, mode: str) -> None:
    found = finder.settings_for(find_gpu(name))
    assert found is not None
    assert found.fit.fits
    assert (found.fit.checkpointing, found.recipe.training.checkpointing) == (mode, mode)
    assert found.fit.tokens == 16384
    less = MODES[: MODES.index(found.fit.checkpointing)]
    assert not any(needs.with_mode(other, find_gpu(name)).fits for other in less)


def test_weights_in_4_bits_take_a_quarter(needs: Needs) -> None:
    quantised = Needs(needs.recipe.replace(model={"load_in_4bit": True}), needs.config).weights
    kept = 2 * 151936 * 4096 * 2 + 43_646_976 * 4  # embeddings and head in 16 bits, adapters in 32
    assert quantised - kept == pytest.approx((needs.weights - kept) * 0.516 / 2, rel=0.001)


@pytest.mark.slow
def test_a_gpu_too_small_for_16_bits_gets_4(finder: Finder) -> None:
    found = finder.settings_for(Gpu("small", 16.0, 100.0, ""))
    assert found is not None
    assert found.recipe.model.load_in_4bit
    assert found.changes["model.load_in_4bit"] is True
    assert finder.settings_for(Gpu("too small", 4.0, 100.0, "")) is None
    assert finder.settings_for(Gpu("old", 16.0, 100.0, "", bf16=False)) is None  # 4 bits are multiplied in bfloat16


def test_several_gpus_share_what_is_sharded(small: Needs) -> None:
    gpu = find_gpu("L4")
    alone, together = small.on(gpu), small.on(gpu, 8)
    assert (together.weights, together.state) == (alone.weights, alone.state)  # replicated
    sharded = Needs(small.recipe.replace(training={"parallel": "fsdp2"}), small.config).on(gpu, 8)
    assert sharded.weights < alone.weights
    assert sharded.state == alone.state // 8


def test_words_follow_from_the_range() -> None:
    gpu = find_gpu("L4")

    def fit(gib: float) -> str:
        return Fit(gpu, 1, "full", int(gib * GIB), 0, 0, 0.92).in_words

    assert fit(gpu.memory_gib - 1.1) == "fits"
    assert fit(gpu.memory_gib - 0.7) == "tight"
    assert fit(gpu.memory_gib) == "does not fit"


def test_a_model_without_a_config_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="has no config"):
        fits(recipe_of(model={"name_or_path": str(tmp_path)}), find_gpu("L4"))
