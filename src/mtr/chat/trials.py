"""The template audit: what a chat template does, found by rendering sentinel conversations at start-up.

    sentinel texts -> rendered -> where do they stand, what stands around them -> Findings

There is no table of models: which fields are read, what surrounds the thinking, what ends a turn and which argument
opens the thinking is tried out on the template itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

from mtr.chat.completion import (
    COMMON_TAGS,
    INLINE,
    PARTS,
    SPELLINGS,
    TAG,
    THINKING_FIELDS,
    State,
    Tags,
    after_thinking,
    rendered,
    spell,
    split_prompt,
)
from mtr.chat.findings import CLOSES, LEAVES, OPENS, Findings, History, Stop, Survival, Switch
from mtr.chat.template import RefusedError, Template
from mtr.errors import UserError

_PART = re.compile(r"['\"]thinking['\"]\s*:")
"""A part that was written out as it is."""
_LAST_TAG = re.compile(r"[<\[◁][^<>\[\]\s]*[>\]▷]$")

# Words that no template looks for, in conversations of every shape that matters.
_ASK, _THINK, _SAY = "Sentinel question.", "Sentinel thinking.", "Sentinel response."
_NAME, _KEY, _VALUE, _RESULT = "sentinel_tool", "sentinel_key", "sentinel value", "sentinel result"
_USER: dict[str, Any] = {"role": "user", "content": _ASK}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sentinel_schema",
        "description": "A sentinel.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A sentinel."}}},
    },
}

_CACHE: dict[Any, Findings] = {}


def find(template: Template, stop_ids: Sequence[int] = (), tags: Tags | None = None) -> Findings:
    """Audit a template; once for each template, tokenizer, set of arguments and date.

    Args:
        stop_ids: what the generation config stops at.
        tags: around thinking, where the recipe names them.

    Raises:
        UserError: the template fails on a single user message.
    """
    tokenizer = template.tokenizer
    key = (
        template.text,
        repr(template.arguments),
        template.day,
        tokenizer.name_or_path,
        len(tokenizer),
        repr(tokenizer.special_tokens_map),
        tuple(stop_ids),
        tags,
    )
    if key not in _CACHE:
        _CACHE[key] = _Finder(template, stop_ids, tags).findings()
    return _CACHE[key]


class _Finder:
    """The trials. Each method answers one question; what the template refuses counts as text that has nothing in it."""

    def __init__(self, template: Template, stop_ids: Sequence[int], tags: Tags | None) -> None:
        self.template = template
        self.tokenizer = template.tokenizer
        self.explicit_stops = list(stop_ids)
        eos = self.tokenizer.eos_token_id
        self.stop_ids = self.explicit_stops or ([] if eos is None else [eos])
        self.added = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if str(token)}
        self.special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.token_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.tools: list[Any] | None = None
        try:
            if not self._text([_USER]) and self._text([_USER], [_TOOL]):
                self.tools = [_TOOL]  # a template for conversations with tools only
            bare, prompted = (template.render([_USER], self.tools, generation) for generation in (False, True))
        except RefusedError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template fails on one user message: {error}"
            ) from None
        self.generation_prompt = prompted[self._shared(prompted, bare) :]
        self.arguments: Literal["object", "string"] = "object"
        self.call_content: Literal["absent", "empty"] = "absent"
        self._try_calls()
        self.tags, self.tags_from, self.spacing = self._find_tags(tags)

    def findings(self) -> Findings:
        answer_stop = self._stop(calls=False, answer=None)
        call_stop = self._stop(calls=True, answer=answer_stop)
        answers_read, calls_read = self._read(calls=False), self._read(calls=True)
        own = self._own(self._answer())
        bos, bos_on_encode = self._bos()
        field = next((s for s in (*answers_read, *calls_read) if s != INLINE), THINKING_FIELDS[0])
        return Findings(
            generation_prompt=self.generation_prompt,
            prompt_ends=self._state(),
            tags=self.tags,
            tags_from=self.tags_from,
            spacing=self.spacing,
            answers_read=answers_read,
            calls_read=calls_read,
            fields=self._fields(),
            history=self._history(field),
            history_inline=self._history(INLINE),
            switches=tuple(self._switches(answers_read, field)),
            answer_opening=own[: own.find(_SAY)].lstrip() if _SAY in own else "",
            response_opening=self._response_opening(answers_read),
            answer_stop=answer_stop,
            call_stop=call_stop,
            after_stop=_after(own, answer_stop.text) if answer_stop else "",
            history_end=self._history_end(answer_stop),
            bos=bos,
            bos_on_encode=bos_on_encode,
            dated=self._dated(),
            whitespace=self._whitespace(),
            close_tag_in_response=self._close_tag(),
            tools=self._survives("sentinel_schema", [_USER], [_TOOL]),
            calls=self._survives((_NAME, _VALUE), [_USER, self._calls()]),
            arguments=self.arguments,
            call_content=self.call_content,
            string_arguments=self._string_arguments(),
            parallel_calls=self._survives(
                (_VALUE, "another value"), [_USER, self._calls(values=(_VALUE, "another value"))]
            ),
            results=self._survives(_RESULT, [_USER, self._calls(), self._result()]),
            text_beside_calls=self._survives(_SAY, [_USER, self._calls(content=_SAY)]),
            text_beside_calls_with_thinking=self._survives(
                _SAY, [_USER, self._spelled(self._calls(content=_SAY), next(iter(calls_read), None))]
            ),
            system=self._survives("Sentinel rule.", [{"role": "system", "content": "Sentinel rule."}, _USER]),
            developer=self._survives("Sentinel rule.", [{"role": "developer", "content": "Sentinel rule."}, _USER]),
            assistant_first=self._survives(_SAY, [self._answer(), _USER]),
            consecutive_users=self._survives((_ASK, "And more."), [_USER, {"role": "user", "content": "And more."}]),
            consecutive_assistants=self._survives(
                ("Said first.", _SAY), [_USER, {"role": "assistant", "content": "Said first."}, self._answer()]
            ),
        )

    # --- sentinel messages ----------------------------------------------------------------------------------------

    def _answer(self) -> dict[str, Any]:
        return {"role": "assistant", "content": _SAY}

    def _try_calls(self) -> None:
        """The first way to write a tool call that the template takes: some want text, or fail without content."""

        def taken(way: tuple[str, str | None]) -> tuple[bool, bool, bool]:
            calls = self._calls(style=way[0], content=way[1])
            own = self._text([_USER, calls])
            return _VALUE in own, bool(own), bool(self._text([_USER, calls, self._result()], generation=True))

        style, content = max(itertools.product(("object", "string"), (None, "")), key=taken)
        self.arguments = "object" if style == "object" else "string"
        self.call_content = "absent" if content is None else "empty"

    def _calls(
        self, values: Sequence[str] = (_VALUE,), content: str | None = None, style: str | None = None
    ) -> dict[str, Any]:
        calls = []
        for number, value in enumerate(values):
            arguments: Any = {_KEY: value}
            if (style or self.arguments) == "string":
                arguments = f'{{"{_KEY}": "{value}"}}'
            function = {"name": _NAME, "arguments": arguments}
            calls.append({"id": f"sentinel{number}", "type": "function", "function": function})
        if content is None and self.call_content == "empty":
            content = ""
        return {"role": "assistant", "tool_calls": calls} | ({"content": content} if content is not None else {})

    def _result(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": "sentinel0", "name": _NAME, "content": _RESULT}

    def _spelled(self, message: Mapping[str, Any], spelling: str | None) -> dict[str, Any]:
        return spell(message, _THINK, message.get("content") or "", spelling, self.tags)

    # --- rendering ------------------------------------------------------------------------------------------------

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation: bool = False,
        template: Template | None = None,
    ) -> str:
        """The rendering, or nothing where the template refuses."""
        try:
            return (template or self.template).render(messages, tools or self.tools, generation)
        except RefusedError:
            return ""

    def _survives(
        self, wanted: str | tuple[str, ...], messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> Survival:
        text = self._text(messages, tools)
        if not text:
            return "refused"
        return "rendered" if all(w in text for w in ([wanted] if isinstance(wanted, str) else wanted)) else "lost"

    def _own(self, message: Mapping[str, Any]) -> str:
        """What follows the user message in the rendering of a first turn, the generation prompt left out."""
        full, prompt = self._text([_USER, message]), self._text([_USER], generation=True)
        return full[self._shared(full, split_prompt(prompt, self.tags)[0]) :]

    # --- thinking -------------------------------------------------------------------------------------------------

    def _find_tags(
        self, given: Tags | None
    ) -> tuple[Tags | None, Literal["recipe", "rendering", "template", "tokenizer"] | None, tuple[str, str, str]]:
        """What surrounds thinking: as the recipe says, as it is rendered, or as the template or the tokens spell it."""
        frame = self._frame()
        written, added = _tag_pairs(self.template.text), _tag_pairs(" ".join(self.added))
        if given is not None:
            return given, "recipe", _spacing(*frame, given) if frame else self._spacing_of_prompt(given)
        if frame is not None:
            pair = next((p for p in [*written, *added] if p[0] in frame[0] and p[1] in frame[1]), None)
            pair = pair or (self._opening(frame[0]), self._closing(frame[1]))
            if all(pair):
                return pair, "rendering", _spacing(*frame, pair)
        if written:
            return written[0], "template", self._spacing_of_prompt(written[0])
        if added:
            return added[0], "tokenizer", self._spacing_of_prompt(added[0])
        return None, None, ("\n", "\n", "\n\n")

    def _frame(self) -> tuple[str, str] | None:
        """What stands before and after a turn's own thinking where the template renders it from a field."""
        bare = self._text([_USER])
        for message, own in ((self._answer(), _SAY), (self._calls(), _NAME)):
            for spelling in (*THINKING_FIELDS, PARTS):
                full = self._text([_USER, spell(message, _THINK, message.get("content") or "", spelling, None)])
                at = -1 if spelling == PARTS and _PART.search(full) else full.find(_THINK)
                if at >= 0 and own in full[at:]:
                    after = full[at + len(_THINK) : full.index(own, at)]
                    if after.strip():
                        return full[self._shared(full, bare) : at], after
        return None

    def _opening(self, before: str) -> str:
        """What opens the thinking, the turn's header left out."""
        bare, full = self._text([_USER]), self._text([_USER, self._answer()])
        plain, prompt = full[self._shared(full, bare) :], self.generation_prompt
        header = prompt[: self._shared(prompt, plain)]
        if before.startswith(header):
            rest = before[len(header) :].strip() or prompt.removeprefix(before).strip()  # or the prompt alone opens it
            if rest:
                return rest
        match = _LAST_TAG.search(before.rstrip())
        return match.group() if match else before.strip()

    def _closing(self, after: str) -> str:
        match = self.token_pattern.match(after.strip())
        return match.group() if match else after.strip()

    def _shared(self, one: str, other: str) -> int:
        """Length of what two texts begin with, whole added tokens only."""
        pairs = zip(one, other, strict=False)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
        for match in self.token_pattern.finditer(one):
            if match.start() < length < match.end():
                return match.start()
        return length

    def _spacing_of_prompt(self, tags: Tags) -> tuple[str, str, str]:
        """As the template spaces the opening tag in a generation prompt, or an empty block; else a line each."""
        for template in (self.template, *self._variants()):
            prompt = self._text([_USER], generation=True, template=template)
            _, lead, state = split_prompt(prompt, tags)
            if state == "opens thinking":
                space = lead[len(tags[0]) :]
                return space, space, space * 2
        empty = re.escape(tags[0]) + r"(\s*)" + re.escape(tags[1]) + r"(\s*)"
        if match := re.search(empty, self._text([_USER, self._answer()])):
            space = match.group(1)[:1]
            return space, space, match.group(2)
        return "\n", "\n", "\n\n"

    def _state(self, template: Template | None = None) -> State:
        return split_prompt(self._text([_USER], generation=True, template=template), self.tags)[2]

    def _read(self, calls: bool, template: Template | None = None) -> tuple[str, ...]:
        message, own = (self._calls(), _NAME) if calls else (self._answer(), _SAY)
        prompt = self._text([_USER], generation=True, template=template)
        head, lead, state = split_prompt(prompt, self.tags)
        read = []
        for spelling in SPELLINGS:
            full = self._text([_USER, self._spelled(message, spelling)], template=template)
            if spelling == PARTS and _PART.search(full):
                continue
            rest = full.removeprefix(head)
            ways = rendered(rest, lead, state, self.tags) if state != "closes thinking" else [rest]
            opening = lead if state == "opens thinking" else ""
            after = [after_thinking(opening + way, _THINK, self.tags) or "" for way in ways]
            if full.startswith(head) and any(own in text for text in after):
                read.append(spelling)
        return tuple(read)

    def _fields(self) -> tuple[str, ...]:
        """transformers copies one field into others, so the others are given as empty."""
        empty = dict.fromkeys(THINKING_FIELDS, "")
        messages = [self._answer(), self._calls()]
        fields = [
            key
            for key in THINKING_FIELDS
            if any(_THINK in self._text([_USER, {**m, **empty, key: _THINK}]) for m in messages)
        ]
        in_parts = [self._text([_USER, self._spelled(m, PARTS)]) for m in messages]
        if any(_THINK in text and not _PART.search(text) for text in in_parts):
            fields.append(PARTS)
        return tuple(fields)

    def _history(self, spelling: str, template: Template | None = None) -> History:
        answer, calls = self._spelled(self._answer(), spelling), self._spelled(self._calls(), spelling)
        loop = [_USER, calls, self._result()]

        def kept(messages: Sequence[Mapping[str, Any]], generation: bool) -> bool:
            return _THINK in self._text(messages, generation=generation, template=template)

        if kept([_USER, answer, _USER], generation=True):
            return "always"
        if kept(loop, generation=True):
            return "since the last user message" if kept([*loop, self._answer()], False) else "until answered"
        return "only the final message" if kept([_USER, answer], False) or kept([_USER, calls], False) else "never"

    def _response_opening(self, read: tuple[str, ...]) -> str:
        text = self._text([_USER, self._spelled(self._answer(), next(iter(read), None))])
        between = text.partition(_THINK)[2].partition(_SAY)[0]
        return between.partition(self.tags[1])[2].strip() if self.tags else ""

    def _variants(self) -> Iterator[Template]:
        """The template with one argument changed."""
        for name, values in self.template.switches.items():
            for value in values:
                if value != self.template.arguments.get(name):
                    yield self.template.with_arguments(**{name: value})

    def _switches(self, answers_read: tuple[str, ...], field: str) -> Iterator[Switch]:
        state, history = self._state(), self._history(field)
        for template in self._variants():
            changed = {k: v for k, v in template.arguments.items() if self.template.arguments.get(k) != v}
            if not self._text([_USER, self._answer()], template=template):
                continue
            (name, value), effects = next(iter(changed.items())), []
            new_state = self._state(template)
            if new_state != state:
                effects.append({"opens thinking": OPENS, "closes thinking": CLOSES, "nothing": LEAVES}[new_state])
            if self._read(calls=False, template=template) and not answers_read:
                effects.append("renders a turn's own thinking")
            if (new_history := self._history(field, template)) != history and new_history != "never":
                effects.append(f"keeps thinking in history: {new_history}")
            if effects:
                yield Switch(name, value, tuple(effects))

    # --- the end of a turn ----------------------------------------------------------------------------------------

    def _stop(self, calls: bool, answer: Stop | None) -> Stop | None:
        """The first token after a turn's own words that inference stops at, else the one that closes the turn.

        Where a turn's rendering has none, the next message's first token may be one; else it is inference's own.
        """
        own, message, following = (_VALUE, self._calls(), self._result()) if calls else (_SAY, self._answer(), _USER)
        full = self._text([_USER, message])
        if own not in full:
            return None if calls else self._own_stop()
        tail = full[full.rindex(own) + len(own) :]
        found = list(self.token_pattern.finditer(tail))
        known = next((match.group() for match in found if self.added[match.group()] in self.stop_ids), None)
        if known is not None:
            return self._stop_at(known, "template")
        if calls:
            special = [match.group() for match in found if match.group() in self.special]
            # A generation config that does not know the answer's end says nothing about that of a call either.
            unknown = not self.explicit_stops or answer is None or not answer.stops_inference
            if special and (unknown or (answer is not None and special[-1] == answer.text)):
                return self._stop_at(special[-1], "template")
        elif found:
            run = found[0]
            for match in found[1:]:
                run = match if match.start() == run.end() else run
            return self._stop_at(run.group(), "template")
        later = self._text([_USER, message, following], generation=True)
        later = later[later.rindex(own) + len(own) :] if own in later else ""
        if later.startswith(tail):
            first = self.token_pattern.match(later[len(tail) :])
            if first and self.added[first.group()] in self.stop_ids:
                return self._stop_at(first.group(), "next message")
        return answer if calls and answer and answer.source == "template" else self._own_stop()

    def _stop_at(self, text: str, source: Literal["template", "next message"]) -> Stop:
        return Stop(text, self.added[text], source, self.added[text] in self.stop_ids)

    def _own_stop(self) -> Stop | None:
        if not self.stop_ids:
            return None
        source: Literal["generation config", "tokenizer"] = "generation config" if self.explicit_stops else "tokenizer"
        text = self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        return Stop(str(text), self.stop_ids[0], source, True)

    def _history_end(self, stop: Stop | None) -> str:
        """What ends the same answer once another message follows."""
        own = self._text([_USER, self._answer()])
        later = self._text([_USER, self._answer(), _USER], generation=True)
        if _SAY not in own or _SAY not in later:
            return ""
        own, later = own[own.rindex(_SAY) :], later[later.rindex(_SAY) :]
        if stop is None or later.startswith(own[: own.find(stop.text) + len(stop.text)]):
            return stop.text if stop else ""
        match = self.token_pattern.search(later)
        return match.group() if match else ""

    def _bos(self) -> tuple[Literal["template", "none", "twice"], bool]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return "none", False
        text = self._text([_USER], generation=True)
        plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        more = self.tokenizer(text)["input_ids"]
        count = plain[:2].count(bos)
        return ("none", "template", "twice")[count], more[: count + 1].count(bos) > count

    # --- the rest -------------------------------------------------------------------------------------------------

    def _dated(self) -> bool:
        later = self.template.on(self.template.day + timedelta(days=400))
        return self._text([_USER], template=later) != self._text([_USER])

    def _whitespace(self) -> Literal["kept", "newlines trimmed", "trimmed"]:
        def renders(text: str) -> bool:
            return text in self._text([_USER, {"role": "assistant", "content": text}])

        return "kept" if renders(f"\n  {_SAY}  \n") else "newlines trimmed" if renders(f"  {_SAY}  ") else "trimmed"

    def _close_tag(self) -> Survival:
        closed = self.tags[1] if self.tags else COMMON_TAGS[1]
        text = f"{_SAY} {closed} Sentinel end."
        return self._survives(text, [_USER, {"role": "assistant", "content": text}])

    def _string_arguments(self) -> Survival:
        text = self._text([_USER, self._calls(style="string")])
        if not text:
            return "refused"
        return "rendered" if _VALUE in text and f'\\"{_VALUE}' not in text else "lost"


def _tag_pairs(text: str) -> list[Tags]:
    """Pairs like <think> and </think>, or <|START_THINKING|> and <|END_THINKING|>, that the text spells."""
    found = list(dict.fromkeys(match.group() for match in TAG.finditer(text)))
    pairs = []
    for tag in found:
        closing = (tag[0] + "/" + tag[1:], re.sub("start|begin", "end", tag), re.sub("START|BEGIN", "END", tag))
        pairs += [(tag, other) for other in closing if other != tag and other in found][:1]
    return pairs


def _spacing(before: str, after: str, tags: Tags) -> tuple[str, str, str]:
    """White space after the opening tag, and before and after the closing one."""
    start = before.rpartition(tags[0])[2] if tags[0] in before else "\n"
    head, _, rest = after.partition(tags[1])
    return start, head, rest[: len(rest) - len(rest.lstrip())]


def _after(text: str, stop: str) -> str:
    return text.rpartition(stop)[2] if stop in text else ""
