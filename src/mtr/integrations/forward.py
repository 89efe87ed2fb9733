"""A transformers model whose forward takes trees and returns their loss, by whichever trainer it is called.

    model(input_ids, attention_mask=Trees)  ->  TreeOutput(loss = sum(weight * nll) / num_items_in_batch)
    model(input_ids, ...)                   ->  as it was: generation and evaluation, with the model's own attention

The loss is computed inside forward, at predictors only, so no logits are returned. It is put on the instance, inside
what PEFT, DDP or FSDP wrap around it, and taken away again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of
from mtr.attention.interface import IMPLEMENTATION, with_own_attention
from mtr.attention.model_parts import base_model, decoder, output_embeddings, text_config
from mtr.errors import UserError
from mtr.integrations.batch import Trees
from mtr.integrations.columns import COLUMNS
from mtr.model.config import check_config, positions, vocabulary_size
from mtr.model.loading import switch_noise_off
from mtr.model.probe import judge
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recipe.sections import BACKENDS, Backend

SEVERAL_GPUS = "one process with several GPUs would cut a batch of trees: start with torchrun or accelerate launch"
_STATE = "mtr_trees"
"""Attribute of a model that has the forward below."""
_PREPARED = ("_original_forward", "_is_accelerate_prepared")
"""By which accelerate knows that it has put autocast around the forward of a model."""
_OWN = ("forward", "generate", *_PREPARED)
"""Attributes that an instance has for as long as it has tree attention."""


@dataclass
class TreeOutput(ModelOutput):  # type: ignore[misc]  # transformers has no types
    """What a model returns for trees."""

    loss: Tensor | None = None
    """sum(weight * nll) / num_items_in_batch; without that, the weighted mean of the batch."""

    @property
    def logits(self) -> Any:
        """
        Raises:
            UserError: always.
        """
        raise UserError(
            "a model over trees computes its loss at the tokens that are trained, and returns no logits: leave out "
            "label_smoothing_factor, compute_loss_func and compute_metrics"
        )

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)


@dataclass
class _State:
    """Of a model with tree attention."""

    attention: Literal["auto", Backend]
    max_length: int
    was: dict[str, Any]
    """Its own attributes before."""
    hook: Any = None
    backends: dict[tuple[str, torch.dtype], list[Backend]] = field(default_factory=dict)
    """By type of device and dtype; one of several is left once it was found to be the fastest."""
    calls: Counter[str] = field(default_factory=Counter)
    """Under way, over "trees" and "without" them: a model has one attention at a time."""


@contextmanager
def tree_attention(
    model: Any, *, attention: Literal["auto", Backend] = "auto", max_length: int | None = None
) -> Iterator[Any]:
    """Within it, a model takes batches of `TreeCollator` and returns their loss; then it is as it was.

    `backward` belongs within it, too. Not for several threads at once.

    Args:
        model: a causal LM of transformers, with or without PEFT around it. One that has tree attention keeps it.
        attention: the backend.
        max_length: tokens of the longest turn; the positions that the model was made for if not given.

    Raises:
        UserError: this is no causal LM; one pass over a tree would not be exact for it, with the reason; or it has
            dropout.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel) or output_embeddings(base) is None:
        raise UserError(
            f"mtr.tree_attention: {type(base).__name__} is no causal LM of transformers; give it the model itself, "
            "before DDP, DataParallel or torch.compile is put around it"
        )
    if has_trees(model):
        yield model
        return
    give_trees(model, attention, max_length)
    try:
        yield model
    finally:
        take_trees(model)


def has_trees(model: Any) -> bool:
    return _STATE in vars(base_model(model))


def give_trees(model: Any, attention: Literal["auto", Backend] = "auto", max_length: int | None = None) -> None:
    """
    Raises:
        UserError: as `tree_attention`.
    """
    if attention not in ("auto", *BACKENDS):
        raise UserError(f"attention={attention!r}: the backends are auto, {', '.join(BACKENDS)}")
    base = base_model(model)
    longest = check_exact(base.config, max_length, type(base).__module__.startswith("transformers_modules"))
    was = _attributes(base)
    try:
        use_tree(base)
    except BaseException:
        _restore(base, was)
        raise
    state = _State(attention, longest, was)
    state.hook = decoder(base).register_forward_pre_hook(_check_call, with_kwargs=True)
    setattr(base, _STATE, state)
    for name in _PREPARED:
        vars(base).pop(name, None)
    base.forward = MethodType(_with_trees(type(base), _ordinary(base, "forward", was)), base)
    if hasattr(base, "generate"):
        base.generate = MethodType(_generation(_ordinary(base, "generate", was)), base)


