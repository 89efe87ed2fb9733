"""One turn as text: the prompt that inference is fed, the completion that the model must generate, its stop token.

The completion is what follows the prompt in the turn's own rendering, its thinking in the spelling that the template
reads; where the template leaves the thinking out, the completion is assembled from the tags. Either way it is read
back as inference reads it, and must contain the turn's own thinking, response and calls before the first stop token.
If it does not, the turn is refused with the reason: a turn that cannot be rendered correctly is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtr.chat.added_tokens import any_of
from mtr.chat.completion import INLINE, after_thinking, built, rendered, spell, split_inline, split_prompt
from mtr.chat.expected import Expected, missing_response
from mtr.chat.findings import Findings, State, Tags
from mtr.chat.history import Before
from mtr.chat.spelling import PLACEHOLDER, Speller, with_placeholders
from mtr.chat.template import RefusedError
from mtr.chat.turn import INLINE_HISTORY
from mtr.data.conversation import THINKING_KEYS, Conversation, Message


@dataclass(frozen=True)
class Draft:
    """A turn that can be trained, not yet encoded."""

    prompt: str
    completion: str
    """With its end-of-turn token."""
    stop: int
    """The end-of-turn token's id."""
    notes: tuple[str, ...]


class Drafter:
    """Drafts turns for one template."""

    def __init__(
        self, findings: Findings, speller: Speller, stops: dict[str, int], inference_stops: Sequence[int]
    ) -> None:
        """
        Args:
            stops: what may end a completion: the text and id of each token.
            inference_stops: ids of those that inference stops at.
        """
        self.findings = findings
        self.tags = findings.tags
        self.speller = speller
        self._stops = stops
        self._inference_stops = set(inference_stops)
        self._stop_pattern = any_of(stops)

    def draft(self, conversation: Conversation, before: Before, prompt: str) -> Draft:
        """
        Args:
            prompt: of `before`.

        Raises:
            RefusedError: the turn cannot be rendered correctly.
        """
        expected = self.speller.expected(conversation.messages[before.count])
        opening, completion = self._completion(before, expected, prompt)
        completion, stop = self._ended(opening, completion, expected)
        notes = self._notes(conversation, before.count, expected, completion)
        return Draft(prompt, completion, stop, tuple(notes))

    def _completion(self, before: Before, expected: Expected, prompt: str) -> tuple[str, str]:
        """What the prompt has opened, and what follows it, including text after the end of the turn."""
        head, lead, state = split_prompt(prompt, self.tags)
        self._check_thinking(expected, state)
        read = self.findings.read(bool(expected.message.tool_calls))
        message = self._as_read(expected, read)
        opening = lead if state == "opens thinking" else ""
        ways: Iterator[str] = iter(())
        if read or not expected.thinking:
            ways = rendered(self._rest(before, self.speller.given(message), head), lead, state, self.tags)
        for way in ways:
            if not _missing(opening + way, expected, self.tags):
                return opening, way
        bare = self._rest(before, self.speller.given(spell(message, "", expected.response, None, None)), head)
        if problem := missing_response(bare, expected):
            cut = self.tags is not None and self.tags[1] in expected.response
            raise RefusedError(f"{problem}: it holds {self.tags[1]}" if cut and self.tags else problem)
        if expected.thinking and self.tags is None:
            raise RefusedError(
                "the template never renders its thinking and no think tags were found; "
                "name them in the recipe, thinking: {open: <think>, close: </think>}"
            )
        if self.tags is not None and (expected.thinking or opening):
            way = built(bare, expected.thinking, state, self.tags, self.findings.spacing)
            if not _missing(opening + way, expected, self.tags):
                return opening, way
        raise RefusedError("its thinking and response cannot be told apart in what the template renders")

    def _check_thinking(self, expected: Expected, state: State) -> None:
        """
        Raises:
            RefusedError: inference could never generate this thinking.
        """
        if not expected.thinking:
            return
        if state == "closes thinking":
            openers = self.findings.openers
            way_out = f"open it with {' or '.join(openers)}" if openers else "no argument of the template opens it"
            raise RefusedError(
                f"it has thinking, but the generation prompt closes the thinking before it starts; {way_out}"
            )
        if self.tags and any(tag in expected.thinking for tag in self.tags):
            raise RefusedError(
                f"its thinking holds {' or '.join(self.tags)} itself, so inference would end it there; "
                "write the tag in another way"
            )
        if expected.spelling != INLINE and split_inline(expected.response, self.tags):
            raise RefusedError("it has two thinkings, one in a field and one in its content; leave one out")

    def _as_read(self, expected: Expected, read: tuple[str, ...]) -> dict[str, Any]:
        """The turn's own message, its thinking in a spelling that the template reads.

        Thinking of white space alone is emptied: it is no thinking, whatever a template makes of it.
        """
        data = expected.message.data
        message = {key: "" if key in THINKING_KEYS and not text.strip() else text for key, text in data.items()}
        inline_last = expected.spelling == INLINE and read[:1] != (INLINE,)
        if expected.thinking and read and (expected.spelling not in read or inline_last):
            return spell(message, expected.thinking, expected.response, read[0], self.tags)
        return message

    def _rest(self, before: Before, message: dict[str, Any], head: str) -> str:
        """The turn's own rendering: all that follows the head of the prompt."""
        full = before.then(message)
        if full.startswith(head):
            return full[len(head) :]
        # With this turn after it, the history renders differently (a loop's thinking is dropped once it is answered),
        # so the turn is found by its header: the last one before a placeholder in the place of the turn's text.
        header = split_prompt(self.findings.generation_prompt, self.tags)[0]
        if not header or not head.endswith(header):  # without a header it comes right after the last message
            last = Message(before.last).content.strip()
            header = head[head.rindex(last) :] if last and last in head else ""
        replaced = before.then(with_placeholders(message))
        own_text = replaced.find(PLACEHOLDER)
        start = replaced.rfind(header, 0, own_text) if header and own_text >= 0 else -1
        end = start + len(header)
        if start < 0 or not full.startswith(replaced[:end]):
            raise RefusedError(
                "the generation prompt is not part of the turn's own rendering, so inference never sees it"
            )
        return full[end:]

    def _ended(self, opening: str, completion: str, expected: Expected) -> tuple[str, int]:
        """The completion up to the first stop token after which nothing is missing, and that token's id.

        The stop token is appended if there is none.

        Raises:
            RefusedError: inference stops too early.
        """
        for match in self._stop_pattern.finditer(completion):
            if not _missing(opening + completion[: match.end()], expected, self.tags):
                return completion[: match.end()], self._stops[match.group()]
            if self._stops[match.group()] in self._inference_stops:
                raise RefusedError(f"inference stops at {match.group()} before all of it is said")
        stop = self.findings.stop(bool(expected.message.tool_calls))
        if stop is None:
            raise RefusedError("neither the template, the generation config nor the tokenizer says what ends a turn")
        return (completion if stop.source == "next message" else completion.rstrip()) + stop.text, stop.id

    def _notes(self, conversation: Conversation, index: int, expected: Expected, completion: str) -> Iterator[str]:
        """What the template drops without making the turn wrong."""
        found, earlier = self.findings, conversation.messages[:index]
        if expected.message.tool_calls and expected.response:
            if expected.response not in completion:
                yield "the template drops the text beside its tool calls"
            elif (
                not expected.thinking
                and after_thinking(completion, expected.response, self.tags) is not None
                and self.tags
            ):
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
        if differs and not self.speller.respell and any(self.speller.is_inline(message) for message in earlier):
            yield INLINE_HISTORY


def _missing(text: str, expected: Expected, tags: Tags | None) -> str:
    """What inference would miss of the turn when it reads this completion; empty if nothing.

    Args:
        text: the completion, after what the prompt has opened.
    """
    after = after_thinking(text, expected.thinking, tags)
    if after is None and expected.message.tool_calls and not expected.thinking:
        after = after_thinking(text, expected.response, tags)  # a template that writes text beside calls as thinking
    return "the template does not render its thinking" if after is None else missing_response(after, expected)
