"""Valid recipes, rows, chat templates and run folders, damaged at random; and what must hold of each all the same.

A trial ends with a documented exit code and, if that is an error, in one line; or it ends well, and then its result is
checked against something that is counted or computed here:

    recipes     what is loaded is what is saved and loaded again
    rows        every row is trained, skipped or untrained with a reason, and a trained turn says what its row says
    templates   a prompt is what the template itself renders, and its completion has the answer and a stop token in it
    folders     the run that goes on ends as the one that was never damaged, bit for bit

Most trials call the parts of mtr directly; some run the whole command.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from support.hostile import Ended, Place, call, differences, judge_error, result_of, snapshot
from support.paths import QUICKSTART
from support.rows import ANSWER, USER, chat, conversation_row
from support.templates import BEHAVIOURS

from mtr.chat.loading import load_renderer, load_tokenizer, make_renderer
from mtr.chat.rendering import Renderer
from mtr.console import printable
from mtr.data.conversation import Conversation
from mtr.data.mixture import Mixture
from mtr.data.opening import open_training_data
from mtr.data.parsing import parse_row
from mtr.errors import UserError
from mtr.prepare.builder import Builder
from mtr.recipe.loading import load_recipe, load_saved_recipe
from mtr.recipe.sections import Recipe

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2.5, 1e308, float("nan"), float("inf"), 10**30),
    *("", "x", "no", "null", "\x1b[31m", "\u202e", "\0", "\ud800", "a\nb", "../..", "/", "~", "*", "x" * 999),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}),
)
"""What stands where something else should."""
FEW = st.sampled_from((1, 1, 1, 2, 3))
junk = st.sampled_from(JUNK).map(copy.deepcopy)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int
    problem: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of things to damage."""

    inputs: st.SearchStrategy[Any]
    attempt: Callable[[Place, Any], Outcome]
    share: float
    """Of all examples."""
    setup: Callable[[Place], object] = field(default=lambda place: None)
    """Done once, before the first example."""


# --- damage -----------------------------------------------------------------------------------------------------------


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested lists and objects."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*at, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from paths(item, (*at, i))


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """A nested value of which a few places are dropped, doubled, renamed or something else."""
    value = copy.deepcopy(value)
    for _ in range(draw(FEW)):
        places = [place for place in paths(value) if place]
        if not places:
            return draw(junk)
        *above, last = draw(st.sampled_from(places))
        holder = functools.reduce(lambda held, key: held[key], above, value)
        how = draw(st.sampled_from(("drop", "double", "rename", "junk", "junk", "wrap", "damage")))
        if how == "drop":
            del holder[last]
        elif how == "double":
            double = copy.deepcopy(holder[last])
            if isinstance(holder, list):
                holder.insert(last, double)
            else:
                holder[f"{last}_"] = double
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from((str(last).upper(), f"{last}s", "role", "content", "path", "", "x")))] = (
                holder.pop(last)
            )
        elif how == "wrap":
            holder[last] = draw(
                st.sampled_from(([holder[last]], {"x": holder[last]}, json.dumps(holder[last], default=str)))
            )
        elif how == "damage" and isinstance(holder[last], str):
            holder[last] = draw(damaged_bytes(holder[last].encode("utf-8", "surrogatepass"))).decode("utf-8", "replace")
        else:
            holder[last] = draw(junk)
    return value


@st.composite
def damaged_bytes(
    draw: st.DrawFn, content: bytes, inserted: tuple[bytes, ...] = (b"\0", b"\xff", b"\n", b'"', b"{" * 300)
) -> bytes:
    """Content of which a few parts are flipped, cut, left out, doubled, or have something put in."""
    for _ in range(draw(FEW)):
        start, end = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
        how = draw(st.sampled_from(("flip", "cut", "leave out", "double", "insert")))
        if how == "flip" and start < len(content):
            content = content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]
        elif how == "cut":
            content = content[:end]
        elif how == "leave out":
            content = content[:start] + content[min(end, start + 40) :]
        elif how == "double":
            content = content[:end] + content[start:end] + content[end:]
        else:
            content = content[:start] + draw(st.sampled_from(inserted)) + content[start:]
    return content[:200_000]


@st.composite
def damaged_text(draw: st.DrawFn, value: Any, write: Callable[[Any], bytes]) -> bytes:
    """A value that is damaged, or whose text is."""
    if draw(st.booleans()):
        return write(draw(damaged_value(value)))
    return draw(damaged_bytes(write(value)))


def refusal(error: UserError) -> Outcome:
    """An error that the user can fix is one line that is not too long."""
    line = printable(str(error)).replace("\n", " ")
    problems = judge_error(f"error: {line}\n")
    return Outcome(error.exit_code, "; ".join(problems) or None)


