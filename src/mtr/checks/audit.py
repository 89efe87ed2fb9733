"""What a chat template does to a conversation, for people: the findings in words, and what training would lose.

    findings (by sentinels)  +  sample conversations, rendered as in training  +  the rows of a recipe  ->  report

Every claim comes from rendering with this template, these arguments and this date; no model is known by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from mtr.chat.completion import PARTS
from mtr.chat.findings import Findings, Stop, spelled
from mtr.chat.rendering import Renderer
from mtr.chat.turn import CHOSEN, INLINE_HISTORY, Turn
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.parsing import parse_row

_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Count coins.",
        "parameters": {"type": "object", "properties": {"who": {"type": "string", "description": "Whose."}}},
    },
}


def _user(content: str = "How many coins?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str = "Seven coins.", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _calls(*whose: str, **keys: Any) -> dict[str, Any]:
    calls = [
        {"id": f"count000{n}", "type": "function", "function": {"name": "count", "arguments": {"who": who}}}
        for n, who in enumerate(whose)
    ]
    return {"role": "assistant", "tool_calls": calls, **keys}


def _result(number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"count000{number}", "name": "count", "content": "7"}


_THOUGHT = {"reasoning_content": "Three and four."}
_LOOP = [_user(), _calls("Ana", reasoning_content="Ask for Ana."), _result(), _answer(**_THOUGHT)]
_INLINE = "<think>\nThree and four.\n</think>\n\nSeven coins."
KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "turns with thinking": ([_user(), _answer(**_THOUGHT), _user("And Ben?"), _answer(**_THOUGHT)], False),
    "turns with inline thinking": ([_user(), _answer(_INLINE), _user("And Ben?"), _answer(_INLINE)], False),
    "turns without thinking": ([_user(), _answer(), _user("And Ben?"), _answer()], False),
    "thinking in a tool loop": (_LOOP, True),
    "parallel tool calls": ([_user(), _calls("Ana", "Ben"), _result(), _result(1), _answer()], True),
    "text beside a tool call": ([_user(), _calls("Ana", content="I shall ask."), _result(), _answer()], True),
    "a system message": ([{"role": "system", "content": "Count."}, _user(), _answer()], False),
}
"""Usual conversations, each with or without tool schemas: losing any of them is a loss."""
ODD_KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "a developer message": ([{"role": "developer", "content": "Count."}, _user(), _answer()], False),
    "an assistant greeting first": ([_answer("Hello."), _user(), _answer()], False),
    "two user messages in a row": ([_user(), _user("And Ben?"), _answer()], False),
    "two assistant messages in a row": ([_user(), _answer("Let me count."), _answer()], False),
}


@dataclass(frozen=True)
class Trial:
    """A sample conversation as training would take it."""

    kind: str
    usual: bool
    turns: int
    trained: int
    reasons: tuple[str, ...]
    """Why turns are refused."""
    chosen: tuple[str, ...]
    """Why turns are left out on purpose."""
    notes: tuple[str, ...]
    """What is left out of turns that are trained."""
    forks: bool
    """A later turn does not go on from the turn before it: one pass needs copies."""


@dataclass(frozen=True)
class DataReport:
    """The turns of a recipe's rows."""

    rows: int
    of_rows: int | None
    """None: a stream."""
    turns: int
    trained: int
    refused: dict[str, int]
    """Turns by reason."""
    chosen: dict[str, int]
    """Turns that the data or the recipe leaves out, by reason."""
    notes: dict[str, int]
    unreadable: dict[str, int]
    """Rows by error."""
    examples: dict[str, str]
    """Where the first turn of each reason and note stands."""


@dataclass(frozen=True)
class Report:
    name: str
    arguments: dict[str, Any]
    date: str
    findings: Findings
    trials: tuple[Trial, ...]
    data: DataReport | None

    @property
    def losses(self) -> list[str]:
        """What training would lose: of the data where there is some, else of usual conversations."""
        if self.data is not None:
            parts = {**self.data.refused, **self.data.notes, **self.data.unreadable}
            return [text for text in parts if text != INLINE_HISTORY]
        return [
            f"{trial.kind}: {text}"
            for trial in self.trials
            if trial.usual
            for text in (*trial.reasons, *trial.notes)
            if text != INLINE_HISTORY
        ]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "losses": self.losses, "passed": not self.losses}