def take_trees(model: Any) -> None:
    """Undo `give_trees`. What others put around the forward since is taken away with it."""
    base = base_model(model)
    state = vars(base).pop(_STATE)
    state.hook.remove()
    _restore(base, state.was)


def check_exact(config: Any, max_length: int | None, remote: bool = False) -> int:
    """
    Args:
        max_length: tokens of the longest turn; the positions that the model was made for if not given.

    Returns:
        Tokens up to which a turn is exact.

    Raises:
        UserError: one pass over a tree is not exact for a model of this config, or it has dropout.
    """
    name = config.name_or_path or config.model_type
    longest = max_length or positions(text_config(config)) or 2**20
    try:
        check_config(text_config(config))
        verdict = judge(config, longest, remote)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if verdict.tree is not None:
        reason = verdict.tree.replace("sequence.max_length", "max_length")
        raise UserError(f"{name} cannot be computed exactly over a tree: {reason}")
    if noisy := switch_noise_off(copy.deepcopy(config)):
        raise UserError(
            f"{name}: its {noisy[0]} is above 0, and turns share what it would make random: load it with mtr.load, or "
            f"set {noisy[0]} to 0.0 in its config before it is made"
        )
    return longest


def _attributes(base: Any) -> dict[str, Any]:
    """What `use_tree` and the forward change of a model."""
    names = ("attn_temperature_tuning", "mtr_span", "mtr_window")
    modules = [(module, {k: v for k, v in vars(module).items() if k in names}) for module in base.modules()]
    return {
        "attention": decoder(base).config._attn_implementation,
        "own": {name: vars(base)[name] for name in _OWN if name in vars(base)},
        "modules": modules,
    }


def _restore(base: Any, was: dict[str, Any]) -> None:
    decoder(base).set_attn_implementation(was["attention"])
    for module, attributes in was["modules"]:
        for name in ("mtr_span", "mtr_window"):
            vars(module).pop(name, None)
        vars(module).update(attributes)
    for name in _OWN:
        vars(base).pop(name, None)
    vars(base).update(was["own"])


def _ordinary(base: Any, name: str, was: dict[str, Any]) -> Callable[..., Any]:
    """A method as it was before, to be called with the model, which may be a copy of this one."""
    own = was["own"].get(name)
    method: Callable[..., Any] = getattr(type(base), name) if own is None else lambda self, *a, **k: own(*a, **k)
    return method


