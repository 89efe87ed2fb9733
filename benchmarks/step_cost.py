"""What a decoder layer's forward and backward cost on a GPU, by a roofline and without one.

    python benchmarks/step_cost.py [--shape FOLDER] [--tokens N] [--modes MODE ...] [--json FILE]

One layer of a shape from `benchmarks/shapes`, LoRA of rank 16 on every linear layer, bfloat16, in each mode of
gradient checkpointing, as it is and compiled:

    eager      meta tensors; bytes and floating-point operations of every operator, each a kernel of its own
    compiled   fake CUDA tensors and Inductor's code for sm_90; bytes as its scheduler counts them for each kernel

A kernel takes the larger of bytes / 2.9 TB/s and operations / 650 TFLOP/s (45 TFLOP/s in float32): what an H100
sustains on large shapes, assumed and not measured. Attention is left out: its operations depend on the trees, and it
is the same in all rows but for `full`, which does its forward twice. Needs triton and a C++ compiler
(`pip install '.[cuda-check]'`) and PYTHONPATH=tests.
"""

from __future__ import annotations

import argparse
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cuda import stub

if __name__ == "__main__":
    try:
        stub.load()
    except stub.MissingError as lack:
        sys.exit(str(lack))

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtr.attention.interface import use_tree_attention
from mtr.attention.model_parts import decoder
from mtr.files import write_json
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.compiled import compile_layers
from mtr.model.lora import add_lora
from mtr.recipe.sections import Checkpointing, LoraSection

