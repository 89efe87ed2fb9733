"""The chat template is the truth about inference: each assistant message becomes one turn view, by rendering.

    prompt      render(messages before it, add_generation_prompt=True): what inference feeds
    completion  what the model must then generate, end-of-turn token included

Nothing is known about any model: the completion is what follows the prompt in the turn's own rendering. Where the
prompt is no prefix of it (a template that drops the loop's thinking once the answer is there), the turn's header is
found again by rendering the same history under a sentinel. Where a template never renders a turn's own thinking, the
completion is built from the think tags. Whatever the way, a completion must hold its own thinking, response and calls
and end in a stop token, or the turn is refused with the reason: a turn that cannot be rendered right is not trained.

Prompt and completion are encoded apart, as a server does, without special tokens: what the template writes is all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any

import jinja2

from mtr.conversation import THINKING_KEYS, Conversation, Message
from mtr.encoding import Encoder
from mtr.errors import UserError

_TAG = re.compile(r"([<\[])(/?)([\w:|]*(?:think|thought|reason)\w*)([>\]])", re.IGNORECASE)
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
_SENTINEL = "\ue000own text\ue001"


@dataclass(frozen=True)
class Turn:
    """One assistant message in its inference context. Ids are empty where rendering failed."""

    turn: int
    message_index: int
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    weight: float = 1.0
    reason: str | None = None
    """Why the turn is not trained; None when it is."""
    notes: tuple[str, ...] = ()
    """What the template dropped without making the turn wrong."""

    @property
    def trained(self) -> bool:
        return self.reason is None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class _RefusedError(Exception):
    """The turn cannot be rendered right; the text is the reason."""


@dataclass(frozen=True)
class Own:
    """What one assistant message must say."""

    message: Message
    thinking: str
    response: str


class Renderer:
    """Renders conversations with one tokenizer's template and one set of arguments."""

    def __init__(
        self,
        tokenizer: Any,
        template: dict[str, Any] | None = None,
        thinking: tuple[str, str] | None = None,
        date: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: of transformers, with a chat template.
            template: arguments for the chat template.
            thinking: the tags around thinking; found in the template and the added tokens if not given.
            date: YYYY-MM-DD, for templates that print one; today if not given.
            stop_ids: what the generation config stops at, best first.

        Raises:
            UserError: the tokenizer has no chat template, or it does not compile.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "put a chat_template.jinja beside it (the instruct variant of the model has one)"
            )
        self.tokenizer = tokenizer
        self._encode = Encoder(tokenizer)
        self.arguments = dict(template or {})
        self.day = Date.fromisoformat(date) if date else Date.today()
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(stop_ids)
        self._special_texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        eos = tokenizer.eos_token_id
        if eos is not None:
            self.special_ids.add(eos)
        self.stop_ids = list(stop_ids) or ([] if eos is None else [eos])
        """What ends a completion at inference, best first."""
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)
        try:
            probe = [{"role": "user", "content": "x"}]
            bare, prompted = self._render(probe), self._render(probe, generation=True)
        except _RefusedError as error:
            raise UserError(f"{tokenizer.name_or_path}: the chat template fails on one user message: {error}") from None
        self.generation_prompt = prompted.removeprefix(bare) if prompted.startswith(bare) else ""
        self.tags = thinking or self._find_tags()

    def render(self, conversation: Conversation) -> list[Turn]:
        """One Turn per assistant message, in order; those that are not trained say why."""
        drafts = [self._draft(conversation, index) for index in conversation.turns]
        texts = [text for draft in drafts if not isinstance(draft, str) for text in draft[:2]]
        encoded = iter(self._encode(texts))
        turns = []
        for number, (index, draft) in enumerate(zip(conversation.turns, drafts, strict=True)):
            weight = conversation.messages[index].weight
            if isinstance(draft, str):
                turns.append(Turn(number, index, weight=weight, reason=draft))
                continue
            prompt_ids, completion_ids = next(encoded), next(encoded)
            reason, notes = None, draft[2]
            try:
                completion_ids = self._end_at_stop(completion_ids)
            except _RefusedError as error:
                reason = str(error)
            if not prompt_ids:
                reason = reason or "the prompt is empty, so nothing predicts the first token"
            if weight == 0:
                reason = reason or "the message says so (weight 0)"
            turns.append(Turn(number, index, tuple(prompt_ids), tuple(completion_ids), weight, reason, notes))
        return turns

    def prompt(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Token ids that inference is fed after these messages."""
        return self._encode([self._render(list(messages), tools, generation=True)])[0]

    def split(self, completion_ids: list[int]) -> tuple[str, str]:
        """Thinking and response of a generated completion, without special tokens."""
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=False)
        thinking, close, response = text.partition(self.tags[1]) if self.tags else ("", "", text)
        if not close:
            thinking, response = "", text
        if self.tags:
            thinking = thinking.replace(self.tags[0], "")
        for token in self._special_texts:
            thinking, response = thinking.replace(token, ""), response.replace(token, "")
        return thinking.strip(), response.strip()

    # --- rendering ------------------------------------------------------------------------------------------------

    def _draft(self, conversation: Conversation, index: int) -> tuple[str, str, tuple[str, ...]] | str:
        """Prompt text, completion text and notes of one turn, or the reason why there are none."""
        if index == 0:
            return "no message comes before it, so inference never generates it"
        history = [dict(message.data) for message in conversation.messages[:index]]
        try:
            prompt = self._render(history, conversation.tools, generation=True)
            own = self.own(conversation.messages[index])
            return prompt, *self._completion(history, own, conversation.tools, prompt)
        except _RefusedError as error:
            return str(error)

    def _render(self, messages: list[dict[str, Any]], tools: Any = None, generation: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._dated(self.tokenizer.get_chat_template(tools=tools)),
                add_generation_prompt=generation,
                tokenize=False,
                **self.arguments,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise _RefusedError(f"the chat template refuses it: {' '.join(str(error).split())}") from None
        assert isinstance(text, str)
        return text

    def _dated(self, template: str) -> str:
        """The template with today's date held fixed, so that a run that spans midnight renders one date."""
        return _DATE.sub(lambda call: repr(self.day.strftime(call["format"])), template)

    def own(self, message: Message) -> Own:
        """Thinking and response, whether the thinking has a field of its own or stands inline."""
        thinking, content = message.thinking, message.content
        if thinking is None and self.tags and content.lstrip().startswith(self.tags[0]):
            inside, close, after = content.lstrip()[len(self.tags[0]) :].partition(self.tags[1])
            if close:
                return Own(message, inside.strip(), after.strip())
        return Own(message, (thinking or "").strip(), content.strip())

    def _completion(
        self, history: list[dict[str, Any]], own: Own, tools: Any, prompt: str
    ) -> tuple[str, tuple[str, ...]]:
        """The first spelling of the turn's own message that survives rendering, else a built completion."""
        if own.thinking and self._state(prompt) == "closed":
            raise _RefusedError(
                "it has thinking, but the generation prompt closes the thinking before it starts; "
                "open it with the template's switch, e.g. template: {enable_thinking: true} or {thinking: true}"
            )
        problem = ""
        for spelling in self._spellings(own):
            try:
                completion = self._following(history, spelling, tools, prompt)
            except _RefusedError as error:
                problem = problem or str(error)
                continue
            missing = _missing(completion, own, own.thinking)
            if not missing:
                return completion, self._notes(completion, own)
            problem = problem or missing
        if own.thinking and "thinking" in problem:
            return self._built(history, own, tools, prompt)
        raise _RefusedError(problem)

    def _spellings(self, own: Own) -> list[dict[str, Any]]:
        """As the data spells it; then the thinking in each field templates read, and inline."""
        as_data = dict(own.message.data)
        if not own.thinking:
            return [as_data]
        bare = {key: value for key, value in as_data.items() if key not in THINKING_KEYS}
        bare["content"] = own.response
        spellings = [as_data] + [{**bare, key: own.thinking} for key in THINKING_KEYS]
        if self.tags:
            opened, closed = self.tags
            spellings.append({**bare, "content": f"{opened}\n{own.thinking}\n{closed}\n\n{own.response}"})
        return spellings

    def _following(self, history: list[dict[str, Any]], message: dict[str, Any], tools: Any, prompt: str) -> str:
        """What comes after the prompt in the rendering of the turn itself."""
        full = self._render([*history, message], tools)
        if full.startswith(prompt):
            return full[len(prompt) :]
        header_end = self._header_end(history, message, tools, full)
        following = full[header_end:]
        state, opened = self._state(prompt), self.tags[0] if self.tags else ""
        if state == "open":
            # The prompt has opened the thinking: the completion starts inside it.
            if following.lstrip().startswith(opened):
                after = following.lstrip()[len(opened) :]
                tail = prompt[prompt.rindex(opened) + len(opened) :]
                return after.removeprefix(tail)
            assert self.tags is not None
            return f"\n{self.tags[1]}\n\n{following}"
        if state == "closed":
            assert self.tags is not None
            head, close, after = following.partition(self.tags[1])
            if close and not head.replace(opened, "").strip():
                return after.lstrip("\n")
        return following

    def _header_end(self, history: list[dict[str, Any]], message: dict[str, Any], tools: Any, full: str) -> int:
        """Where the turn's own header ends in its rendering, though the history before it reads differently."""
        header = self.generation_prompt
        if self.tags and self.tags[0] in header:
            header = header[: header.index(self.tags[0])]
        marked = self._render([*history, _marked(message)], tools)
        own_text = marked.find(_SENTINEL)
        start = marked.rfind(header, 0, own_text) if header and own_text >= 0 else -1
        if start < 0 or not full.startswith(marked[: start + len(header)]):
            raise _RefusedError(
                "the generation prompt is not part of the turn's own rendering, so inference never sees it"
            )
        return start + len(header)

    def _built(self, history: list[dict[str, Any]], own: Own, tools: Any, prompt: str) -> tuple[str, tuple[str, ...]]:
        """For templates that never render a turn's own thinking: prompt + thinking + close tag + response + stop."""
        if self.tags is None:
            raise _RefusedError(
                "the template never renders its thinking and no think tags were found; "
                "name them in the recipe, thinking: {open: <think>, close: </think>}"
            )
        opened, closed = self.tags
        bare = {key: value for key, value in own.message.data.items() if key not in THINKING_KEYS}
        bare["content"] = own.response
        rest = self._following(history, bare, tools, prompt)
        if missing := _missing(rest, own, ""):
            raise _RefusedError(missing)
        head, close, after = rest.partition(closed)
        if close and not head.replace(opened, "").strip():  # the template's own empty thinking
            rest = after.lstrip("\n")
        start = "" if self._state(prompt) == "open" else f"{opened}\n"
        completion = f"{start}{own.thinking}\n{closed}\n\n{rest}"
        return completion, self._notes(completion, own)

    def _state(self, prompt: str) -> str:
        """Whether the prompt's last words open the thinking, close it, or say nothing of it."""
        if self.tags is None:
            return "none"
        opened, closed = self.tags
        if prompt.rstrip().endswith(opened):
            return "open"
        return "closed" if prompt.rstrip().endswith(closed) else "none"

    def _find_tags(self) -> tuple[str, str] | None:
        """The think tags that the template or the added tokens hold, as a pair."""
        added = " ".join(str(token) for token in self.tokenizer.added_tokens_decoder.values())
        template = self.tokenizer.chat_template
        for text in (str(template), added):
            found = {match.group(0): match for match in _TAG.finditer(text)}
            for tag, match in found.items():
                opening, slash, name, closing = match.groups()
                if not slash and f"{opening}/{name}{closing}" in found:
                    return tag, f"{opening}/{name}{closing}"
        return None

    def _notes(self, completion: str, own: Own) -> tuple[str, ...]:
        if own.message.tool_calls and own.response and own.response not in completion:
            return ("the template drops the text beside its tool calls",)
        return ()

    # --- the end of the turn --------------------------------------------------------------------------------------

    def _end_at_stop(self, ids: list[int]) -> list[int]:
        """Cut after the stop token the template wrote, or add the model's own where it wrote none."""
        end = len(ids)
        while end and ids[end - 1] not in self.special_ids:
            if self.tokenizer.decode(ids[end - 1]).strip():
                break
            end -= 1
        if end and ids[end - 1] in self.special_ids:
            return ids[:end]
        if not self.stop_ids:
            raise _RefusedError("neither the template, the generation config nor the tokenizer says what ends a turn")
        return [*ids[:end], self.stop_ids[0]]


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with every text of its own replaced by a sentinel."""
    marked = dict(message)
    for key in ("content", *THINKING_KEYS):
        if marked.get(key):
            marked[key] = _SENTINEL
    calls = []
    for call in marked.get("tool_calls") or []:
        function = {**call.get("function", call), "name": _SENTINEL}
        calls.append({**call, "function": function} if "function" in call else function)
    if calls:
        marked["tool_calls"] = calls
    return marked


def _missing(completion: str, own: Own, thinking: str) -> str:
    """What the completion lost of its own message, or nothing."""
    if thinking and thinking not in completion:
        return "the template does not render its thinking"
    after = completion[completion.index(thinking) + len(thinking) :] if thinking else completion
    calls = own.message.tool_calls
    for call in calls:
        name = call.get("function", call)["name"]
        wanted = sum(other.get("function", other)["name"] == name for other in calls)
        if after.count(name) < wanted:
            return "the template drops a parallel tool call" if len(calls) > 1 else "the template drops its tool call"
    if not calls and own.response not in after:
        return "the template does not render its response whole"
    return ""
