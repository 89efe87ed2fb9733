"""How fast one data worker prepares steps: parsing, rendering and encoding, merging, packing, in CPU seconds of one
core.

    python benchmarks/host_speed.py --json benchmarks/results/host-speed.json
    python benchmarks/host_speed.py --tokenizer path/to/tokenizer --shapes chat loop loops

Conversations of 5, 50 and 200 turns, each turn with thinking that the template drops from the history:

    chat    each turn is a question and an answer
    loop    one question, one tool call after the other, an answer
    loops   the same, with a new question every ten turns

All texts are different, so caches only help with what real data repeats as well. The claim: with
`data.rendering: auto`, the time per tree token at 50 turns stays within 3x that at 5 turns, for every shape. For
comparison, it also measures the first long conversations, all turns of which are rendered in full as well, and
`data.rendering: whole`.
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

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.shapes import Reader
from mtr.files import write_json
from mtr.prepare.builder import Builder
from mtr.prepare.views import weigh
from mtr.recipe.sections import Recipe
from mtr.training.environment import environment
from mtr.tree.batch import build_batch
from mtr.tree.packing import build_packs, merge_conversations

ROOT = Path(__file__).parent.parent
LONGEST = 1 << 20


@dataclass
class Figure:
    """Measurements for one length of conversation; times are CPU seconds, medians over the conversations."""

    shape: str
    rendering: str
    turns: int
    conversations: int
    tree_tokens: int
    """Mean of one conversation, as is the next field."""
    per_turn_tokens: int
    seconds: float
    parse_seconds: float
    render_seconds: float
    merge_seconds: float
    pack_seconds: float
    microseconds_per_tree_token: float
    tree_tokens_per_second: float


def make_line(rng: random.Random, shape: str, turns: int, words: tuple[int, int, int]) -> str:
    """A line of a JSON-lines file: made-up words, so that no two texts are the same."""
    syllables = ["ka", "to", "mi", "ren", "sol", "ba", "ve", "lu", "dor", "in", "es", "pa", "the", "ing", "qu"]
    to_a_question = {"chat": 1, "loop": turns, "loops": 10}[shape]

    def text(count: int) -> str:
        return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))

    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        if turn % to_a_question == 0:
            messages.append({"role": "user", "content": text(words[0])})
        message = {"role": "assistant", "reasoning_content": text(words[1])}
        if turn % to_a_question == to_a_question - 1 or turn == turns - 1:
            messages.append({**message, "content": text(words[2])})
            continue
        function = {"name": "look_up", "arguments": {"query": text(words[2] // 3)}}
        messages.append({**message, "content": "", "tool_calls": [{"type": "function", "function": function}]})
        messages.append({"role": "tool", "content": text(words[0])})
    return json.dumps({"messages": messages})


def measure(builder: Builder, lines: list[str], shape: str, rendering: str, turns: int) -> Figure:
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
        shape, rendering, turns, len(lines), round(size), round(per_turn_tokens / len(lines)),
        seconds, parse, render, merge, pack,
        seconds / size * 1e6, size / seconds,
    )  # fmt: skip


def show(figure: Figure, first: Figure) -> None:
    f = figure
    print(
        f"{f.shape:<6}{f.rendering:<7}{f.turns:>4} turns  {f.tree_tokens:>8,} tree tokens "
        f"({f.per_turn_tokens:,} per turn)  {f.microseconds_per_tree_token:6.2f} us/token = {against(f, first):5.2f}x  "
        f"{f.tree_tokens_per_second:>9,.0f} tree tokens/s   parse {f.parse_seconds / f.seconds:.0%} "
        f"render {f.render_seconds / f.seconds:.0%} merge {f.merge_seconds / f.seconds:.0%} "
        f"pack {f.pack_seconds / f.seconds:.0%}",
        flush=True,
    )


def against(figure: Figure, first: Figure) -> float:
    return figure.microseconds_per_tree_token / first.microseconds_per_tree_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes" / "quickstart" / "base")
    parser.add_argument("--shapes", nargs="+", choices=["chat", "loop", "loops"], default=["chat"])
    parser.add_argument("--renderings", nargs="+", choices=["auto", "whole"], default=["auto", "whole"])
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 50, 200])
    parser.add_argument("--words", type=int, nargs=3, default=[60, 150, 60], metavar=("USER", "THINKING", "RESPONSE"))
    parser.add_argument("--total-turns", type=int, default=1000, help="turns to measure for each length, in total")
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
    tokenizer = load_tokenizer(recipe)
    rng, words = random.Random(0), tuple(arguments.words)
    figures, ratios = [], []
    for shape, rendering in itertools.product(arguments.shapes, arguments.renderings):
        chosen = recipe.replace(data={"rendering": rendering})
        builder = Builder(chosen, load_renderer(chosen, tokenizer))

        def timed(name: str, turns: int, count: int) -> Figure:
            lines = [make_line(rng, shape, turns, words) for _ in range(count)]  # noqa: B023
            return measure(builder, lines, shape, name, turns)  # noqa: B023

        timed(rendering, 5, 10)  # warm-up: first calls, the encoder's checks
        short = timed(rendering, arguments.turns[0], arguments.total_turns // arguments.turns[0])
        show(short, short)
        found = [short]
        if rendering == "auto":
            found.append(timed("first", 50, 8))
            show(found[-1], short)
        for turns in arguments.turns[1:]:
            found.append(timed(rendering, turns, max(5, arguments.total_turns // turns)))
            show(found[-1], short)
        figures += found
        ratios += [against(figure, short) for figure in found]
    result: dict[str, Any] = {
        "tokenizer": arguments.tokenizer.name,
        "words": dict(zip(("user", "thinking", "response"), arguments.words, strict=True)),
        "workers": 1,
        "figures": [
            {**asdict(figure), "time_per_tree_token_against_the_shortest": ratio}
            for figure, ratio in zip(figures, ratios, strict=True)
        ],
        "environment": environment(0, torch.device("cpu"), 1, "2026-01-31"),
    }
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
