"""Generate the quickstart's assets: a tiny reasoning chat model and conversations to fine-tune it on.

The quickstart must run in minutes on a laptop CPU without downloading anything, and still show a model learn
something that can be checked. This script generates all of it, under ``recipes/quickstart``:

``base/``
    A causal language model with about one million parameters, its tokenizer and chat template. It is
    pretrained here on synthetic text: sums, repeated words (which teach it to copy), plain-text stories in
    which somebody's things are counted, and short chats about other topics, with and without thinking. It
    therefore knows the words, the arithmetic and the chat format, but has never seen a chat that keeps count.
``train.jsonl`` and ``eval.jsonl``
    Conversations in which somebody's things are counted. Each answer depends on the answer before it, which
    is in the chat's history, and is worked out in the turn's own thinking, which the chat template drops
    from the history as soon as the user speaks again. No conversation is in both files.

Everything is drawn from fixed seeds. A rerun on the same machine with the same versions gives the same
files; other machines may round differently and give slightly different weights.

    python scripts/make_quickstart.py [--out recipes/quickstart] [--threads 2] [--steps 1000]
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Message = dict[str, str]

SEED = 20_240
TRAIN_ROWS = 2_400
EVAL_ROWS = 150
MAX_COUNT = 60  # nobody ever has more things than this
MAX_STEP = 12  # at most this many are gained or lost at once

END_OF_TEXT = "<|endoftext|>"  # between documents, and for padding
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

# Thinking is rendered only in assistant messages after the last user message.
CHAT_TEMPLATE = """\
{%- set at = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set at.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content and loop.index0 > at.last_user %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

SHE = ("Ana", "Carla", "Dina", "Eva", "Ida", "Lena", "Mara", "Nora")
HE = ("Ben", "Carl", "David", "Emil", "Hugo", "Karl", "Omar", "Paul")
NAMES = SHE + HE
THINGS = ("apples", "books", "cards", "coins", "eggs", "figs", "keys", "nuts", "pens", "shells", "toys")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "drops")


# --- The domain: somebody's things and what happens to them ------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that changes how many things somebody has: its wording, the sums it takes, and the result."""

    told: str
    sums: str
    after: int


def plus(rng: random.Random, count: int) -> tuple[str, str, int]:
    """Wording, sum and result of gaining a few."""
    step = rng.randint(1, min(MAX_STEP, MAX_COUNT - count))
    return f"{rng.choice(GAINS)} {step} more", f"{count} + {step} = {count + step}.", count + step


def minus(rng: random.Random, count: int) -> tuple[str, str, int]:
    """Wording, sum and result of losing a few."""
    step = rng.randint(1, min(MAX_STEP, count))
    return f"{rng.choice(LOSSES)} {step}", f"{count} - {step} = {count - step}.", count - step


def halve(rng: random.Random, count: int) -> tuple[str, str, int]:
    """Wording, sum and result of giving half away; the count must be even."""
    return "gives half away", f"Half of {count} is {count // 2}.", count // 2


def double(rng: random.Random, count: int) -> tuple[str, str, int]:
    """Wording, sum and result of doubling."""
    return "gets as many again", f"{count} + {count} = {2 * count}.", 2 * count


def draw_change(rng: random.Random, count: int) -> tuple[str, str, int]:
    """Wording, sum and result of one change that is possible with this count."""
    possible: list[Callable[[random.Random, int], tuple[str, str, int]]] = []
    if count < MAX_COUNT:
        possible += [plus, plus]
    if count > 0:
        possible += [minus, minus]
    if count > 0 and count % 2 == 0:
        possible.append(halve)
    if 0 < 2 * count <= MAX_COUNT:
        possible.append(double)
    return rng.choice(possible)(rng, count)


def draw_event(rng: random.Random, subject: str, count: int) -> Event:
    """One change, or two in a row."""
    told, sums, after = draw_change(rng, count)
    if rng.random() < 0.4:
        then, more_sums, after = draw_change(rng, after)
        told, sums = f"{told} and then {then}", f"{sums} {more_sums}"
    return Event(f"{subject} {told}.", sums, after)