def audit(renderer: Renderer, name: str, data: DataReport | None = None) -> Report:
    trials = [
        _try(renderer, kind, usual, messages, with_tools)
        for usual, kinds in ((True, KINDS), (False, ODD_KINDS))
        for kind, (messages, with_tools) in kinds.items()
    ]
    template = renderer.template
    return Report(name, template.arguments, template.day.isoformat(), renderer.findings, tuple(trials), data)


def _try(renderer: Renderer, kind: str, usual: bool, messages: list[dict[str, Any]], with_tools: bool) -> Trial:
    conversation = parse_row({"messages": messages, "tools": [_TOOL] if with_tools else None}, kind)
    turns = renderer.render(conversation)
    trained = [turn for turn in turns if turn.trained]
    why = list(dict.fromkeys(turn.reason for turn in turns if turn.reason is not None))
    return Trial(
        kind,
        usual,
        turns=len(turns),
        trained=len(trained),
        reasons=tuple(reason for reason in why if reason not in CHOSEN),
        chosen=tuple(reason for reason in why if reason in CHOSEN),
        notes=tuple(dict.fromkeys(note for turn in trained for note in turn.notes)),
        forks=_forks(trained),
    )


def _forks(turns: Sequence[Turn]) -> bool:
    for turn, later in pairwise(turns):
        ids = turn.prompt_ids + turn.completion_ids
        if later.prompt_ids[: len(ids)] != ids:
            return True
    return False


def audit_rows(renderer: Renderer, rows: Iterable[Conversation | SkippedRow], of_rows: int | None) -> DataReport:
    """Render every row as training would, and count what it makes of the turns; rows outside the limits are no loss."""
    counts = {name: Counter[str]() for name in ("refused", "chosen", "notes", "unreadable")}
    examples: dict[str, str] = {}
    number = turns = trained = 0
    for row in rows:
        number += 1
        if isinstance(row, SkippedRow):
            if row.problem is not None:
                counts["unreadable"][f"{row.where}: {row.problem}"] += 1
            continue
        for turn in renderer.render(row):
            turns += 1
            trained += turn.trained
            where = f"{row.where}, message {turn.message_index}"
            if turn.reason is not None:
                counts["chosen" if turn.reason in CHOSEN else "refused"][turn.reason] += 1
            counts["notes"].update(turn.notes)
            for text in (*turn.notes, *([turn.reason] if turn.reason else [])):
                examples.setdefault(text, where)
    by_number = {name: dict(counter.most_common()) for name, counter in counts.items()}
    return DataReport(number, of_rows, turns, trained, **by_number, examples=examples)


# --- in words ---------------------------------------------------------------------------------------------------------


def explain(report: Report) -> Iterator[tuple[str, str]]:
    """Topic and sentence, in the order in which a reader asks."""
    found = report.findings
    if report.arguments:
        yield "arguments", ", ".join(f"{key}: {spelled(value)}" for key, value in report.arguments.items())
    yield from _explain_thinking(found)
    yield from _explain_end(found)
    yield from _explain_text(found)
    yield from _explain_tools(found)
    yield "system message", _SURVIVES[found.system]
    if found.dated:
        yield "date", f"the template prints one: {report.date} for this run (date in the recipe)"
    if found.bos == "twice":
        yield "BOS", "the template writes it twice"
    elif found.bos == "template":
        again = (
            "; encoding with special tokens would add a second, so mtr encodes without" if found.bos_on_encode else ""
        )
        yield "BOS", f"the template writes it{again}"
    elif found.bos_on_encode:
        yield "BOS", "the template writes none and servers add none, so none is trained"
    trials = [trial for trial in report.trials if trial.usual and trial.trained > 1]
    for forks, meaning in ((True, "fork, each branch costs a copy"), (False, "go on as one path")):
        if kinds := [trial.kind for trial in trials if trial.forks == forks]:
            yield "layout", f"{', '.join(kinds)}: {meaning}"


