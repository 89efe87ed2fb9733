"""Decoder layers under torch.compile: norms, rotations, activations, residuals and LoRA's sums become few kernels.

    layer(hidden)  ->  hooks (FSDP), checkpointing (full, offload)  ->  layer.forward, compiled
                                                                            selective checkpointing is inside

Layers of a kind share one graph, made for any number of tokens at once: attention is one operator in it
(`mtr.attention.op`), and of a pack it sees one tensor. A recurrent layer is compiled in pieces, around what follows the
tree (`mtr.recurrence`), and runs as it is under selective checkpointing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtr.attention.model_parts import decoder
from mtr.console import labelled
from mtr.errors import UserError, one_line
from mtr.recurrence.seams import follows_tree

log = logging.getLogger("mtr")

_MOST_GRAPHS = 64
"""Of a model's layers: kinds of layers, each with and without gradients. torch gives up at 8 by default."""

Contexts = Callable[[], Any]
"""`context_fn` of torch's checkpoint: what is kept and what is recomputed."""


class CompiledForward:
    """The forward of one layer, compiled at its first call."""

    def __init__(self, layer: nn.Module, compiler: Compiler) -> None:
        self._layer = layer
        self._forward, self._checkpoints = _own_forward(type(layer))
        self._compiler = compiler
        self.keep: Contexts | None = None
        """Checkpoint selectively, by this."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        layer: Any = self._layer
        if self._checkpoints and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            return layer._gradient_checkpointing_func(partial(self._run, **options), *arguments)
        return self._run(*arguments, **options)

    def _run(self, *arguments: Any, **options: Any) -> Any:
        keep = self.keep if torch.is_grad_enabled() else None
        in_pieces = any(map(follows_tree, self._layer.modules()))
        if self._compiler.works and not (keep and in_pieces):
            run = self._compiler.run_in_pieces if in_pieces else self._compiler.run
            try:
                return run(self._forward, keep, self._layer, *arguments, **options)
            except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
                self._compiler.give_up(type(self._layer).__name__, error)
        return _run(self._forward, keep, self._layer, *arguments, **options)


def _own_forward(layer: type[nn.Module]) -> tuple[Callable[..., Any], bool]:
    """A class's forward without the checkpointing that transformers may have put around it, and whether it has.

    Releases before 5.24 put it around the call of the module, which is outside of what is compiled anyway.
    """
    forward, found = layer.forward, False
    while forward.__code__.co_name == "forward_with_checkpointing":
        forward, found = forward.__wrapped__, True  # type: ignore[attr-defined]
    return forward, found


class Compiler:
    """What compiles the layers of a model."""

    def __init__(self, may_fall_back: bool, backend: Any) -> None:
        self.works = True
        self.run: Callable[..., Any] = torch.compile(_run, dynamic=True, fullgraph=True, backend=backend)
        self.run_in_pieces: Callable[..., Any] = torch.compile(_run, dynamic=True, backend=backend)
        self._may_fall_back = may_fall_back

    def give_up(self, layer: str, error: Exception) -> None:
        reason = one_line(error, 300)
        if not self._may_fall_back:
            raise UserError(
                f"training.torch_compile: {layer} cannot be compiled: {reason}; set it to false or auto"
            ) from error
        self.works = False
        log.warning(labelled("note", f"layers run uncompiled: {layer} cannot be compiled: {reason}"))


def _run(forward: Callable[..., Any], keep: Contexts | None, *arguments: Any, **options: Any) -> Any:
    if keep is None:
        return forward(*arguments, **options)

    def run(*arguments: Any) -> Any:
        return forward(*arguments, **options)

    return checkpoint(run, *arguments, use_reentrant=False, context_fn=keep)


def wants_compiling(asked: bool | str, device: torch.device, use_liger_kernel: bool) -> bool:
    """What `training.torch_compile` means here: `auto` compiles on CUDA, unless Liger's kernels fuse already."""
    return asked is True or (asked == "auto" and device.type == "cuda" and not use_liger_kernel)


def compile_layers(model: Any, may_fall_back: bool = False, backend: Any = "inductor") -> int:
    """Compile the forward of each decoder layer, at its first call; returns how many there are.

    Args:
        may_fall_back: run layers as they are, with a note, where they cannot be compiled.
        backend: of torch.compile.

    Raises:
        UserError: the model's layers are not found. At the first call: they cannot be compiled.
    """
    layers = next((found for m in decoder(model).children() if isinstance(found := m, nn.ModuleList) and len(m)), None)
    if layers is None:
        if may_fall_back:
            return 0
        raise UserError("training.torch_compile: no list of decoder layers in this model; set it to false")
    _set_options()
    compiler = Compiler(may_fall_back, backend)
    for layer in layers:
        layer.forward = CompiledForward(layer, compiler)
    return len(layers)


def _set_options() -> None:
    """Options of torch, each where this release has it."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_GRAPHS)
    dynamo.optimize_ddp = False  # it would split graphs that are a layer each
    # it warns of operators in place, which graphs do not have
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if hasattr(dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True  # adapters share what they read of an input
    # a backward that cannot be compiled is noticed with its forward, not in the middle of a step
    functorch.force_non_lazy_backward_lowering = True
    if hasattr(functorch, "check_custom_op_aliasing"):
        functorch.check_custom_op_aliasing = False  # it runs operators where no mask can be built


def checkpoint_inside(model: nn.Module, keep: Contexts | None) -> bool:
    """Let compiled layers keep and recompute by `keep` themselves: torch.compile has to see it, to recompute at all.

    Returns:
        Whether there are compiled layers.
    """
    compiled = [module.forward for module in model.modules() if isinstance(module.forward, CompiledForward)]
    for forward in compiled:
        forward.keep = keep
    return bool(compiled)


def uncompiled() -> AbstractContextManager[Any]:
    """For generation, whose cache has another length at every token."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
