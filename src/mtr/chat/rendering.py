"""The chat template decides what inference sees: each assistant message becomes one turn, by rendering.

    prompt      render(messages before it, add_generation_prompt=True): what inference is fed
    completion  what the model must then generate, end-of-turn token included

Nothing is known about any model: `mtr.chat.trials` finds out what the template does, `mtr.chat.draft` makes prompt and
completion with it. Both are encoded separately, as a server does, and without special tokens: all tokens come from the
template's own text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import partial
from typing import Any, Literal

from mtr.chat.comparison import Comparison
from mtr.chat.draft import Draft, Drafter
from mtr.chat.encoding import Encoder
from mtr.chat.expected import Expected
from mtr.chat.findings import Findings, Tags
from mtr.chat.history import Before, History
from mtr.chat.spelling import Speller
from mtr.chat.template import RefusedError, Template
from mtr.chat.turn import NOT_GENERATED, NOT_LAST, WEIGHT_ZERO, Turn
from mtr.data.conversation import Conversation, Message


class Renderer:
    """Renders conversations with one tokenizer's template and one set of arguments."""

    def __init__(
        self,
        template: Template,
        findings: Findings,
        stop_ids: Sequence[int] = (),
        history: Literal["as_data", "respell"] = "as_data",
        train_on: Literal["all", "last"] = "all",
        rendering: Literal["auto", "whole"] = "auto",
    ) -> None:
        """
        Args:
            findings: about this template.
            stop_ids: what the generation config stops at, best first.
            history: whether thinking of earlier turns is given to the template as the data spells it, or as the
                template reads it.
            train_on: every turn, or each conversation's last one.
            rendering: "auto" renders long conversations in pieces; "whole" renders every prompt in full.
        """
        self.tokenizer = tokenizer = template.tokenizer
        self.template = template
        self.findings = findings
        self._encode = Encoder(tokenizer)
        self._comparison = Comparison(in_pieces=rendering == "auto" and train_on == "all")
        self._last_only = train_on == "last"
        eos = tokenizer.eos_token_id
        inference = list(stop_ids) or ([] if eos is None else [eos])
        found = [stop for stop in (self.findings.answer_stop, self.findings.call_stop) if stop is not None]
        self.stop_ids = list(dict.fromkeys([*(stop.id for stop in found), *inference]))
        """What ends a completion, best first."""
        self._stops = {str(tokenizer.convert_ids_to_tokens(i)): i for i in self.stop_ids}
        self._speller = Speller(self.findings, respell=history == "respell")
        self._drafter = Drafter(self.findings, self._speller, self._stops, inference)
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)

    @property
    def day(self) -> Date:
        return self.template.day

    @property
    def tags(self) -> Tags | None:
        return self.findings.tags

    def render(self, conversation: Conversation) -> list[Turn]:
        """One Turn per assistant message, in order; one that is not trained gives the reason.

        Raises:
            UserError: rendering in pieces turned out to be wrong for turns that are already used.
        """
        draft_of = partial(self._draft, conversation)
        drafts = self._comparison.drafts(conversation, self._history(conversation), draft_of)
        texts = [text for draft in drafts if isinstance(draft, Draft) for text in (draft.prompt, draft.completion)]
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
        """Numbers of the turns that differ between rendering in pieces and rendering in full."""
        draft_of = partial(self._draft, conversation)
        return self._comparison.differing(conversation, self._history(conversation), draft_of)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Token ids that inference is fed after these messages."""
        history = [self._speller.in_history(Message(message)) for message in messages]
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
        for token in (*self.template.special_texts, *self._stops):
            thinking, response = thinking.replace(token, ""), response.replace(token, "")
        return thinking.strip(), response.strip()

    def own(self, message: Message) -> Expected:
        """Thinking and response of an assistant message, whether the thinking has a field of its own or is inline."""
        return self._speller.expected(message)

    def _history(self, conversation: Conversation) -> History:
        messages = [self._speller.in_history(message) for message in conversation.messages]
        return History(self.template, messages, conversation.tools)

    def _draft(self, conversation: Conversation, before: Before) -> Draft | str:
        """One turn as text, or the reason why there is none."""
        if before.count == 0:
            return NOT_GENERATED
        if self._last_only and before.count != conversation.turns[-1]:
            return NOT_LAST
        if conversation.messages[before.count].weight == 0:
            return WEIGHT_ZERO
        try:
            return self._drafter.draft(conversation, before)
        except RefusedError as error:
            return str(error)