def _explain_thinking(found: Findings) -> Iterator[tuple[str, str]]:
    where = {
        "recipe": "named in the recipe",
        "rendering": "found around rendered thinking",
        "template": "spelled in the template",
        "tokenizer": "found among the added tokens",
    }
    if found.tags is None or found.tags_from is None:
        yield "thinking tags", "none found; name them in the recipe if the model thinks: thinking: {open: …, close: …}"
    else:
        yield "thinking tags", f"{found.tags[0]} … {found.tags[1]}, {where[found.tags_from]}"
    fields = " or ".join(found.fields)
    in_parts = found.fields == (PARTS,)
    in_content = "inline" in (*found.answers_read, *found.calls_read)
    if fields:
        yield "thinking is read", f"from {fields}{', or inline in the content' if in_content else ''}"
    elif in_content:
        yield "thinking is read", "only inline, as part of the content"
    else:
        yield "thinking is read", "from nowhere"
    yield "its own turn", _own_thinking(found)
    if found.history == found.history_inline or not fields:
        inline = "" if found.history == found.history_inline else "inline "
        kept = f"{inline}thinking is {_HISTORY[found.history_inline]}"
        yield "history", f"{kept}, but not from a field; thinking: {{history: respell}} moves it" if in_parts else kept
    else:
        yield (
            "history",
            (f"thinking in a field is {_HISTORY[found.history]}; inline it is {_HISTORY[found.history_inline]}"),
        )
    yield "generation prompt", f"{json.dumps(found.generation_prompt, ensure_ascii=False)} {_PROMPT[found.prompt_ends]}"
    for switch in found.switches:
        yield "switch", f"template: {{{switch.argument}: {spelled(switch.value)}}} {', '.join(switch.effects)}"


def _own_thinking(found: Findings) -> str:
    built = "put together from the tags"
    if found.answers_read and (found.calls_read or found.calls != "rendered"):
        return "rendered by the template"
    if found.answers_read:
        return f"rendered in an answer; with a tool call {built}"
    if found.calls_read:
        return f"rendered with a tool call; in an answer {built}"
    if found.tags is None:
        return "never rendered, and no tags are known: turns with thinking are refused"
    return f"never rendered by the template: completions are {built}"


_HISTORY = {
    "always": "kept in every prompt",
    "since the last user message": "kept since the last user message, dropped before it",
    "until answered": "kept in a tool loop until it is answered, then dropped",
    "only the final message": "dropped, also within a tool loop",
    "never": "dropped",
}
_PROMPT = {
    "nothing": "leaves the thinking to the model",
    "opens thinking": "opens the thinking",
    "closes thinking": "closes the thinking: turns that have some are refused",
}
_SURVIVES = {"rendered": "rendered", "lost": "LEFT OUT silently", "refused": "refused by the template"}


def _explain_end(found: Findings) -> Iterator[tuple[str, str]]:
    yield "an answer ends in", _stop(found.answer_stop)
    if found.call_stop is not None and found.call_stop != found.answer_stop:
        yield "a call ends in", _stop(found.call_stop)
    if found.after_stop.strip():
        yield "after that", f"{json.dumps(found.after_stop, ensure_ascii=False)} is written and not trained"
    if found.answer_stop is not None and found.history_end != found.answer_stop.text:
        yield "in history", f"the same answer ends in {found.history_end or 'nothing'}"


def _explain_text(found: Findings) -> Iterator[tuple[str, str]]:
    if found.whitespace != "kept":
        what = "newlines" if found.whitespace == "newlines trimmed" else "white space"
        yield "an answer's text", f"{what} around it is trimmed"
    if found.close_tag_in_response != "rendered" and found.tags is not None:
        yield "an answer's text", f"{found.tags[1]} in it cuts it: such turns are refused"


def _stop(stop: Stop | None) -> str:
    if stop is None:
        return "nothing that is known: turns are refused"
    source = {
        "template": "written by the template",
        "next message": "the first token of the message that follows",
        "generation config": "from the generation config; the template writes none",
        "tokenizer": "the tokenizer's eos; the template writes none",
    }[stop.source]
    warning = "" if stop.stops_inference else "; inference must be told to stop at it (eos_token_id)"
    return f"{stop.text}, {source}{warning}"


def _explain_tools(found: Findings) -> Iterator[tuple[str, str]]:
    parts = {"schemas": found.tools, "calls": found.calls, "results": found.results}
    if found.calls == "rendered":
        parts |= {"parallel calls": found.parallel_calls, "text beside a call": found.text_beside_calls}
        if found.text_beside_calls_with_thinking != found.text_beside_calls:
            parts["text beside a call with thinking"] = found.text_beside_calls_with_thinking
    groups: dict[str, list[str]] = {}
    for part, survival in parts.items():
        groups.setdefault(_SURVIVES[survival], []).append(part)
    yield "tools", "; ".join(f"{', '.join(names)} {how}" for how, names in groups.items())
    if found.calls == "rendered" and found.arguments == "string":
        yield "tool arguments", "the template wants JSON text, so objects are written as such"
    elif found.calls == "rendered" and found.string_arguments != "rendered":
        how = "quotes twice" if found.string_arguments == "lost" else "refuses"
        yield "tool arguments", f"JSON text, which the template {how}, is parsed first"
