"""Is a model exact over a tree? Tested by behaviour, because a config does not tell.

A small random model of the same architecture (`mtr.model.shrink`) runs a pack of two trees in float64, and each path
by itself with the model's own attention. Paths are longer than the chunks of recurrent layers and fork within chunks
and within branches. Where something leaks across branches, logits differ by 1e-3 to 1; where nothing does, by 1e-12.

What one pass cannot do is tried again as separate paths that share a row, and is left to rows of one turn if that
differs, too.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtr.attention.interface import use_own_attention
from mtr.attention.layers import refusal
from mtr.attention.model_parts import decoder, idle_parts, output_embeddings, text_config
from mtr.errors import UserError, one_line
from mtr.model.auto_class import auto_class
from mtr.model.float64 import keep_float64
from mtr.model.shrink import shrink
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recurrence.chunks import CHUNK
from mtr.tree.batch import build_batch
from mtr.tree.layout import Ints, Layout, View, merge, path_to
from mtr.tree.packing import Pack

TOLERANCE = 1e-6
"""Relative to the largest logit of a path; right models stay below 1e-9, wrong ones above 1e-4."""
_MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class Verdict:
    """Whether a model is exact, by how its turns are laid out."""

    tree: str | None
    """Why one pass over a tree is not exact; None where it is."""
    packed: str | None
    """Why several turns cannot share a row; None where they can."""
    alone: str | None = None
    """Why not even a turn that has a row of its own can be trained: the model is not causal."""


def judge(config: Any, max_length: int, trust_remote_code: bool = False) -> Verdict:
    """By what the config says, and by a small model of its architecture.

    Args:
        max_length: tokens of the longest turn.
    """
    key = json.dumps(config.to_dict(), default=str, sort_keys=True)
    if reason := refusal(text_config(config), max_length):
        return Verdict(reason, reason, _not_causal(key, _Held(config), trust_remote_code))
    return _judge(key, _Held(config), trust_remote_code)


class _Held:
    """A config that is not part of the cache key; the JSON next to it is."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=8)
def _judge(key: str, held: _Held, trust_remote_code: bool) -> Verdict:
    config = held.config
    tried, tree = _tried(config, lambda small: probe(small, trust_remote_code), "over a tree than turn by turn")
    if tree is None:
        return Verdict(None, None)
    packed: str | None = tree
    if tried:
        forest = functools.partial(probe, trust_remote_code=trust_remote_code, in_tree=False)
        _, packed = _tried(config, forest, "where turns share a row than by themselves")
    return Verdict(tree, packed, _not_causal(key, held, trust_remote_code))


@functools.lru_cache(maxsize=8)
def _not_causal(key: str, held: _Held, trust_remote_code: bool) -> str | None:
    """For what shares no row: there a leak from later tokens is the model's own."""
    tried, found = _tried(held.config, lambda small: foresight(small, trust_remote_code), "if later tokens change")
    return found if tried else None


def _tried(config: Any, difference: Callable[[Any], float], than: str) -> tuple[bool, str | None]:
    """Whether a small model ran, and why something is not exact."""
    problems: list[Exception] = []
    for small in small_configs(config):
        try:
            found = difference(small())
            break
        except UserError as error:
            return False, str(error)
        except Exception as error:  # whatever an unknown architecture raises, it has not been shown to be exact
            kinds = getattr(text_config(config), "layer_types", None) or ()
            if isinstance(error, KeyError) and error.args[0] in kinds:
                raise UserError(f"{config.model_type} has no layers of type {error.args[0]} (layer_types)") from None
            problems.append(error)
    else:
        problem = f"{type(problems[0]).__name__}: {one_line(problems[0])}"
        return False, f"a small {config.model_type} model cannot be tried ({problem})"
    if found <= TOLERANCE:
        return True, None
    return True, f"a small {config.model_type} model computes other logits {than}, by {found:.0e} of the largest"


def small_configs(config: Any) -> Iterator[Callable[[], Any]]:
    """Ways to a small config, the best first."""
    yield lambda: shrink(config)
    yield lambda: shrink(config, heads=False)  # some code has the sizes of heads written into it
    if text_config(config) is not config:
        yield lambda: shrink(text_config(config))  # text may go through a tower before it is seen to be no image