def pronoun(name: str) -> str:
    return "She" if name in SHE else "He"


def owns(name: str, count: int, things: str, verb: str = "has") -> str:
    """Say how many things somebody has, with the singular for one."""
    return f"{name} {verb} {count} {things.removesuffix('s') if count == 1 else things}"


# --- The task: counting in a chat --------------------------------------------------------------------------


def counting_chat(rng: random.Random) -> list[Message]:
    """A conversation of three to six turns that keeps count of somebody's things."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    start = count = rng.randint(2, MAX_COUNT - MAX_STEP)

    def turn(told: str, thinking: str, answer: str) -> list[Message]:
        return [
            {"role": "user", "content": told},
            {"role": "assistant", "reasoning_content": thinking, "content": answer},
        ]

    told = owns(name, start, things)
    messages = turn(f"{told}.", f"Start: {start}.", f"{told} now.")
    for turns_before in range(1, rng.randint(3, 6)):
        if turns_before > 1 and rng.random() < 0.15:
            asked = f"How many {things} did {name} have at the start?"
            messages += turn(asked, f"Start: {start}.", f"{owns(name, start, things, 'had')} at the start.")
            continue  # the count stays, and the next turn finds it further back in the history
        event = draw_event(rng, pronoun(name), count)
        thinking = f"Before: {count}. {event.sums}"
        count = event.after
        messages += turn(event.told, thinking, f"{owns(name, count, things)} now.")
    return messages


def write_conversations(out: Path) -> None:
    """Write train.jsonl and eval.jsonl; every conversation appears once."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    for split, rows in (("eval", EVAL_ROWS), ("train", TRAIN_ROWS)):
        lines: list[str] = []
        while len(lines) < rows:
            messages = counting_chat(rng)
            said = json.dumps([message["content"] for message in messages])
            if said not in seen:
                seen.add(said)
                lines.append(json.dumps({"id": f"{split}-{len(lines):04d}", "messages": messages}))
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- The pretraining corpus --------------------------------------------------------------------------------


def sums_text(rng: random.Random) -> str:
    """A chain of sums."""
    count = rng.randint(0, MAX_COUNT)
    parts: list[str] = []
    for _ in range(rng.randint(4, 12)):
        _, told_sum, after = draw_change(rng, count)
        parts.append(told_sum)
        count = after if rng.random() < 0.7 else rng.randint(0, MAX_COUNT)
    return " ".join(parts)


def story_text(rng: random.Random) -> str:
    """A plain-text story: who has how many, what happens, the sums, how many are left."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count = rng.randint(0, MAX_COUNT)
    parts = [f"{owns(name, count, things)}."]
    for _ in range(rng.randint(1, 4)):
        event = draw_event(rng, rng.choice((name, pronoun(name))), count)
        parts += [event.told, f"Before: {count}. {event.sums}"]
        count = event.after
        parts.append(f"{owns(name, count, things)} now.")
    return " ".join(parts)


def echo_text(rng: random.Random) -> str:
    """A few random words, two or three times in a row: this teaches the model to copy."""
    words = [str(rng.choice(rng.choice((NAMES, THINGS, COLOURS, range(MAX_COUNT + 1))))) for _ in range(6)]
    return " ".join([" ".join(words[: rng.randint(3, 6)]) + "."] * rng.randint(2, 3))


def other_turn(rng: random.Random) -> list[Message]:
    """A question about anything but counting things, and its answer, with or without thinking."""
    name, things, colour = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLOURS)
    number = rng.randint(0, MAX_COUNT)
    _, told_sum, after = draw_change(rng, number)
    asked, thinking, answer = rng.choice(
        (
            (f"Hello, I am {name}.", f"The name: {name}.", f"Hello {name}!"),
            (f"Say {things}.", f"The word: {things}.", f"{things.capitalize()}."),
            (f"Repeat: {name} has {colour} {things}.", "Repeat it.", f"{name} has {colour} {things}."),
            (f"{name} likes the {colour} {things}. Who?", f"It is {name}.", f"{name}."),
            (f"{name} has {colour} {things}. What colour?", f"They are {colour}.", f"{colour.capitalize()}."),
            (f"How much is {told_sum.split(' = ')[0].split(' is ')[0]}?", told_sum, f"It is {after}."),
            (f"Which number is it: {number}?", f"Start: {number}.", f"It is {number}."),
        )
    )
    reply = {"role": "assistant", "content": answer}
    if rng.random() < 0.5:
        reply["reasoning_content"] = thinking
    return [{"role": "user", "content": asked}, reply]


def documents(rng: random.Random) -> Iterator[str | list[Message]]:
    """The endless corpus: plain texts, and chats as messages."""
    while True:
        draw = rng.random()
        if draw < 0.2:
            yield sums_text(rng)
        elif draw < 0.5:
            yield story_text(rng)
        elif draw < 0.7:
            yield echo_text(rng)
        else:
            yield [message for _ in range(rng.randint(1, 5)) for message in other_turn(rng)]


# --- Tokenizer and model -----------------------------------------------------------------------------------


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: lossless for any text, and each number of the domain is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The randomly initialised model."""
    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def as_text(tokenizer: PreTrainedTokenizerFast, document: str | list[Message]) -> str:
    if isinstance(document, str):
        return document
    rendered: Any = tokenizer.apply_chat_template(document, tokenize=False)
    return str(rendered)


