"""A hybrid in one pass against one pass per turn, on one thread of a CPU: seconds, growth with tokens, and memory.

    OMP_NUM_THREADS=1 python benchmarks/hybrids.py --json benchmarks/results/hybrids-cpu.json

The model is Qwen3.5's text decoder, made small: width 256, 8 layers of which 6 are Gated DeltaNet, random weights in
float32. A conversation has a system prompt of 200 tokens and turns of 100 tokens of user, 100 of thinking and 60 of
answer, all supervised but system and user. Cases take turns within a round, and ratios are taken round by round:

    single_pass           the tree, as mtr trains it: states go from chunk to chunk
    by_level              the tree, with transformers' own scan, a call for each level of segments
    without_scan          the tree, with an elementwise stand-in for the scan: the bound of any scan
    per_turn              one row a turn, transformers' own code
    per_turn_padded       rows in batches, padded to the longest, transformers' own code
    per_turn_packed       turns as trees of a single path, several in a row, as `strategy: per_turn` trains them

Memory is the most bytes of tensors alive at a time beyond weights and gradients, by storages.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from mtr.attention.interface import use_own_attention
from mtr.attention.masks import TreeHandle
from mtr.attention.model_parts import decoder
from mtr.files import write_json
from mtr.model.device import keep_freed_memory
from mtr.model.estimate import Storages
from mtr.model.flops import FlopCounter
from mtr.model.loss import weighted_nll
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.levels import scan_levels
from mtr.recurrence.segments import level_plan
from mtr.training.environment import environment
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout, View, merge
from mtr.tree.packing import Pack, build_packs

SCAN = "torch_chunk_gated_delta_rule"
REFERENCE = getattr(modeling, SCAN)
"""Transformers' own, before the model follows a tree."""
SYSTEM, USER, THINKING, ANSWER = 200, 100, 100, 60
VOCABULARY = 4096


