"""What each token of a tree is for: prompt, tool result, thinking, response, or a response that is seen as history; and
the weight with which it is trained.

A token that is generated in one turn and seen by a later one, as with templates that keep all of the history, has the
role that it has where it is generated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtr.chat.completion import split_prompt
from mtr.chat.limits import limits
from mtr.chat.spelling import Speller
from mtr.chat.template import RefusedError
from mtr.chat.turn import Turn
from mtr.checks.inspection import Inspection
from mtr.checks.prompt_spans import OWN, PromptSpans, Span
from mtr.errors import UserError
from mtr.tree.layout import Floats, Ints, Layout, path_to

if TYPE_CHECKING:
    from mtr.prepare.builder import Builder

Role = Literal["system", "prompt", "tool", "thinking", "response", "copy"]
ROLES: tuple[Role, ...] = ("system", "prompt", "tool", "thinking", "response", "copy")
"""system: system and developer messages, tool schemas, what the template says of its own; prompt: user messages and the
headers of assistant messages, which inference is fed; tool: results; thinking and response: of a trained turn as
generated, tags with the thinking, tool calls and the end of the turn with the response; copy: an assistant message that
is context.
"""
SYSTEM, PROMPT, TOOL, THINKING, RESPONSE, COPY = range(len(ROLES))
_LEAD = 64
"""Tokens at the end of a prompt among which are those that open the thinking."""
_OF_MESSAGE = {"system": SYSTEM, "developer": SYSTEM, "user": PROMPT, "tool": TOOL, "assistant": COPY}


@dataclass(frozen=True)
class TokenRoles:
    """Of each of the T tokens of a layout."""

    role: NDArray[np.int8]
    """[T] index in ROLES."""
    weight: Floats
    """[T] with which the token is a target, over all turns; 0: it is context only."""
    message: Ints
    """[T] the message that it belongs to; -1: the template's own, or not known."""


def token_roles(inspection: Inspection, builder: Builder) -> list[TokenRoles]:
    """The roles of the tokens of each layout. Where those of a prompt cannot be found, they are `prompt`.

    Args:
        builder: the one that made the inspection.
    """
    finder = _Finder(inspection, builder)
    with limits():
        return [finder.roles(layout) for layout in inspection.layouts]


def describe_roles(roles: Sequence[TokenRoles]) -> list[Any]:
    """Runs of tokens of one role and one message, for JSON; of several trees, a list of each."""
    trees = [
        [
            {"start": start, "end": end, "role": ROLES[of.role[start]], "message": int(of.message[start])}
            for start, end in pairwise([*_starts(of.role, of.message), len(of.role)])
        ]
        for of in roles
    ]
    return trees[0] if len(trees) == 1 else trees


def _starts(*arrays: NDArray[Any]) -> list[int]:
    """Where one of the arrays, all as long, has another value than before."""
    changes = np.logical_or.reduce([np.diff(array, prepend=array[:1] - 1) != 0 for array in arrays])
    return [int(at) for at in np.flatnonzero(changes)]


@dataclass(frozen=True)
class TurnTokens:
    """One turn as inference sees it, token by token."""

    turn: Turn
    prompt_ids: Sequence[int]
    prompt_roles: NDArray[np.int8]
    completion_ids: Sequence[int]
    """Empty where the turn is not trained."""
    completion_roles: NDArray[np.int8]
    weight: float
    """Of each completion token in the loss."""
    refused: str = ""
    """Why there is no prompt."""


def turn_tokens(inspection: Inspection, builder: Builder, number: int) -> TurnTokens:
    """A turn with the roles of its tokens; of one that is not trained the prompt alone.

    Raises:
        UserError: the conversation has no turn of this number.
    """
    if not 0 <= number < len(inspection.turns):
        has = f"row {inspection.index} has {len(inspection.turns)} turns, counted from 0"
        raise UserError(f"--turn {number}: {has} ({inspection.conversation.where})")
    turn, conversation, refused = inspection.turns[number], inspection.conversation, ""
    finder = _Finder(inspection, builder)
    prompt = list(turn.prompt_ids)
    with limits():
        if not prompt and turn.message_index > 0:
            try:
                earlier = [message.data for message in conversation.messages[: turn.message_index]]
                prompt = builder.renderer.prompt(earlier, conversation.tools)
            except RefusedError as error:
                refused = str(error)
        roles, _ = finder.prompt(prompt, turn.message_index)
        completion = turn.completion_ids if turn.trained else ()
        generated = finder.completion(prompt, completion, turn.message_index)
    views = [view for layout in inspection.layouts for _, view in layout.leaves if view.turn == number]
    weight = float(views[0].weights[0]) if views else 0.0
    return TurnTokens(turn, prompt, roles, completion, generated, weight, refused)


