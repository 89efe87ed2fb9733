"""How fast one worker prepares steps: parsing, rendering and encoding, merging, packing, in seconds of one CPU core.

    python benchmarks/host_speed.py --json benchmarks/results/host-speed.json
    python benchmarks/host_speed.py --tokenizer path/to/tokenizer

Conversations of 5, 50 and 200 turns, each turn with thinking that the template drops from the history; every text is
new, so nothing is remembered from one conversation to the next but what real data repeats too. The claim: the time per
tree token of a long conversation stays within 3x that of a short one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtr.batch import build_batch
from mtr.metrics import environment, write_json
from mtr.model import load_renderer, load_tokenizer
from mtr.packing import build_packs, merge_conversations
from mtr.recipe import Recipe
from mtr.shapes import Reader
from mtr.steps import Builder, weigh

ROOT = Path(__file__).parent.parent
LONGEST = 1 << 20


@dataclass
class Figure:
    """One length of conversation; CPU seconds, medians over the conversations."""

    turns: int
    conversations: int
    tree_tokens: int
    """Of one conversation, on average, as are the next."""
    per_turn_tokens: int
    seconds: float
    parse_seconds: float
    render_seconds: float
    merge_seconds: float
    pack_seconds: float
    microseconds_per_tree_token: float
    tree_tokens_per_second: float


def make_line(rng: random.Random, turns: int, words: tuple[int, int, int]) -> str:
    """A row as it stands in a file: made-up words, so that no two texts are the same."""
    syllables = ["ka", "to", "mi", "ren", "sol", "ba", "ve", "lu", "dor", "in", "es", "pa", "the", "ing", "qu"]

    def text(count: int) -> str:
        return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))

    messages: list[dict[str, str]] = []
    for _ in range(turns):
        messages.append({"role": "user", "content": text(words[0])})
        messages.append({"role": "assistant", "reasoning_content": text(words[1]), "content": text(words[2])})
    return json.dumps({"messages": messages})


def measure(builder: Builder, lines: list[str], turns: int) -> Figure:
    taken: list[tuple[float, ...]] = []
    tree_tokens = per_turn_tokens = 0
    for line in lines:
        marks = [time.process_time()]
        conversation = Reader().read(json.loads(line), "row")
        marks.append(time.process_time())
        rendered = builder.turns(conversation)
        marks.append(time.process_time())
        views = weigh(rendered, "token")
        layouts = merge_conversations([views], "single_pass", "conversation", LONGEST)
        marks.append(time.process_time())
        for pack in build_packs(layouts, LONGEST)[0]:
            build_batch(pack)
        marks.append(time.process_time())
        assert len(views) == turns, "every turn is trained"
        tree_tokens += sum(layout.num_tokens for layout in layouts)
        per_turn_tokens += sum(view.num_tokens for view in views)
        taken.append(tuple(b - a for a, b in itertools.pairwise(marks)))
    parse, render, merge, pack = (statistics.median(column) for column in zip(*taken, strict=True))
    seconds, size = statistics.median(map(sum, taken)), tree_tokens / len(lines)
    return Figure(
        turns, len(lines), round(size), round(per_turn_tokens / len(lines)), seconds, parse, render, merge, pack,
        seconds / size * 1e6, size / seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes" / "quickstart" / "base")
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 50, 200])
    parser.add_argument("--words", type=int, nargs=3, default=[60, 150, 60], metavar=("USER", "THINKING", "RESPONSE"))
    parser.add_argument("--total-turns", type=int, default=1000, help="turns measured for each length")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(arguments.tokenizer)},
            "data": {"train": "made up"},
            "sequence": {"max_length": LONGEST, "max_tokens": LONGEST},
            "training": {"output_dir": "none"},
            "date": "2026-01-31",
        }
    )
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    rng = random.Random(0)
    words = tuple(arguments.words)
    measure(builder, [make_line(rng, 5, words) for _ in range(10)], 5)  # first calls, the encoder's checks
    figures = []
    for turns in arguments.turns:
        count = max(5, arguments.total_turns // turns)
        figures.append(measure(builder, [make_line(rng, turns, words) for _ in range(count)], turns))
        f = figures[-1]
        print(
            f"{f.turns:>4} turns  {f.tree_tokens:>8,} tree tokens ({f.per_turn_tokens:,} per turn)  "
            f"{f.microseconds_per_tree_token:6.2f} us/token  {f.tree_tokens_per_second:>9,.0f} tree tokens/s   "
            f"parse {f.parse_seconds / f.seconds:.0%} render {f.render_seconds / f.seconds:.0%} "
            f"merge {f.merge_seconds / f.seconds:.0%} pack {f.pack_seconds / f.seconds:.0%}"
        )
    first = figures[0].microseconds_per_tree_token
    result: dict[str, Any] = {
        "tokenizer": arguments.tokenizer.name,
        "words": dict(zip(("user", "thinking", "response"), arguments.words, strict=True)),
        "workers": 1,
        "figures": [asdict(figure) for figure in figures],
        "time_per_tree_token_against_the_first": [f.microseconds_per_tree_token / first for f in figures],
        "environment": environment(0, torch.device("cpu"), 1, "2026-01-31"),
    }
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