def hybrid(layers: int = 8, width: int = 256) -> Any:
    """Qwen3.5-9B has 16 heads of key and 32 of value, both of 128, at a width of 4,096: the same proportions.

    Args:
        layers: every fourth one, and the last, has attention.
    """
    kinds = [
        "full_attention" if number % 4 == 3 or number == layers - 1 else "linear_attention" for number in range(layers)
    ]
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=max(1, width // 128),
        linear_num_value_heads=width // 64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=kinds,
        max_position_embeddings=131072,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def conversation(turns: int, seed: int = 0) -> list[View]:
    """The turns' views: each has all earlier answers in its prompt, and none of the earlier thinking."""
    rng = np.random.default_rng(seed)
    history, views = rng.integers(0, VOCABULARY, SYSTEM), []
    for turn in range(turns):
        user, thinking, answer = (rng.integers(0, VOCABULARY, size) for size in (USER, THINKING, ANSWER))
        history = np.concatenate([history, user])
        views.append(View(history, np.concatenate([thinking, answer]), np.ones(THINKING + ANSWER), turn))
        history = np.concatenate([history, answer])
    return views


# --- scans over the tree ----------------------------------------------------------------------------------------------


def by_level(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, tree: TreeHandle, **options: Any
) -> tuple[Tensor, None]:
    normalize = options["use_qk_l2norm_in_kernel"]

    def scan(rows: list[Tensor], initial: Tensor | None) -> Any:
        given = dict(zip(("query", "key", "value", "g", "beta"), rows, strict=True))
        return REFERENCE(**given, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=normalize)

    return scan_levels(scan, (query, key, value, g, beta), tree.entered().make(level_plan)), None


def stand_in(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
    """Elementwise, of the same shapes; every input has a gradient."""
    pairs = (query + key).repeat_interleave(value.shape[2] // key.shape[2], 2)
    return value * (g.exp() * beta)[..., None] + pairs, None


@contextlib.contextmanager
def scan_of(function: Callable[..., Any] | None) -> Iterator[None]:
    """Another scan in the modelling module; None: the one that is there."""
    there = getattr(modeling, SCAN)
    setattr(modeling, SCAN, function or there)
    try:
        yield
    finally:
        setattr(modeling, SCAN, there)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    run: Callable[[], float]
    """Forward and backward of everything; returns sum(weight * nll)."""
    num_tokens: int
    """Positions that are computed, padding included."""


def over_trees(model: Any, batches: Sequence[Batch], scan: Callable[..., Any] | None = None) -> Case:
    tree_model = TreeModel(model, "segment")

    def run() -> float:
        use_tree(model)
        with scan_of(scan):
            return _summed(tree_model(batch) for batch in batches)

    return Case(run, sum(batch.input_ids.shape[1] for batch in batches))


def over_rows(model: Any, groups: Sequence[Sequence[View]]) -> Case:
    """Transformers' own code: each group of turns is one batch, padded to its longest."""
    head = TreeModel(model, "segment").head

    def loss(views: Sequence[View]) -> Tensor:
        longest = max(view.num_tokens for view in views)
        ids = torch.zeros(len(views), longest, dtype=torch.int64)
        for row, view in enumerate(views):
            ids[row, : view.num_tokens] = torch.from_numpy(view.ids)
        lengths = torch.tensor([view.num_tokens for view in views])
        mask = (torch.arange(longest) < lengths[:, None]).long() if len(views) > 1 else None
        hidden = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        at = [hidden[row, len(v.prompt_ids) - 1 : v.num_tokens - 1] for row, v in enumerate(views)]
        targets = torch.from_numpy(np.concatenate([view.completion_ids for view in views]))
        weights = torch.from_numpy(np.concatenate([view.weights for view in views]))
        return weighted_nll(torch.cat(at), head, head.trainable(), targets, weights, head.chunk)

    def run() -> float:
        use_own_attention(model)
        return _summed(loss(views) for views in groups)

    return Case(run, sum(len(views) * max(view.num_tokens for view in views) for views in groups))


def _summed(losses: Iterator[Tensor]) -> float:
    total = 0.0
    for loss in losses:
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def batched(views: Sequence[View], budget: int) -> list[list[View]]:
    """Turns in their order, as many in a batch as fit when padded to the longest, which is the last."""
    groups: list[list[View]] = []
    for view in views:
        if not groups or view.num_tokens * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(view)
    return groups


def cases_of(model: Any, views: list[View]) -> dict[str, Case]:
    """All ways to train a conversation; packs and padded batches have as many tokens as the tree."""
    tree = merge(views)
    apart = [merge([view]) for view in views]
    whole = [build_batch(Pack((tree,)))]
    packs = [build_batch(pack) for pack in build_packs(apart, tree.num_tokens)[0]]
    return {
        "single_pass": over_trees(model, whole),
        "by_level": over_trees(model, whole, by_level),
        "without_scan": over_trees(model, whole, stand_in),
        "per_turn": over_rows(model, [[view] for view in views]),
        "per_turn_padded": over_rows(model, batched(views, tree.num_tokens)),
        "per_turn_packed": over_trees(model, packs),
    }


# --- what is measured -------------------------------------------------------------------------------------------------


def seconds_of(model: Any, run: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and the loss."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    loss = run()
    return time.perf_counter() - began, loss


def compare(model: Any, turns: int, rounds: int, only: Sequence[str]) -> dict[str, Any]:
    """Every case on one conversation, in turn."""
    views = conversation(turns)
    cases = {name: case for name, case in cases_of(model, views).items() if name in only}
    for case in cases_of(model, conversation(2)).values():
        case.run()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    losses = {}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds, losses[name] = seconds_of(model, case.run)
            taken[name].append(seconds)
    counter = FlopCounter(model)
    one, apart = counter.by_part([merge(views)]), counter.by_part([merge([view]) for view in views])
    exact = [loss for name, loss in losses.items() if name != "without_scan"]
    result: dict[str, Any] = {
        "turns": turns,
        "cases": {
            name: {
                "num_tokens": case.num_tokens,
                "seconds": taken[name],
                "speedup_over_per_turn": _ratios(taken.get("per_turn", []), taken[name]),
            }
            for name, case in cases.items()
        },
        "speedup_over_padded": _ratios(taken.get("per_turn_padded", []), taken.get("single_pass", [])),
        "speedup_over_packed": _ratios(taken.get("per_turn_packed", []), taken.get("single_pass", [])),
        "limit": {"flops": apart.total / one.total, "single_pass": vars(one), "per_turn": vars(apart)},
        "max_relative_loss_difference": (max(exact) - min(exact)) / min(exact),
    }
    for name, case in result["cases"].items():
        ratio = case["speedup_over_per_turn"]
        faster = f"{ratio['median']:6.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        print(f"{turns:>3} turns  {name:<16}{case['num_tokens']:>8,} tokens {min(taken[name]):8.2f} s  {faster}")
    print(f"{turns:>3} turns  losses within {result['max_relative_loss_difference']:.1e}", flush=True)
    return result


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float] | None:
    """Of each round."""
    ratios = [one / other for one, other in zip(slow, fast, strict=False)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def growth(model: Any, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds by tokens: conversations of 8 turns in a pack, where all work grows with tokens, and one ever longer
    conversation, where attention grows faster. `scan` is all that the tree's scan adds to a step."""
    rows = []
    for kind in ("several conversations", "one conversation"):
        for tokens in sizes:
            batch = build_batch(Pack(tuple(_about(tokens, kind))))
            cases = {"model": over_trees(model, [batch]), "without_scan": over_trees(model, [batch], stand_in)}
            taken = {name: min(seconds_of(model, case.run)[0] for _ in range(rounds)) for name, case in cases.items()}
            length, scan = batch.num_tokens, taken["model"] - taken["without_scan"]
            row = {"kind": kind, "num_tokens": length, "seconds": taken["model"], "scan_seconds": scan}
            rows.append(
                row | {"pairs": int((batch.position_ids + 1).sum()), "chunks": len(chunk_plan(batch.tree).valid)}
            )
            print(
                f"{kind:<22}{length:>8,} tokens {taken['model']:7.2f} s, {1e6 * taken['model'] / length:6.0f} us a "
                f"token, of which scan {1e6 * scan / length:5.0f}",
                flush=True,
            )
    return rows


def _about(tokens: int, kind: str) -> list[Layout]:
    """Trees of about so many tokens in all."""
    if kind == "one conversation":
        return [merge(conversation(round((tokens - SYSTEM) / (USER + THINKING + 2 * ANSWER))))]
    eight = merge(conversation(8)).num_tokens
    return [merge(conversation(8, seed)) for seed in range(max(1, round(tokens / eight)))]


def memory(model: Any, turns: int) -> dict[str, Any]:
    """Most bytes of the pack or row that takes most of them, and of each of its tokens."""
    views = conversation(turns)
    tree = merge(views)
    whole = [build_batch(Pack((tree,)))]
    packs = build_packs([merge([view]) for view in views], tree.num_tokens)[0]
    cases = {
        "single_pass": over_trees(model, whole),
        "without_scan": over_trees(model, whole, stand_in),
        "per_turn": over_rows(model, [[views[-1]]]),
        "per_turn_padded": over_rows(model, batched(views, tree.num_tokens)[-1:]),
        "per_turn_packed": over_trees(model, [build_batch(max(packs, key=lambda pack: pack.num_tokens))]),
    }
    found = {}
    for name, case in cases.items():
        model.zero_grad(set_to_none=True)
        case.run()  # gradients are there from now on
        with Storages() as storages:
            storages.ignore(x for p in model.parameters() for x in (p, p.grad))
            case.run()
        found[name] = {
            "num_tokens": case.num_tokens,
            "bytes": storages.peak,
            "bytes_per_token": storages.peak / case.num_tokens,
        }
        print(
            f"{turns:>3} turns  {name:<16}{case.num_tokens:>8,} tokens {storages.peak / 2**20:8.0f} MiB, "
            f"{storages.peak / case.num_tokens / 2**10:6.1f} KiB a token",
            flush=True,
        )
    return {"turns": turns, "cases": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--memory", type=int, nargs="*", default=[8, 32], metavar="TURNS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="compare these cases alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    model = hybrid()
    use_tree(model)
    only = arguments.only or list(cases_of(model, conversation(1)))
    result = {
        "conversation": {"system": SYSTEM, "user": USER, "thinking": THINKING, "answer": ANSWER},
        "model": model.config.to_diff_dict(),
        "rounds": arguments.rounds,
        "compared": [compare(model, turns, arguments.rounds, only) for turns in arguments.turns],
        "growth": growth(model, arguments.tokens, arguments.rounds),
        "memory": [memory(model, turns) for turns in arguments.memory],
        "environment": environment(0, torch.device("cpu"), 1, time.strftime("%Y-%m-%d")),
    }
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