class _Finder:
    def __init__(self, inspection: Inspection, builder: Builder) -> None:
        renderer = builder.renderer
        self._conversation = inspection.conversation
        self._turns = {turn.turn: turn for turn in inspection.turns}
        self._tokenizer = renderer.tokenizer
        self._tags = renderer.tags
        self._speller = Speller(renderer.findings, builder.recipe.thinking.history == "respell")
        self._spans = PromptSpans(renderer, self._conversation, self._speller)

    def roles(self, layout: Layout) -> TokenRoles:
        role = np.full(layout.num_tokens, -1, np.int8)
        message = np.full(layout.num_tokens, -1, np.int64)
        paths = [(path_to(layout, leaf), view) for leaf, view in layout.leaves]
        for path, view in paths:
            completion, of = path[len(view.prompt_ids) :], self._turns[view.turn].message_index
            role[completion] = self.completion(view.prompt_ids.tolist(), view.completion_ids.tolist(), of)
            message[completion] = of
        for path, view in sorted(paths, key=lambda pair: -len(pair[1].prompt_ids)):  # which cover most of the others
            prompt = path[: len(view.prompt_ids)]
            unknown = role[prompt] < 0
            if unknown.any():
                found, belongs = self.prompt(view.prompt_ids.tolist(), self._turns[view.turn].message_index)
                role[prompt[unknown]], message[prompt[unknown]] = found[unknown], belongs[unknown]
        return TokenRoles(role, target_weights(layout), message)

    def completion(self, prompt: Sequence[int], completion: Sequence[int], message: int) -> NDArray[np.int8]:
        """The role of each token that a turn generates: first the thinking, with its tags and the white space after it.

        Args:
            message: index of the turn's own message.
        """
        roles = np.full(len(completion), RESPONSE, np.int8)
        roles[: self._thinking(prompt, completion, message)] = THINKING
        return roles

    def _thinking(self, prompt: Sequence[int], completion: Sequence[int], message: int) -> int:
        if self._tags is None:
            closing = self._speller.expected(self._conversation.messages[message]).thinking
        else:
            _, lead, state = split_prompt(self._decode(prompt[-_LEAD:]), self._tags)
            text = (lead if state == "opens thinking" else "") + self._decode(completion)
            closing = self._tags[1] if text.lstrip().startswith(self._tags[0]) else ""
        if not closing:
            return 0
        number = _first_with(closing, completion, self._decode)
        while number < len(completion) and self._decode(completion[number : number + 1]).isspace():
            number += 1
        return number

    def prompt(self, ids: Sequence[int], count: int) -> tuple[NDArray[np.int8], Ints]:
        """Role and message of each token of the prompt after the first `count` messages."""
        for text, spans in self._spans.find(count) if len(ids) else ():
            offsets = self._offsets(text, ids)
            if offsets is not None and spans:
                numbers = np.searchsorted([span.end for span in spans], offsets, side="right")
                numbers = np.minimum(numbers, len(spans) - 1)
                roles = np.array([self._role(span) for span in spans], np.int8)
                return roles[numbers], np.array([span.message for span in spans])[numbers]
        return np.full(len(ids), PROMPT, np.int8), np.full(len(ids), OWN)

    def _role(self, span: Span) -> int:
        if span.header:
            return PROMPT
        if span.message == OWN:
            return SYSTEM
        return _OF_MESSAGE.get(self._conversation.messages[span.message].role, PROMPT)

    def _offsets(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """Where each token begins in the text; None if the text is not encoded as these ids, or that is not told."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(encoded["input_ids"]) != list(ids):
            return None
        return [start for start, _ in encoded["offset_mapping"]]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def target_weights(layout: Layout) -> Floats:
    """[T] the weight with which each token is the target of its parent."""
    base = int(max(layout.input_ids.max(initial=0), layout.target_id.max(initial=0))) + 1
    tokens = layout.parent * base + layout.input_ids  # unique below one parent
    order = np.argsort(tokens, kind="stable")
    at = order[np.searchsorted(tokens, layout.predictor * base + layout.target_id, sorter=order)]
    weights = np.zeros(layout.num_tokens)
    weights[at] = layout.weight
    return weights


def _first_with(wanted: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """How many tokens it takes until their text contains the wanted one; all of them if it never does."""
    return bisect_left(range(len(ids)), True, key=lambda number: wanted in decode(ids[:number]))