def probe(config: Any, trust_remote_code: bool = False, in_tree: bool = True) -> float:
    """The largest relative difference of logits between paths that share a row and the same paths by themselves.

    Args:
        config: a small one.
        in_tree: paths share their beginnings; else each begins at a root of its own.
    """
    paths = _paths(text_config(config).vocab_size)
    trees = [paths[:-1], paths[-1:]] if in_tree else [[path] for path in paths]
    layouts = [_layout(tree) for tree in trees]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), keep_float64():
        torch.manual_seed(0)
        model = small_model(config, trust_remote_code)
        use_tree(model)
        tree_model = TreeModel(model, "segment")
        logits = tree_model.head(tree_model.hidden(build_batch(Pack(tuple(layouts)), pad_to_multiple_of=16)))
        use_own_attention(model)
        differences, start = [], 0
        for tree, layout in zip(trees, layouts, strict=True):
            for path, (leaf, _) in zip(tree, layout.leaves, strict=True):
                alone = model(input_ids=torch.from_numpy(path)[None], use_cache=False).logits[0]
                ours = logits[start + torch.from_numpy(path_to(layout, leaf))]
                differences.append(float((ours - alone).abs().max() / alone.abs().max()))
            start += layout.num_tokens
    return float(np.max(differences))  # NaN if one is


def foresight(config: Any, trust_remote_code: bool = False) -> float:
    """By how much logits differ where only tokens after them do, relative to the largest, in the model's own forward.

    Args:
        config: a small one.
    """
    history = 2 * CHUNK
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, text_config(config).vocab_size, (2, 3 * CHUNK)))
    rows[1, :history] = rows[0, :history]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), keep_float64():
        torch.manual_seed(0)
        model = small_model(config, trust_remote_code)
        use_own_attention(model)
        one, other = (model(input_ids=row[None], use_cache=False).logits[0, :history] for row in rows)
    found = float((one - other).abs().max() / one.abs().max())
    return 0.0 if math.isnan(found) else found  # logits that are not finite show nothing


def _paths(vocabulary: int) -> list[Ints]:
    """Forks within chunks and at their ends, off a branch, with a branch of one token; the last is a tree by itself."""
    rng = np.random.default_rng(0)
    chunk = CHUNK
    trunk, branch, twig, early, lone = (
        rng.integers(0, vocabulary, n) for n in (2 * chunk + 17, chunk + 6, 20, 30, chunk + 6)
    )
    first = np.concatenate([trunk[: chunk + 16], branch])
    return [
        trunk,
        first,
        np.concatenate([first[: 2 * chunk - 18], twig]),
        np.concatenate([trunk[:33], early]),
        np.concatenate([trunk[:chunk], early[:1]]),
        lone,
    ]


def _layout(paths: Sequence[Ints]) -> Layout:
    return merge([View(path[:1], path[1:], np.ones(len(path) - 1)) for path in paths])


@torch.no_grad()
def small_model(config: Any, trust_remote_code: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """A random model on the CPU, with weights large enough and states long enough for a leak to show.

    Raises:
        ValueError: the config is not of a small model, or not of one that can run.
    """
    auto = auto_class(config)
    with torch.device("meta"):
        model = auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    if (size := sum(parameter.numel() for parameter in decoder(model).parameters())) > _MOST_PARAMETERS:
        raise ValueError(f"its config cannot be made small: {size:,} parameters are left")
    if any(getattr(module, "num_key_value_groups", 1) < 1 for module in decoder(model).modules()):
        raise ValueError("its config cannot be made small: more heads have keys than queries")
    if text_config(config) is not config and idle_parts(model):
        _make_text(model, dtype)
    else:
        model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if "A_log" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.5 - 1.0)
        elif re.search(r"dt_(proj[._])?bias", name):  # a state halves within 2 tokens, or only within 100
            parameter.copy_(torch.linspace(-4.0, 0.0, parameter.numel()).view_as(parameter))
        elif parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    return model.eval()


def _make_text(model: Any, dtype: torch.dtype) -> None:
    """Of a model on the meta device, what text goes through gets memory; towers for images and sound stay there."""
    text = decoder(model)
    name = next(name for name, module in model.named_modules() if module is text)
    made = type(text)(text.config).to(dtype)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
    output_embeddings(model).to_empty(device="cpu").to(dtype)