def _with_trees(kind: type, ordinary: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model. Trainers read in its signature which columns of the data it takes.

    Args:
        ordinary: without trees.
    """

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        trees = options.get("attention_mask")
        if isinstance(trees, Trees):
            return _loss_of(self, trees, options.get("num_items_in_batch"))
        if self.training and torch.is_grad_enabled():
            raise UserError(
                "this model has mtr's tree attention, and is trained on a batch without trees: map the data with "
                "mtr.TreeBuilder and collate it with mtr.TreeCollator"
            )
        with _own_attention(self):
            return ordinary(self, *arguments, **options)

    functools.update_wrapper(forward, kind.forward, updated=())  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]  # accelerate would unwrap it, too
    forward.__signature__ = _signature(kind.forward)  # type: ignore[attr-defined]
    return forward


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    own = inspect.signature(function).parameters
    new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in COLUMNS if n not in own]
    rest = [p for p in own.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    first = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*first, *new, *(rest or [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])])


def _generation(ordinary: Callable[..., Any]) -> Callable[..., Any]:
    """Masks and caches are made for the attention that the model has when it begins to generate."""

    @functools.wraps(ordinary)
    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        with _own_attention(self):
            return ordinary(self, *arguments, **options)

    return generate


@contextmanager
def _own_attention(base: Any) -> Iterator[None]:
    """Within it, the attention that the model had before."""
    state: _State = getattr(base, _STATE)
    with _under_way(state, "without", "trees"):
        if state.calls["without"] > 1:
            yield
            return
        with with_own_attention(base):
            decoder(base).set_attn_implementation(state.was["attention"])
            yield


@contextmanager
def _under_way(state: _State, kind: str, other: str) -> Iterator[None]:
    """Counts a call for as long as it takes.

    Raises:
        UserError: a call that needs another attention has begun and not ended.
    """
    state.calls[kind] += 1
    try:
        if state.calls[other]:
            raise UserError(
                "a model was called over trees and without them at the same time, and has one attention at a time: "
                "call it from one thread, or copy it (copy.deepcopy)"
            )
        yield
    finally:
        state.calls[kind] -= 1


@torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo cannot trace a call that is handed trees
def _loss_of(base: Any, trees: Trees, num_items: Any) -> TreeOutput:
    """
    Args:
        num_items: the sum of weights to divide by, of all batches and processes of an update. A trainer's count of
            labels is a tensor; a float may be any sum.
    """
    state: _State = getattr(base, _STATE)
    _check(base, state, trees, num_items)
    batch = trees.batch.to(next(base.get_input_embeddings().parameters()).device)
    key = (batch.input_ids.device.type, base.dtype)
    config = text_config(base.config)
    backends = state.backends.get(key) or choose_backends(state.attention, config, batch.input_ids.device, base.dtype)
    multiple = pad_to_multiple_of(backends)
    if batch.input_ids.shape[1] % multiple:
        raise UserError(f"attention on {key[0]} needs mtr.TreeCollator(pad_to_multiple_of={multiple})")
    model = TreeModel(base, *backends, choose=fastest)
    with _under_way(state, "trees", "without"):
        loss = model(batch)
    state.backends[key] = list(model.backends)
    if trees.weight_sum:  # else the loss is 0, and so may be what it would be divided by
        loss = loss / (trees.weight_sum if num_items is None else num_items)
    if loss.requires_grad and base.is_gradient_checkpointing:
        loss.register_hook(functools.partial(_check_backward, base))
    return TreeOutput(loss=loss)


def _check_backward(base: Any, gradient: Tensor) -> None:
    """Before layers are computed again for their gradients.

    Raises:
        UserError: they would be, with another attention.
    """
    if decoder(base).config._attn_implementation != IMPLEMENTATION:
        raise UserError(
            "gradient checkpointing computes layers again in backward, and the model has no tree attention now: call "
            "backward within `with mtr.tree_attention(model):`, and not while the model generates"
        )


def _check(base: Any, state: _State, trees: Trees, num_items: Any) -> None:
    """
    Raises:
        UserError: the loss would not be that of the turns.
    """
    if trees.longest > state.max_length:
        raise UserError(
            f"a turn of {trees.longest:,} tokens, and the model was found to be exact for {state.max_length:,}: give "
            "max_length to mtr.load or mtr.tree_attention, or a lower one to mtr.TreeBuilder"
        )
    if trees.largest_id >= (vocabulary_size(base.config) or 2**63):
        raise UserError(
            f"token id {trees.largest_id}, and the model has embeddings for {vocabulary_size(base.config)} ids: the "
            "tokenizer of mtr.TreeBuilder is another model's"
        )
    if base.training and getattr(base.get_input_embeddings(), "neftune_noise_alpha", None):
        raise UserError("neftune_noise_alpha: turns share the embeddings that it would make noisy; set it to None")
    if isinstance(num_items, Tensor) and num_items.dim():
        raise UserError(SEVERAL_GPUS)
    counted = num_items is not None and not isinstance(num_items, float)
    nothing_to_divide_by = not num_items if counted else num_items is None
    if not trees.weight_sum and nothing_to_divide_by and not base.training:
        raise UserError(
            "a batch without a trained turn has no mean, and would count as 0 in that of an evaluation: leave out such "
            "rows, as in `trees.filter(lambda row: len(row['weight']) > 0)`"
        )
    if counted and trees.whole is None:
        raise UserError(
            f"the weights of this batch add up to {trees.weight_sum:g}, and the trainer counts whole labels only: put "
            "mtr.TreeTrainerMixin before its class"
        )


def _check_call(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before the decoder runs.

    Raises:
        UserError: it was called past the model's forward.
    """
    if options.get("tree") is None and isinstance(options.get("attention_mask"), Trees):
        raise UserError(
            "the trainer calls the decoder of the model by itself, so no loss of trees is computed: put "
            "mtr.TreeTrainerMixin before its class, as in `class Trainer(mtr.TreeTrainerMixin, trl.SFTTrainer)`, and "
            "leave out what puts another forward in place of mtr's, as use_liger_kernel does"
        )
