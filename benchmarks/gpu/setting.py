"""Sizes, models and conversations that the parts share."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.results import Measured, clear_memory, failure, is_out_of_memory
from mtr.attention.interface import use_tree_attention
from mtr.bench.runs import set_up
from mtr.bench.setup import Options, Setup
from mtr.bench.synthetic import Shape, make_views
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.compiled import CompiledForward
from mtr.recipe.sections import Checkpointing, Recipe
from mtr.tree.layout import Layout
from mtr.tree.packing import build_layouts

BENCHMARKS = Path(__file__).parent.parent
MODELS = ("qwen3-8b", "llama-3-8b")
LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Size:
    """Sizes of the cases. `shape` is words per turn: user, thinking, response."""

    rehearsal: bool = False
    packs: tuple[int, ...] = (16384, 32768, 65536)
    turns: tuple[int, ...] = (4, 8, 16, 32)
    shape: tuple[int, int, int] = (60, 600, 200)
    long: tuple[int, int, int, int] = (39, 200, 2000, 600)
    """Turns, user, thinking, response."""
    modes: tuple[Checkpointing, ...] = ("none", "products", "selective", "full")
    repeats: int = 3
    kernel_lengths: tuple[int, ...] = (640, 1408)
    tokens: int = 16384
    """Of the pack of smoke and of qlora."""


TINY = Size(
    rehearsal=True,
    packs=(512, 1024),
    turns=(2, 4),
    shape=(4, 12, 6),
    long=(8, 4, 40, 12),
    repeats=1,
    kernel_lengths=(128,),
    tokens=512,
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "dtype": "float32",
}
"""What a rehearsal makes of a config."""


def shape_config(name: str, size: Size) -> dict[str, Any]:
    """The config of one of benchmarks/shapes."""
    config: dict[str, Any] = json.loads((BENCHMARKS / "shapes" / name / "config.json").read_text())
    return config | (SMALL if size.rehearsal else {})


def recipe_for(name: str, size: Size, max_tokens: int, folder: Path) -> Recipe:
    """With the config of a shape, which is written to `folder`."""
    (folder / "config.json").write_text(json.dumps(shape_config(name, size)))
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "data": {"train": "synthetic"},
            "lora": LORA,
            "sequence": {"max_length": max_tokens, "max_tokens": max_tokens},
            "training": {"output_dir": "unused", "gradient_checkpointing": "none"},
        }
    )


class Bench:
    """One model with random weights at a time, opened for the first case that needs it."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._open: tuple[str, int, bool] | None = None
        self._setup: Setup | Exception | None = None

    def open(self, name: str, max_tokens: int, all_backends: bool = False) -> Setup:
        """
        Raises:
            Exception: it cannot be loaded; at once for the cases that ask for it again.
        """
        asked = (name, max_tokens, all_backends)
        if self._open != asked:
            self.close()
            self._open = asked
            options = Options(random_weights=True, all_backends=all_backends)
            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                try:
                    self._setup = set_up(recipe_for(name, self._size, max_tokens, Path(folder)), options)
                except Exception as error:
                    self._setup = error
        if isinstance(self._setup, Exception):
            raise self._setup
        assert self._setup is not None
        use_tree_attention(self._setup.model)
        self._setup.model.zero_grad(set_to_none=True)
        return self._setup

    def close(self) -> None:
        self._open = self._setup = None
        clear_memory()


def keep(model: Any, mode: Checkpointing) -> None:
    """Switch to this mode of gradient checkpointing."""
    checkpoint_activations(model, "none")
    checkpoint_activations(model, mode)


def compiled_layers(model: Any) -> int:
    """Decoder layers that run compiled."""
    forwards = (module.forward for module in model.modules())
    return sum(isinstance(forward, CompiledForward) and forward._compiler.works for forward in forwards)


def first_that_fits(model: Any, modes: Sequence[Checkpointing], measure: Callable[[], Measured]) -> Measured:
    """Measured with the first of these modes of checkpointing that does not run out of memory.

    Raises:
        OutOfMemoryError: none fits. Other errors as they come.
    """
    failed: list[Measured] = []
    for mode in modes:
        keep(model, mode)
        try:
            return {"gradient_checkpointing": mode, **measure(), "failed": failed}
        except Exception as error:
            if mode == modes[-1] or not is_out_of_memory(error):
                raise
            failed.append({"gradient_checkpointing": mode, **failure(error)})
        model.zero_grad(set_to_none=True)
        clear_memory()
    raise AssertionError("no modes")


def layouts_of(shape: Shape, conversations: int, own: Setup, budget: int) -> list[Layout]:
    views = make_views(shape, conversations, own.vocabulary)
    return [layout for group in views for layout in build_layouts(group, "single_pass", budget)]


@functools.cache
def tokens_of(shape: Shape, vocabulary: int) -> int:
    """Of one conversation's tree."""
    (group,) = make_views(shape, 1, vocabulary)
    return sum(layout.num_tokens for layout in build_layouts(group, "single_pass", 10**9))
