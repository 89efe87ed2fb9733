"""How often a run compiles: packs of many lengths, evaluation and generation between, on the CPU.

    choice of the attention on the first pack, training, evaluation, generation, training, evaluation, ...

Two things compile. Flex attention's kernels: a forward and a backward for each span of a model, and as many again for
the choice, which measures without sinks and with the usual scale. Decoder layers: a graph for each kind of layer in
training and one where no gradient is kept, and one more for the first layer, whose input needs no gradient. Neither
grows with packs, and no layer goes past torch's limit, beyond which it would run uncompiled. Graphs are run operator by
operator: what is counted does not depend on the code that is made from them.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch._dynamo.utils import counters

from mtr.attention import flex_kernels
from mtr.attention.choice import fastest, pad_to_multiple_of, usable_backends
from mtr.attention.interface import use_tree_attention
from mtr.attention.layers import layer_spans
from mtr.attention.masks import distinct
from mtr.attention.model_parts import decoder
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.compiled import compile_layers
from mtr.model.lora import add_lora
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import LoraSection
from mtr.training.generation import generate_turns
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import merge
from mtr.tree.packing import Pack
from support.cuda.watch import apart
from support.masks import random_chat
from support.models import EXACT, tiny_config

_SIZES = (60, 20, 100, 7, 45)
"""Of the packs' segments, in tokens."""


@dataclass
class Outcome:
    kind: str
    packs: int = 0
    lengths: int = 0
    """Different ones among the packs."""
    kernels: int = 0
    """Of flex attention."""
    most_kernels: int = 0
    graphs: int = 0
    """Of the decoder layers."""
    most_graphs: int = 0
    layers: int = 0
    past_limit: int = 0
    """Frames that torch stopped compiling."""
    uncompiled: bool = False
    """The layers run as they are, which `torch_compile: auto` says in a note."""
    problem: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        within = self.kernels <= self.most_kernels and self.graphs <= self.most_graphs
        compiled = self.kernels > 0 and (self.graphs > 0 or self.kind.startswith(UNCOMPILED))
        return self.problem is None and within and not self.past_limit and compiled


UNCOMPILED = ("qwen3_moe", "deepseek_v3")
"""Kinds whose layers torch.compile refuses under LoRA on all linear layers: PEFT's layer for a router's parameter sets
the weight in place."""


def run(quick: bool) -> list[Outcome]:
    kinds = ("qwen3", "gemma3", "gpt_oss") if quick else EXACT
    return [run_of(kind, "full" if quick else mode) for kind in kinds for mode in (("full",) if quick else _MODES)]


_MODES = ("none", "selective", "full")


def run_of(kind: str, checkpointing: Any) -> Outcome:
    """A run of one kind of model."""
    began = time.perf_counter()
    outcome = Outcome(f"{kind}, {checkpointing}")
    with _counted(outcome):
        try:
            _run(kind, checkpointing, outcome)
        except Exception as error:
            outcome.problem = f"{type(error).__name__}: {error}"[:400]
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextlib.contextmanager
def _counted(outcome: Outcome) -> Iterator[None]:
    """Nothing is left compiled from before, and kernels run as graphs."""
    torch.compiler.reset()
    counters.clear()
    with (
        warnings.catch_warnings(),
        mock.patch.dict(flex_kernels._kernels, clear=True),
        mock.patch.object(flex_kernels, "_compile", lambda graph, _: lambda *given: apart(lambda: graph(*given))),
    ):
        warnings.simplefilter("ignore")
        yield
        outcome.kernels = len(flex_kernels._kernels)
    outcome.graphs = counters["stats"]["unique_graphs"]
    outcome.past_limit = sum(count for reason, count in counters["unimplemented"].items() if "limit" in str(reason))
    torch.compiler.reset()


def _run(kind: str, checkpointing: Any, outcome: Outcome) -> None:
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.pad_token_id = None
    model = add_lora(transformers.AutoModelForCausalLM.from_config(config), LoraSection(r=4), 0)
    use_tree_attention(model)
    model.train()
    outcome.layers = compile_layers(model, may_fall_back=True, backend=_as_it_is)
    checkpoint_activations(model, checkpointing)
    backends = usable_backends(config, torch.device("cuda"), torch.bfloat16)
    tree_model = TreeModel(model, *backends, choose=_flex_is_fastest)
    spans = distinct(layer_spans(config))
    outcome.most_kernels = (2 if len(backends) == 1 else 4) * len(spans)
    outcome.most_graphs = 2 * _kinds_of_layers(model) + 1
    batches = [_pack(seed, size, pad_to_multiple_of(backends)) for seed, size in enumerate(_SIZES)]
    for _ in range(2):
        for batch in batches:
            tree_model(batch).backward()
        model.eval()
        with torch.no_grad():
            for batch in batches[::2]:
                tree_model(batch)
        model.train()
        _generate(model)
    outcome.uncompiled = not decoder(model).layers[-1].forward._compiler.works
    outcome.packs, outcome.lengths = 2 * len(batches), len({batch.input_ids.shape[1] for batch in batches})


def _as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """The graph, run operator by operator; nothing in it is traced again."""
    return torch.compiler.disable(graph.forward)  # type: ignore[no-untyped-call]


def _flex_is_fastest(candidates: Any, *arguments: Any) -> Any:
    """Every candidate is measured; on the CPU another one would be taken."""
    fastest(candidates, *arguments)
    return "flex"


def _pack(seed: int, size: int, multiple: int) -> Batch:
    chats = [random_chat(np.random.default_rng(seed + 10 * n), 2 + seed % 3, size) for n in range(1 + seed % 2)]
    return build_batch(Pack(tuple(merge(views) for views in chats)), multiple)


def _kinds_of_layers(model: Any) -> int:
    """Layers that differ in more than their weights: by their span, and by what they are made of."""
    return len({_kind_of_layer(layer) for layer in decoder(model).layers})


def _kind_of_layer(layer: torch.nn.Module) -> tuple[Any, ...]:
    spans = {str(module.mtr_span) for module in layer.modules() if hasattr(module, "mtr_span")}
    return (*sorted(spans), *sorted(f"{name} {type(module).__name__}" for name, module in layer.named_modules()))


def _generate(model: Any) -> None:
    """Two held-out conversations of two turns, as `mtr train` generates them; the tokenizer is made up."""
    rng = np.random.default_rng(0)
    renderer: Any = SimpleNamespace(
        prompt=lambda history, tools: rng.integers(2, 60, 5 + 7 * len(history)).tolist(),
        split=lambda ids: ("", "answer"),
        expected=lambda message: SimpleNamespace(response="answer"),
        pad_id=0,
        stop_ids=[1],
    )
    roles = ("user", "assistant", "user", "assistant")
    messages = [SimpleNamespace(role=role, data={"role": role}, tool_calls=None) for role in roles]
    conversations: Any = [
        SimpleNamespace(where=f"row {n}", messages=messages, tools=None, turns=[1, 3], row={}) for n in range(2)
    ]
    generate_turns(model, renderer, conversations, 3)