def token_blocks(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, width: int) -> torch.Tensor:
    """Documents of the corpus, concatenated and cut into rows of tokens."""
    ids: list[int] = []
    corpus = documents(rng)
    while len(ids) < rows * width:
        texts = [as_text(tokenizer, next(corpus)) + END_OF_TEXT for _ in range(1_000)]
        for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids += encoded
    return torch.tensor(ids[: rows * width]).view(rows, width)


def pretrain(
    model: Qwen3ForCausalLM,
    blocks: torch.Tensor,
    steps: int,
    peak_rate: float = 4e-3,
    warm_up: int = 40,
) -> None:
    """Train on each row of tokens once: AdamW, linear warm-up, then cosine decay to 5% of the peak rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.monotonic()
    model.train()
    for step, batch in enumerate(blocks.chunk(steps)):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - began:4.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def mean_loss(model: Qwen3ForCausalLM, blocks: torch.Tensor) -> float:
    return float(model(input_ids=blocks, labels=blocks, use_cache=False).loss)


def make_base(folder: Path, steps: int, rows_per_step: int = 24, width: int = 192) -> None:
    """Make the tokenizer, pretrain the model, and save both."""
    texts = documents(random.Random(SEED + 1))
    sample = [next(texts) for _ in range(6_000)]
    plain = [d if isinstance(d, str) else "\n\n".join("\n".join(m.values()) for m in d) for d in sample]
    # How lines of the task's chats begin, so that these words become single tokens too.
    tokenizer = make_tokenizer([*plain, *["Before:\nStart:\nHow many did\nsystem\n at the start"] * 20])

    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {parameters:,}")
    blocks = token_blocks(tokenizer, random.Random(SEED + 3), steps * rows_per_step, width)
    print(f"pretraining: {steps} steps of {rows_per_step} rows of {width} tokens", flush=True)
    pretrain(model, blocks, steps)

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held_out = token_blocks(tokenizer, random.Random(SEED + 4), 64, width)
    print(f"base: loss {mean_loss(model.float(), held_out):.3f} on unseen text of the same kind")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Generate the quickstart's model and conversations.")
    parser.add_argument("--out", type=Path, default=root / "recipes" / "quickstart", help="where to write")
    parser.add_argument("--threads", type=int, default=2, help="threads for torch")
    parser.add_argument("--steps", type=int, default=1_000, help="pretraining steps")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    write_conversations(out)
    make_base(out / "base", arguments.steps)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>10,}  {path.relative_to(out)}")


if __name__ == "__main__":
    main()
