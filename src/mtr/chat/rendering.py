"""The chat template is the truth about inference: each assistant message becomes one turn view, by rendering.

    prompt      render(messages before it, add_generation_prompt=True): what inference feeds
    completion  what the model must then generate, end-of-turn token included

Nothing is known about any model: `mtr.chat.trials` has tried the template out. The completion is what follows the
prompt in the turn's own rendering, its thinking in the spelling that the template reads; where the template leaves the
thinking out, it is put together from the tags. Whatever the way, the completion is read back as inference reads it,
and must hold the turn's own thinking, response and calls before the first stop token, or the turn is refused with the
reason: a turn that cannot be rendered right is not trained.

Prompt and completion are encoded apart, as a server does, without special tokens: what the template writes is all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from functools import partial
from typing import Any, Literal

from mtr.chat.comparison import Comparison
from mtr.chat.completion import INLINE, PARTS, Tags, after_thinking, built, rendered, spell, split_inline, split_prompt
from mtr.chat.encoding import Encoder
from mtr.chat.expected import Own, _unsaid
from mtr.chat.history import Before, History
from mtr.chat.spelling import _SENTINEL, _marked, _with_text_arguments
from mtr.chat.template import RefusedError, Template
from mtr.chat.trials import find
from mtr.chat.turn import INLINE_HISTORY, NOT_GENERATED, NOT_LAST, WEIGHT_ZERO, Turn
from mtr.data.conversation import THINKING_KEYS, Conversation, Message


@dataclass(frozen=True)
class _Draft:
    prompt: str
    completion: str
    stop: int
    """The end-of-turn token's id."""
    notes: tuple[str, ...]


