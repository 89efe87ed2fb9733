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
from functools import cache, partial
from typing import Any, Literal

from mtr.chat.comparison import Comparison
from mtr.chat.draft import Draft, Drafter
from mtr.chat.encoding import Encoder, EncodingError
from mtr.chat.expected import Expected
from mtr.chat.findings import Findings, Tags
from mtr.chat.history import Before, History
from mtr.chat.limits import limits
from mtr.chat.reach import Fate, decided
from mtr.chat.reading import Reader
from mtr.chat.spelling import Speller
from mtr.chat.template import LimitError, RefusedError, Template
from mtr.chat.turn import NOT_GENERATED, NOT_LAST, WEIGHT_ZERO, Turn, fills, too_long
from mtr.data.conversation import Conversation, Message
from mtr.errors import UserError
from mtr.recipe.sections import SequenceSection


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
        self.reader = Reader(findings, (*template.special_texts, *self._stops))
        """Of what was generated."""
        self._speller = Speller(self.findings, respell=history == "respell")
        self._drafter = Drafter(self.findings, self._speller, self._stops, inference)
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)

    @property
    def day(self) -> Date:
        return self.template.day

    @property
    def tags(self) -> Tags | None:
        return self.findings.tags

    def render(self, conversation: Conversation, sequence: SequenceSection | None = None) -> list[Turn]:
        """One Turn per assistant message, in order; one that is not trained gives the reason.

        Args:
            sequence: what is too long, and what happens to it. A turn that is known to be too long before it is
                encoded has the reason and no ids. Without this, all turns are encoded, however long.

        Raises:
            UserError: rendering in pieces turned out to be wrong for turns that are already used, or a rendering takes
                too much time or memory.
        """
        drafts = self._drafts(conversation, sequence)
        texts = [text for draft in drafts if isinstance(draft, Draft) for text in (draft.prompt, draft.completion)]
        try:
            encoded = iter(self._encode(texts))
        except EncodingError as error:
            raise UserError(f"{conversation.where}: {error}") from None
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

    def differing(self, conversation: Conversation, sequence: SequenceSection | None = None) -> list[int]:
        """Numbers of the turns that differ between rendering in pieces and rendering in full.

        Args:
            sequence: as for `render`.
        """
        turns = conversation.turns[: len(conversation.turns) - len(self._decided(conversation, sequence))]
        draft_of = partial(self._draft, conversation, sequence=sequence)
        return self._comparison.differing(conversation, turns, self._history(conversation, turns), draft_of)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Token ids that inference is fed after these messages."""
        history = [self._speller.in_history(Message(message)) for message in messages]
        return self._encode([self.template.render(history, tools, generation=True)])[0]

    def split(self, completion_ids: list[int]) -> tuple[str, str]:
        """Thinking and response of a generated completion, without special tokens."""
        return self.reader.split(self.tokenizer.decode(completion_ids, skip_special_tokens=False))

    def expected(self, message: Message) -> Expected:
        """Thinking and response of an assistant message, whether the thinking has a field of its own or is inline."""
        return self._speller.expected(message)

    def _drafts(self, conversation: Conversation, sequence: SequenceSection | None) -> list[Draft | str]:
        """Every turn as text, or the reason why there is none."""
        decided = self._decided(conversation, sequence)
        turns = conversation.turns[: len(conversation.turns) - len(decided)]
        draft_of = partial(self._draft, conversation, sequence=sequence)
        with limits():
            drafts = self._comparison.drafts(conversation, turns, self._history(conversation, turns), draft_of)
        return [*drafts, *decided]

    def _decided(self, conversation: Conversation, sequence: SequenceSection | None) -> list[Draft | str]:
        """The last turns of a long conversation, where it is known without drafting each that they are not trained."""
        if sequence is None:
            return []
        wanted = [self._excluded(conversation, index) is None for index in conversation.turns]
        fates = decided(conversation, wanted, cache(partial(self._fate, conversation, sequence.max_length)))
        if not fates:
            return []
        turns, reason = conversation.turns[len(conversation.turns) - len(fates) :], _reason(sequence)
        found: list[Draft | str] = [
            self._excluded(conversation, index) or (fate if isinstance(fate, str) else reason)
            for index, fate in zip(turns, fates, strict=True)
        ]
        if sequence.overlong == "error":  # the first one ends the run, unless the template refuses it
            history = self._history(conversation, turns)
            for number, index in enumerate(turns):
                if found[number] == reason:
                    found[number] = self._draft(conversation, history.before(index), sequence)
                    if isinstance(found[number], Draft) or found[number] == reason:
                        break
        return found

    def _fate(self, conversation: Conversation, limit: int, index: int) -> Fate:
        if index == 0:
            return None
        try:
            text = self._history(conversation, [index]).render(index, None)
            ids = self._encode.beginning(text, limit + 1)
        except RefusedError as error:
            return str(error)
        except (LimitError, EncodingError) as error:
            raise _located(error, conversation, index) from None
        return tuple(ids) if len(ids) > limit else None

    def _history(self, conversation: Conversation, turns: Sequence[int] | None = None) -> History:
        """The messages of a conversation, up to the last of these turns."""
        messages = conversation.messages if turns is None else conversation.messages[: max(turns, default=0) + 1]
        return History(self.template, [self._speller.in_history(message) for message in messages], conversation.tools)

    def _excluded(self, conversation: Conversation, index: int) -> str | None:
        """Why the data or the recipe leaves out the turn of a message."""
        messages = conversation.messages
        if index == 0:
            return NOT_GENERATED
        if self._last_only and any(messages[i].role == "assistant" for i in range(index + 1, len(messages))):
            return NOT_LAST
        return WEIGHT_ZERO if messages[index].weight == 0 else None

    def _draft(
        self, conversation: Conversation, before: Before, sequence: SequenceSection | None = None
    ) -> Draft | str:
        """One turn as text, or the reason why there is none."""
        if reason := self._excluded(conversation, before.count):
            return reason
        try:
            prompt = before.prompt()
            if sequence is not None and sequence.overlong != "error" and self._exceeds(len(prompt), sequence):
                return _reason(sequence)
            draft = self._drafter.draft(conversation, before, prompt)
        except RefusedError as error:
            return str(error)
        except LimitError as error:
            raise _located(error, conversation, before.count) from None
        whole = sequence is not None and sequence.overlong != "truncate"
        if sequence and whole and self._exceeds(len(draft.prompt) + len(draft.completion), sequence):
            return _reason(sequence)
        return draft

    def _exceeds(self, characters: int, sequence: SequenceSection) -> bool:
        return self._encode.surely_more(characters, sequence.max_length)


def _reason(sequence: SequenceSection) -> str:
    """The reason of a turn whose prompt is too long."""
    return (fills if sequence.overlong == "truncate" else too_long)(sequence.max_length)


def _located(error: UserError, conversation: Conversation, index: int) -> UserError:
    return UserError(f"{conversation.where}, message {index}: {error}")