HERE = Path(__file__).parent
BYTES_PER_SECOND = 2.9e12
FLOPS_PER_SECOND = {torch.bfloat16: 650e12, torch.float32: 45e12}
MODES: tuple[Checkpointing, ...] = ("none", "products", "selective", "full")
FREE = {"aten.detach.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
FREE |= {"aten.split.Tensor", "aten._unsafe_view.default", "aten.alias.default", "aten.lift_fresh.default"}
"""Operators that move nothing, besides views."""


@dataclass
class Cost:
    """Of one layer's forward and backward."""

    bytes: float = 0.0
    kernels: int = 0
    products: int = 0
    float32_products: int = 0
    product_seconds: float = 0.0
    other_seconds: float = 0.0
    kept: float = 0.0
    """Bytes that the backward finds, beyond weights."""

    @property
    def seconds(self) -> float:
        return self.product_seconds + self.other_seconds

    def count(self, moved: float, flops: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.bytes += moved
        self.kernels += 1
        seconds = max(moved / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND[dtype])
        if flops:
            self.products += 1
            self.float32_products += dtype == torch.float32
            self.product_seconds += seconds
        else:
            self.other_seconds += seconds


class Handle:
    """A pack's, for operators that do not run."""

    backend = "varlen"

    def __init__(self, device: str) -> None:
        self.tensor = torch.empty((), dtype=torch.int64, device=device)


def one_layer(shape: Path, device: str, lora: bool) -> Any:
    """The model with two layers, in training; weights without values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(shape))
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if lora:
            model = add_lora(model, LoraSection(), 0)
    if device != "meta":
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                trained = isinstance(value, nn.Parameter)
                setattr(module, name, nn.Parameter(made, value.requires_grad) if trained else made)
    use_tree_attention(model)
    return model.train()


def run(model: Any, tokens: int, device: str, between: Callable[[], None] = lambda: None) -> None:
    """Forward and backward of the second layer."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden = torch.empty(1, tokens, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    rotation = tuple(torch.empty(1, tokens, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = decoder(model).layers[1](hidden, attention_mask=None, position_embeddings=rotation, tree=Handle(device))
    out = out[0] if isinstance(out, tuple) else out
    between()
    out.backward(torch.empty_like(out))


# --- eager ------------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each operator as one kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if getattr(func, "is_view", False) or name in FREE or name.startswith("mtr."):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        if name.startswith(("aten.mm.", "aten.addmm.")):
            left, right = args[-2:]
            self.cost.count(moved, 2.0 * left.shape[0] * left.shape[1] * right.shape[1], left.dtype)
        else:
            self.cost.count(moved)
        return out


def eager(shape: Path, tokens: int, mode: Checkpointing, lora: bool) -> Cost:
    model = one_layer(shape, "meta", lora)
    checkpoint_activations(model, mode)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, float] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Operators() as operators:
        run(model, tokens, "meta")
    operators.cost.kept = math.nan if mode != "none" else sum(kept.values())
    cost: Cost = operators.cost
    return cost


# --- compiled ---------------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    backward: bool
    kernels: list[tuple[float, float, torch.dtype] | None]
    """Bytes, operations (0 but for products) and dtype of each kernel; None for attention."""
    outputs: list[Any]
    calls: int = 0


def hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def record_graphs() -> list[Graph]:
    """Let Inductor stop before it compiles kernels; a graph's call returns tensors without values."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode

    inductor.compile_threads, inductor.fx_graph_cache, functorch.enable_autograd_cache = 1, False, False
    inductor.joint_graph_constant_folding = False  # it would compute on the device
    graphs: list[Graph] = []

    def compile_to_module(self: Any) -> Any:
        self.codegen()
        nodes = [node for node in self.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        output = next(node for node in self.orig_gm.graph.nodes if node.op == "output")
        outputs = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in output.args[0]]
        graph = Graph(self.is_backward, [_work(node, self.sizevars) for node in nodes], outputs)
        graphs.append(graph)

        def call(arguments: Any) -> Any:
            graph.calls += 1
            return tuple(_like(value) for value in outputs)

        return types.SimpleNamespace(call=call, __file__="", runner=None, key="", __path__="", linemap=[])

    GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]
    return graphs


def _like(value: Any) -> Any:
    if isinstance(value, Tensor):
        shape, stride = map(hint, value.shape), map(hint, value.stride())
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=value.dtype, device=value.device)
    return hint(value) if isinstance(value, torch.SymInt) else value


def _work(node: Any, sizes: Any) -> tuple[float, float, torch.dtype] | None:
    """Of a kernel of Inductor's scheduler."""
    inner = node.node
    names = f"{getattr(inner, 'python_kernel_name', '')} {getattr(inner, 'op_overload', '')} {type(inner).__name__}"
    if "tree_attention" in names or "MultiOutput" in names:
        return None
    moved = float(node.get_read_write_buffers_sizes())
    if "mm" not in names or not node.is_extern():
        return moved, 0.0, torch.bfloat16
    left, right = (x.get_layout() for x in inner.inputs[-2:])
    rows, inside = (sizes.optimization_hint(x) for x in left.size)
    return moved, 2.0 * rows * inside * sizes.optimization_hint(right.size[1]), left.dtype


def compiled(shape: Path, tokens: int, mode: Checkpointing, lora: bool, graphs: list[Graph]) -> Cost:
    torch.compiler.reset()
    graphs.clear()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        model = one_layer(shape, "cuda:0", lora)
        compile_layers(model)
        checkpoint_activations(model, mode)
        run(model, tokens, "cuda:0")
    assert {graph.backward for graph in graphs} == {True, False}, "the layer was not compiled"
    cost = Cost()
    for graph in graphs:
        for work in graph.calls * [work for work in graph.kernels if work is not None]:
            cost.count(*work)
    forward = next(graph for graph in graphs if not graph.backward)
    if mode == "full":
        cost.kept = math.nan  # the layer's input
        return cost
    saved = [(x, [*map(hint, x.shape)]) for x in forward.outputs[1:] if isinstance(x, Tensor)]
    cost.kept = sum(math.prod(sizes) * x.element_size() for x, sizes in saved if tokens in sizes)  # without weights
    return cost


# --- report -----------------------------------------------------------------------------------------------------------


def row(cost: Cost) -> dict[str, Any]:
    return {
        "milliseconds": round(1e3 * cost.seconds, 1),
        "products_milliseconds": round(1e3 * cost.product_seconds, 1),
        "other_milliseconds": round(1e3 * cost.other_seconds, 1),
        "gigabytes": round(cost.bytes / 1e9, 1),
        "kernels": cost.kernels,
        "products": cost.products,
        "float32_products": cost.float32_products,
        "kept_megabytes": None if math.isnan(cost.kept) else round(cost.kept / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, default=HERE / "shapes" / "qwen3-8b")
    parser.add_argument("--tokens", type=int, default=16768)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--whole", action="store_true", help="train all weights, without LoRA")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for mode in arguments.modes:
        rows[f"eager, {mode}"] = row(eager(arguments.shape, arguments.tokens, mode, not arguments.whole))
    stub.pretend(90, generate=True)
    graphs = record_graphs()
    for mode in arguments.modes:
        rows[f"compiled, {mode}"] = row(compiled(arguments.shape, arguments.tokens, mode, not arguments.whole, graphs))
    for name, figures in rows.items():
        print(f"{name:22}", "  ".join(f"{key} {value}" for key, value in figures.items()))
    if arguments.json:
        import transformers
        import triton

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "triton": triton.__version__}
        about = {"shape": arguments.shape.name, "tokens": arguments.tokens, "lora": not arguments.whole}
        assumed = {"bytes_per_second": BYTES_PER_SECOND, "bfloat16_flops": 650e12, "float32_flops": 45e12}
        write_json(arguments.json, {**about, "assumed": assumed, "versions": versions, "layer": rows})


if __name__ == "__main__":
    main()