class Renderer:
    """Renders conversations with one tokenizer's template and one set of arguments."""

    def __init__(
        self,
        tokenizer: Any,
        template: dict[str, Any] | None = None,
        thinking: Tags | None = None,
        date: str | None = None,
        stop_ids: Sequence[int] = (),
        history: Literal["as_data", "respell"] = "as_data",
        train_on: Literal["all", "last"] = "all",
        rendering: Literal["auto", "whole"] = "auto",
    ) -> None:
        """
        Args:
            tokenizer: of transformers, with a chat template.
            template: arguments for the chat template.
            thinking: the tags around thinking; found in the template and the added tokens if not given.
            date: YYYY-MM-DD, for templates that print one; today if not given.
            stop_ids: what the generation config stops at, best first.
            history: thinking of earlier turns is given to the template as the data spells it, or as the template
                reads it.
            train_on: every turn, or each conversation's last one.
            rendering: long conversations are put together from pieces, or all are rendered whole.

        Raises:
            UserError: the tokenizer has no chat template, or it fails on a single user message.
        """
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, template, Date.fromisoformat(date) if date else None)
        self.findings = find(self.template, stop_ids, thinking)
        self._encode = Encoder(tokenizer)
        self._comparison = Comparison(in_pieces=rendering == "auto" and train_on == "all")
        self._respell = history == "respell"
        self._last_only = train_on == "last"
        eos = tokenizer.eos_token_id
        inference = list(stop_ids) or ([] if eos is None else [eos])
        stops = [stop for stop in (self.findings.answer_stop, self.findings.call_stop) if stop is not None]
        self.stop_ids = list(dict.fromkeys([*(stop.id for stop in stops), *inference]))
        """What ends a completion, best first."""
        self._ends = {str(tokenizer.convert_ids_to_tokens(i)): i for i in self.stop_ids}
        self._inference_stops = set(inference)
        self._stop_pattern = re.compile("|".join(map(re.escape, sorted(self._ends, key=len, reverse=True))) or r"(?!)")
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)

    @property
    def day(self) -> Date:
        return self.template.day

    @property
    def tags(self) -> Tags | None:
        return self.findings.tags

    def render(self, conversation: Conversation) -> list[Turn]:
        """One Turn per assistant message, in order; those that are not trained say why."""
        draft_of = partial(self._draft, conversation)
        drafts = self._comparison.drafts(conversation, self._whole(conversation), draft_of)
        texts = [text for draft in drafts if isinstance(draft, _Draft) for text in (draft.prompt, draft.completion)]
        encoded = iter(self._encode(texts))
        turns = []
        for number, (index, draft) in enumerate(zip(conversation.turns, drafts, strict=True)):
            weight = conversation.messages[index].weight
            if isinstance(draft, str):
                turns.append(Turn(number, index, weight=weight, reason=draft))
                continue
            prompt_ids, completion_ids = next(encoded), next(encoded)
            reason = None
            if not prompt_ids:
                reason = "the prompt is empty, so nothing predicts the first token"
            elif completion_ids[-1:] != [draft.stop]:
                reason = "its end-of-turn token does not survive encoding"
            turns.append(Turn(number, index, tuple(prompt_ids), tuple(completion_ids), weight, reason, draft.notes))
        return turns

    def differing(self, conversation: Conversation) -> list[int]:
        """Numbers of the turns that are not the same when they are put together from pieces and when rendered whole."""
        draft_of = partial(self._draft, conversation)
        return self._comparison.differing(conversation, self._whole(conversation), draft_of)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Token ids that inference is fed after these messages."""
        history = [self._as_history(Message(message)) for message in messages]
        return self._encode([self.template.render(history, tools, generation=True)])[0]

    def split(self, completion_ids: list[int]) -> tuple[str, str]:
        """Thinking and response of a generated completion, without special tokens."""
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=False)
        thinking, close, response = text.partition(self.tags[1]) if self.tags else ("", "", text)
        if not close:
            thinking, response = "", text
        if self.tags:
            thinking = thinking.replace(self.tags[0], "")
        response = response.strip()
        for opening in (self.findings.response_opening, self.findings.answer_opening):
            response = response.removeprefix(opening.strip())
        for token in (*self.template.special_texts, *self._ends):
            thinking, response = thinking.replace(token, ""), response.replace(token, "")
        return thinking.strip(), response.strip()

    def own(self, message: Message) -> Own:
        """Thinking and response, whether the thinking has a field of its own or stands inline."""
        field = next((key for key in THINKING_KEYS if message.data.get(key) is not None), None)
        spelling = PARTS if message.in_parts else field
        thinking, content = (message.thinking or "").strip(), message.content.strip()
        inline = split_inline(content, self.tags)
        if inline is not None and (not thinking or inline[0] == thinking):
            return Own(message, *inline, INLINE)
        return Own(message, thinking, content, spelling if thinking else None)

    # --- rendering ------------------------------------------------------------------------------------------------

    def _whole(self, conversation: Conversation) -> History:
        return History(self.template, [self._as_history(m) for m in conversation.messages], conversation.tools)

    def _draft(self, conversation: Conversation, before: Before) -> _Draft | str:
        """One turn as text, or the reason why there is none."""
        index = before.count
        message = conversation.messages[index]
        if index == 0:
            return NOT_GENERATED
        if self._last_only and index != conversation.turns[-1]:
            return NOT_LAST
        if message.weight == 0:
            return WEIGHT_ZERO
        try:
            prompt, own = before.prompt(), self.own(message)
            opening, completion = self._completion(before, own, prompt)
            completion, stop = self._ended(opening, completion, own)
        except RefusedError as error:
            return str(error)
        return _Draft(prompt, completion, stop, tuple(self._notes(conversation, index, own, completion)))

    def _as_history(self, message: Message) -> dict[str, Any]:
        """A message as the template is given it when it is not the turn's own."""
        if self._respell and message.role == "assistant":
            own = self.own(message)
            if own.thinking:
                read = self.findings.read(bool(message.tool_calls))
                return self._given(
                    spell(message.data, own.thinking, own.response, (*read, THINKING_KEYS[0])[0], self.tags)
                )
        return self._given(message.data)

    def _given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its parts and its tool calls in the spelling that the template takes."""
        given, said = dict(message), Message(message)
        if said.in_parts and PARTS not in self.findings.read(bool(said.tool_calls)):
            given = spell(given, said.thinking or "", said.content, THINKING_KEYS[0], self.tags)
        if not given.get("tool_calls"):
            return given
        if self.findings.call_content == "empty":
            given.setdefault("content", "")
        if self.findings.arguments == "string":
            given["tool_calls"] = [_with_text_arguments(call) for call in given["tool_calls"]]
        return given

    def _completion(self, before: Before, own: Own, prompt: str) -> tuple[str, str]:
        """What the prompt has opened, and what follows it, text after the end of the turn included."""
        head, lead, state = split_prompt(prompt, self.tags)
        if own.thinking and state == "closes thinking":
            raise RefusedError(self._closed())
        if own.thinking and self.tags and any(tag in own.thinking for tag in self.tags):
            raise RefusedError(
                f"its thinking holds {' or '.join(self.tags)} itself, so inference would end it there; "
                "write the tag in another way"
            )
        if own.spelling != INLINE and own.thinking and split_inline(own.response, self.tags):
            raise RefusedError("it has two thinkings, one in a field and one in its content; leave one out")
        read = self.findings.read(bool(own.message.tool_calls))
        # White space is no thinking, whatever a template makes of it.
        message = {
            key: "" if key in THINKING_KEYS and not text.strip() else text for key, text in own.message.data.items()
        }
        if own.thinking and read and (own.spelling not in read or (own.spelling == INLINE and read[0] != INLINE)):
            message = spell(message, own.thinking, own.response, read[0], self.tags)
        opening = lead if state == "opens thinking" else ""
        ways: Iterator[str] = iter(())
        if read or not own.thinking:
            ways = rendered(self._rest(before, self._given(message), head), lead, state, self.tags)
        for way in ways:
            if not self._missing(opening + way, own):
                return opening, way
        bare = self._rest(before, self._given(spell(message, "", own.response, None, None)), head)
        if problem := _unsaid(bare, own):
            cut = self.tags is not None and self.tags[1] in own.response
            raise RefusedError(f"{problem}: it holds {self.tags[1]}" if cut and self.tags else problem)
        if own.thinking and self.tags is None:
            raise RefusedError(
                "the template never renders its thinking and no think tags were found; "
                "name them in the recipe, thinking: {open: <think>, close: </think>}"
            )
        if self.tags is not None and (own.thinking or opening):
            way = built(bare, own.thinking, state, self.tags, self.findings.spacing)
            if not self._missing(opening + way, own):
                return opening, way
        raise RefusedError("its thinking and response cannot be told apart in what the template renders")

    def _missing(self, text: str, own: Own) -> str:
        """What inference, reading this text, would not find of the turn; or nothing."""
        after = after_thinking(text, own.thinking, self.tags)
        if after is None and own.message.tool_calls and not own.thinking:
            after = after_thinking(text, own.response, self.tags)  # a template that has text beside calls as thinking
        return "the template does not render its thinking" if after is None else _unsaid(after, own)

    def _closed(self) -> str:
        openers = self.findings.openers
        way_out = f"open it with {' or '.join(openers)}" if openers else "no argument of the template opens it"
        return f"it has thinking, but the generation prompt closes the thinking before it starts; {way_out}"

    def _rest(self, before: Before, message: dict[str, Any], head: str) -> str:
        """What the template makes of the turn itself: all that comes after the head of the prompt."""
        full = before.then(message)
        if full.startswith(head):
            return full[len(head) :]
        # Under this turn the history reads differently (a loop's thinking goes once it is answered), so the turn is
        # found by its header: the last one before a sentinel in the place of its text.
        header = split_prompt(self.findings.generation_prompt, self.tags)[0]
        if not header or not head.endswith(header):  # without a header it comes right after the last message
            last = Message(before.last).content.strip()
            header = head[head.rindex(last) :] if last and last in head else ""
        marked = before.then(_marked(message))
        own_text = marked.find(_SENTINEL)
        start = marked.rfind(header, 0, own_text) if header and own_text >= 0 else -1
        end = start + len(header)
        if start < 0 or not full.startswith(marked[:end]):
            raise RefusedError(
                "the generation prompt is not part of the turn's own rendering, so inference never sees it"
            )
        return full[end:]

    def _ended(self, opening: str, completion: str, own: Own) -> tuple[str, int]:
        """The completion up to the first stop token by which all is said, and that token; it is added if there is none.

        Raises:
            RefusedError: inference stops before all is said.
        """
        for match in self._stop_pattern.finditer(completion):
            if not self._missing(opening + completion[: match.end()], own):
                return completion[: match.end()], self._ends[match.group()]
            if self._ends[match.group()] in self._inference_stops:
                raise RefusedError(f"inference stops at {match.group()} before all of it is said")
        stop = self.findings.stop(bool(own.message.tool_calls))
        if stop is None:
            raise RefusedError("neither the template, the generation config nor the tokenizer says what ends a turn")
        return (completion if stop.source == "next message" else completion.rstrip()) + stop.text, stop.id

    def _notes(self, conversation: Conversation, index: int, own: Own, completion: str) -> Iterator[str]:
        """What the template leaves out though the turn is right."""
        found, earlier = self.findings, conversation.messages[:index]
        if own.message.tool_calls and own.response:
            if own.response not in completion:
                yield "the template drops the text beside its tool calls"
            elif not own.thinking and after_thinking(completion, own.response, self.tags) is not None and self.tags:
                yield "the template writes the text beside its tool calls as thinking"
        if conversation.tools and found.tools == "lost":
            yield "the template leaves out the tool schemas"
        lost = (("system", found.system), ("developer", found.developer), ("tool", found.results))
        for role, survival in lost:
            if survival == "lost" and any(message.role == role for message in earlier):
                yield f"the template leaves out {role} messages"
        called = [len(message.tool_calls) for message in earlier]
        if found.calls == "lost" and any(called):
            yield "the template leaves out earlier tool calls"
        elif found.parallel_calls == "lost" and max(called, default=0) > 1:
            yield "the template leaves out earlier parallel tool calls"
        differs = found.history_inline != found.history and found.read(calls=False)[:1] != (INLINE,)
        if differs and not self._respell and any(self._is_inline(message) for message in earlier):
            yield INLINE_HISTORY

    def _is_inline(self, message: Message) -> bool:
        return message.role == "assistant" and self.own(message).spelling == INLINE