def judged(ended: Ended, codes: tuple[int, ...] = (0, 2)) -> Outcome:
    """The end of a whole command."""
    if ended.crash:
        return Outcome(ended.code, f"traceback: {ended.crash[-600:]}")
    problems = judge_error(ended.err) if ended.code not in (0, 1) else []
    if ended.code not in codes:
        problems.append(f"exit code {ended.code}: {ended.err[-300:]}")
    return Outcome(ended.code, "; ".join(problems) or None)


# --- recipes ----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {
    "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32", "allow_missing": ["x.*"]},
    "template": {"enable_thinking": True},
    "thinking": {"open": "<think>", "close": "</think>", "history": "respell"},
    "date": "2026-01-31",
    "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 1.5}, "rows.jsonl"],
        "columns": {"system": None},
        "filter": {"min_turns": 1, "max_messages": 99},
        "on_bad_row": "skip",
    },
    "sequence": {"max_length": 1024, "max_tokens": "auto", "overlong": "truncate"},
    "loss": {"weighting": "turn"},
    "training": {
        "output_dir": "run",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
        "preempt_signal": ["USR1"],
    },
}


@st.composite
def recipes(draw: st.DrawFn) -> tuple[bytes, bool]:
    """The text of a recipe, and whether the whole command is run on it."""

    def write(value: Any) -> bytes:
        return yaml.safe_dump(value, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")

    return draw(damaged_text(SECTIONS, write)), draw(st.integers(0, 19)) == 0


def try_recipe(place: Place, given: tuple[bytes, bool]) -> Outcome:
    text, whole = given
    path = place.write("recipe.yaml", text)
    if whole:
        return judged(call(place, ["inspect", str(path)]))
    try:
        recipe = load_recipe(path)
    except UserError as error:
        return refusal(error)
    try:
        again = load_saved_recipe(place.write("saved.yaml", recipe.dump()))
    except UserError as error:
        return Outcome(0, f"what was saved cannot be loaded again: {error}")
    return Outcome(0, None if again == recipe else "what was saved is another recipe")


# --- rows -------------------------------------------------------------------------------------------------------------

_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS: dict[str, list[Any]] = {
    "messages": [
        conversation_row(turns=2),
        conversation_row(turns=1, thinking=False),
        chat({"role": "system", "content": "Count."}, USER, ANSWER, USER, {**ANSWER, "weight": 0.5}),
        chat(
            USER,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "A."}]},
        ),
        {
            **chat(USER, {"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "content": "7"}, ANSWER),
            "tools": [{"name": "f"}],
        },
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "x"}]
    * 2,
    "prompt_completion": [{"prompt": "a", "completion": "b"}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}],
    "instruction": [
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
        {"instruction": "a", "output": "c"},
    ],
}


@st.composite
def data_files(draw: st.DrawFn) -> tuple[bytes, str, bool]:
    """The content of a JSON-lines file, what happens to bad rows, and whether the whole command is run on it."""
    rows = ROWS[draw(st.sampled_from(sorted(ROWS)))]
    chosen = draw(st.lists(st.sampled_from(rows), min_size=1, max_size=4))
    lines = [json.dumps(draw(damaged_value(row)) if draw(st.booleans()) else row).encode() for row in chosen]
    text = b"\n".join(lines) + b"\n"
    text = draw(damaged_bytes(text)) if draw(st.integers(0, 2)) == 0 else text
    return text, draw(st.sampled_from(("skip", "skip", "error"))), draw(st.integers(0, 29)) == 0


@functools.cache
def usual(folder: Path) -> tuple[Recipe, Renderer]:
    """The recipe of a place and its renderer, which is the same for all of them."""
    recipe = load_recipe(folder / "recipe.yaml")
    return recipe, load_renderer(recipe, load_tokenizer(recipe))


def try_rows(place: Place, given: tuple[bytes, str, bool]) -> Outcome:
    text, on_bad_row, whole = given
    place.write("rows.jsonl", text)
    lines = sum(bool(line.strip()) for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    if whole:
        return inspect_rows(place, lines)
    recipe, renderer = usual(place.folder)
    recipe = recipe.replace(data={"on_bad_row": on_bad_row})
    try:
        data, _ = open_training_data(recipe.data, seed=1)
        assert isinstance(data, Mixture)
        taken = [data.take(index) for index in range(len(data))]
        builder = Builder(recipe, renderer)
        counts = builder.step(taken, len(taken), 1.0).counts
    except UserError as error:
        outcome = refusal(error)
        named = outcome.problem or "rows.jsonl" in str(error)
        return outcome if named else Outcome(error.exit_code, f"the file is not named: {error}")
    conversations = [one for one in taken if isinstance(one, Conversation)]
    turns = sum(len(conversation.turns) for conversation in conversations)
    problems = [] if len(taken) == lines else [f"{lines} lines, {len(taken)} rows"]
    if counts.conversations + sum((counts.skipped_rows + counts.untrained_rows).values()) != lines:
        problems.append(f"{lines} rows in, and {counts} counted")
    if counts.turns + sum(counts.untrained_turns.values()) != turns:
        problems.append(f"{turns} turns in, and {counts} counted")
    for conversation in conversations:
        problems += misspoken(conversation, builder)
    return Outcome(0, "; ".join(problems) or None)


def misspoken(conversation: Conversation, builder: Builder) -> Iterator[str]:
    """Trained turns whose completion has not the text of its message."""
    for turn in builder.turns(conversation):
        said = conversation.messages[turn.message_index].content.strip()
        if turn.trained and "<" not in said and said not in spoken(builder.renderer, turn.completion_ids):
            yield f"turn {turn.turn} says {spoken(builder.renderer, turn.completion_ids)!r} instead of {said!r}"


def spoken(renderer: Renderer, ids: tuple[int, ...]) -> str:
    text: str = renderer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def inspect_rows(place: Place, lines: int) -> Outcome:
    ended = call(place, ["inspect", "recipe.yaml", "--all", "data.on_bad_row=skip"])
    outcome = judged(ended)
    if outcome.code == 0 and not outcome.problem:
        shown = [json.loads(line) for line in ended.out.splitlines()]
        if len(shown) != lines or not all(row.get("skipped") or row["turns"] for row in shown):
            return Outcome(0, f"{lines} lines, and {len(shown)} rows are shown")
    return outcome


# --- templates --------------------------------------------------------------------------------------------------------

TEMPLATES = ((QUICKSTART / "base" / "chat_template.jinja").read_text(), *(one.text for one in BEHAVIOURS.values()))
SNIPPETS = (
    *(
        "{{ raise_exception('x') }}",
        "{{ 1 / 0 }}",
        "{{ x.y.z }}",
        "{{ messages }}",
        "{{ message.content }}",
        "{{ tools }}",
    ),
    *("{% for i in range(9) %}", "{% endfor %}", "{% break %}", "{% if loop.last %}", "{% else %}", "{% endif %}"),
    *(
        "{% set x = 'a' * 9 %}",
        "{{ '%s' % messages }}",
        "<|im_end|>",
        "<|im_start|>",
        "<think>",
        "</think>",
        "\x1b[31m",
        "\n",
    ),
)
_CODE = (b" | upper", b" | trim", b"[-1]", b"[:3]", b"not ", b" ~ 'x'", b".strip()")
_TAG = re.compile(r"(\{[{%].*?[%}]\})", re.DOTALL)


@st.composite
def chat_templates(draw: st.DrawFn) -> tuple[str, bool]:
    """A template, and whether the whole command is run on it."""
    parts = [part for part in _TAG.split(draw(st.sampled_from(TEMPLATES))) if part]
    for _ in range(draw(FEW)):
        one, other = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        how = draw(st.sampled_from(("leave out", "double", "swap", "insert", "damage")))
        if how == "leave out":
            parts[one] = ""
        elif how == "double":
            parts.insert(other, parts[one])
        elif how == "swap":
            parts[one], parts[other] = parts[other], parts[one]
        elif how == "insert":
            parts.insert(one, draw(st.sampled_from(SNIPPETS)))
        else:
            parts[one] = draw(damaged_bytes(parts[one].encode(), _CODE)).decode("utf-8", "replace")
    return "".join(parts), draw(st.integers(0, 29)) == 0


CHATS = (conversation_row(turns=2), conversation_row(turns=3, thinking=False))


def try_template(place: Place, given: tuple[str, bool]) -> Outcome:
    text, whole = given
    if whole:
        place.write("base/chat_template.jinja", text)
        return judged(call(place, ["audit", "base", "--rows", "0"]), (0, 1, 2))
    tokenizer = usual(place.folder)[1].tokenizer
    tokenizer.chat_template = text
    try:
        renderer = make_renderer(tokenizer, stop_ids=[2, 0])
    except UserError as error:
        return refusal(error)
    problems = [problem for row in CHATS for problem in misrendered(parse_row(row, "row"), renderer)]
    return Outcome(0, "; ".join(problems) or None)


def misrendered(conversation: Conversation, renderer: Renderer) -> Iterator[str]:
    messages = [dict(message.data) for message in conversation.messages]
    for turn in renderer.render(conversation):
        if not turn.trained:
            if not turn.reason:
                yield f"turn {turn.turn} is not trained, for no reason"
            continue
        said = messages[turn.message_index]["content"]
        prompt = renderer.tokenizer.apply_chat_template(
            messages[: turn.message_index], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if list(turn.prompt_ids) != prompt:
            yield f"the prompt of turn {turn.turn} is {spoken(renderer, turn.prompt_ids)!r}"
        if said not in spoken(renderer, turn.completion_ids):
            yield f"turn {turn.turn} says {spoken(renderer, turn.completion_ids)!r} instead of {said!r}"
        if turn.completion_ids[-1] not in renderer.stop_ids:
            yield f"turn {turn.turn} does not end in a stop token"


# --- folders ----------------------------------------------------------------------------------------------------------

_OF_A_RUN = ("mtr-run.json", "recipe.yaml", "environment.json", "metrics.jsonl", "adapter_model.safetensors")
_OF_A_CHECKPOINT = ("manifest.json", "training_state.json", "training_state.safetensors", "environment.json")
FILES = (*_OF_A_RUN, *(f"checkpoint-{step}/{name}" for step in (1, 2, 3) for name in _OF_A_CHECKPOINT))
Damage = tuple[Any, ...]


@st.composite
def damages(draw: st.DrawFn) -> tuple[list[Damage], str]:
    """What is done to the folder of a finished run, and how another run is started in it."""
    steps = st.integers(1, 4)
    one = st.one_of(
        st.tuples(st.just("gone"), st.sampled_from(FILES)),
        st.tuples(
            st.just("text"), st.sampled_from(FILES), st.sampled_from(("", "{}", "[]", "null", "{", "7", "\0" * 99))
        ),
        st.tuples(st.just("flip"), st.sampled_from(FILES), st.floats(0, 1)),
        st.tuples(st.just("cut"), st.sampled_from(FILES), st.floats(0, 1)),
        st.tuples(st.just("append"), st.sampled_from(FILES)),
        st.tuples(st.just("swap"), st.sampled_from(FILES), st.sampled_from(FILES)),
        st.tuples(st.just("no checkpoint"), steps),
        st.tuples(st.just("rename"), steps, steps),
        st.tuples(st.just("copy"), steps, steps),
        st.tuples(st.just("folder"), st.sampled_from(FILES)),
        st.tuples(st.just("link"), st.sampled_from(FILES)),
        st.tuples(st.just("link checkpoint"), steps),
    )
    return draw(st.lists(one, min_size=1, max_size=3)), draw(
        st.sampled_from(("--resume", "--resume", "--resume", "--overwrite"))
    )


def damage(place: Place, how: Damage) -> None:
    """Do it, where there is still something to do it to."""
    kind, *details = how
    path = place.run / (details[0] if isinstance(details[0], str) else f"checkpoint-{details[0]}")
    if not path.exists() or path.is_symlink():
        return
    if kind in ("rename", "copy"):
        to = place.run / f"checkpoint-{details[1]}"
        if not to.exists():
            path.rename(to) if kind == "rename" else shutil.copytree(path, to)
    elif kind in ("gone", "folder", "no checkpoint"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind in ("link", "link checkpoint"):
        target = place / f"home/{path.parent.name}-{path.name}"
        path.rename(target)
        path.symlink_to(target)
    elif path.is_file():
        path.write_bytes(damaged_content(place, path.read_bytes(), kind, details))


def damaged_content(place: Place, content: bytes, kind: str, details: list[Any]) -> bytes:
    if kind == "text":
        return str(details[1]).encode()
    if kind == "append":
        return content + b"\0\n{}"
    if kind == "swap":
        other = place.run / details[1]
        return other.read_bytes() if other.is_file() else content
    at = int(details[1] * max(0, len(content) - 1))
    if kind == "cut" or not content:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def try_folder(place: Place, given: tuple[list[Damage], str]) -> Outcome:
    done, how = given
    Place(place.folder).finished()
    for one in done:
        damage(place, one)
    before = snapshot(place.folder)
    ended = call(place, ["train", "recipe.yaml", how])
    outcome = judged(ended, (0, 2, 3))
    touched = differences(before, snapshot(place.folder), ("run",) if ended.code == 0 else ())
    if outcome.problem or touched:
        return Outcome(ended.code, "; ".join(filter(None, (outcome.problem, *touched))))
    if ended.code != 0:
        return outcome
    metrics, weights = result_of(place.run)
    wanted_metrics, wanted_weights = result_of(place.kept / "lora" / "run")
    if weights != wanted_weights:
        return Outcome(0, "other weights than those of the run that was not damaged")
    if metrics != wanted_metrics and "metrics.jsonl" not in ended.err:
        return Outcome(0, "other metrics than those of the run that was not damaged, and nothing is said")
    return outcome


KINDS = {
    "recipes": Kind(recipes(), try_recipe, 0.4),
    "rows": Kind(data_files(), try_rows, 0.4),
    "templates": Kind(chat_templates(), try_template, 0.15, setup=lambda place: place.base()),
    "folders": Kind(damages(), try_folder, 0.05, setup=lambda place: place.finished()),
}
