"""A conversation with one or several models, each in the contexts that inference gives it.

    messages            S U1 A1 U2                    what was said, with the thinking of every answer
    prompt              template(messages, generation prompt)      what the model is fed: earlier thinking as it has it
    completion          T2 A2                         generated, read back, appended

Models that are compared are asked the same questions and have their own answers in their history.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from mtr.chat.reading import Decoding, as_message
from mtr.chat.template import RefusedError
from mtr.errors import UserError
from mtr.model.completions import Sampling, before_stop, complete
from mtr.talk.interrupts import stoppable
from mtr.talk.loading import Speakers, Voice

Finish = Literal["stop", "length", "interrupted"]
Watch = Callable[["Answer"], None]
"""Is given an answer as far as it is known: before its first token, after each, and complete."""


class ContextError(UserError):
    """A question that cannot be answered: the context is full, or template, memory or weights do not allow it."""


@dataclass(frozen=True)
class Answer:
    """What a model said to a question, so far or in the end."""

    voice: str
    thinking: str = ""
    response: str = ""
    finish: Finish | None = None
    """stop: by a stop token; length: max_new_tokens or the context was full; interrupted: by the user; None: not yet"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    """Tokens until the response began, think tags included."""
    seconds: float = 0.0

    @property
    def is_kept(self) -> bool:
        """Whether there is a response to keep in the history; cut inside the thinking there is none."""
        return self.finish == "stop" or bool(self.response)


@dataclass(frozen=True)
class Limits:
    """What ends an answer, and how it is drawn."""

    max_new_tokens: int
    sampling: Sampling
    seed: int


@dataclass
class Talk:
    """The conversation of one voice."""

    voice: Voice
    messages: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """The state of a chat."""

    def __init__(self, speakers: Speakers, limits: Limits, system: str | None = None) -> None:
        self.speakers = speakers
        self.limits = limits
        self.system = system
        self.talks = [Talk(voice) for voice in speakers.voices]
        self.answers: list[Answer] = []
        """To the last question, one of each voice."""
        self._asked = 0
        self._unanswered: str | None = None
        """The last question, where it was taken back."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """With the system prompt, as the last voice's template is given them."""
        return self._with_system(self.talks[-1])

    @property
    def questions(self) -> list[str]:
        return [message["content"] for message in self.talks[-1].messages if message["role"] == "user"]

    def ask(self, question: str, watch: Watch = lambda _: None) -> list[Answer]:
        """The answer of each voice. A question without an answer to keep is taken back.

        Raises:
            ContextError: it cannot be answered; the messages have not changed.
        """
        asked = [[*self._with_system(talk), {"role": "user", "content": question}] for talk in self.talks]
        prompts = [self._prompt(messages) for messages in asked]
        self._asked += 1
        self._unanswered = question
        self.answers = [
            self._speak(talk.voice, prompt, watch) for talk, prompt in zip(self.talks, prompts, strict=True)
        ]
        if all(answer.is_kept for answer in self.answers):
            self._unanswered = None
            for talk, answer in zip(self.talks, self.answers, strict=True):
                talk.messages.append({"role": "user", "content": question})
                talk.messages.append(as_message(answer.thinking, answer.response))
        return self.answers

    def undo(self) -> str | None:
        """Take back the last question with its answers; returns it, or None if there is none."""
        questions = self.questions
        for talk in self.talks:
            talk.messages = talk.messages[:-2]
        self.answers, self._unanswered = [], None
        return questions[-1] if questions else None

    def take_again(self) -> str | None:
        """The last question, to be asked once more: its answers are taken back; None if there is none."""
        if self._unanswered is None:
            self._unanswered = self.undo()
        return self._unanswered

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        for talk in self.talks:
            talk.messages = []
        self.answers, self._unanswered = [], None

    def row(self) -> dict[str, Any]:
        """The conversation as a row of training data; thinking has its own field."""
        return {"messages": self.messages}

    def context(self) -> int:
        """Tokens of the next prompt without its question.

        Raises:
            ContextError: the template refuses the messages.
        """
        return len(self._render([*self.messages, {"role": "user", "content": ""}]))

    def _with_system(self, talk: Talk) -> list[dict[str, Any]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *talk.messages]

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            return self.speakers.renderer.prompt(messages)
        except RefusedError as error:
            raise ContextError(str(error)) from None

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        prompt = self._render(messages)
        limit = self.speakers.positions
        if limit is not None and len(prompt) >= limit:
            raise ContextError(
                f"the context is full: with this message it has {len(prompt):,} tokens, and the model was made for "
                f"{limit:,}; /reset begins anew, /undo takes back the last question"
            )
        return prompt

    def _speak(self, voice: Voice, prompt: list[int], watch: Watch) -> Answer:
        renderer, limits = self.speakers.renderer, self.limits
        room = limits.max_new_tokens
        if self.speakers.positions is not None:
            room = min(room, self.speakers.positions - len(prompt))
        arriving = _Arriving(self.speakers, Answer(voice.name, prompt_tokens=len(prompt)), watch)
        torch.manual_seed(limits.seed + self._asked)
        finish: Finish = "interrupted"
        try:
            with stoppable() as is_stopped, voice.speaking() as model:
                take = partial(arriving.take_tokens, is_stopped)
                complete(model, [prompt], room, renderer.stop_ids, renderer.pad_id, limits.sampling, take)
            finish = "stop" if arriving.ids and arriving.ids[-1] in renderer.stop_ids else "length"
        except KeyboardInterrupt:
            pass
        except torch.OutOfMemoryError:
            watch(arriving.end("interrupted"))
            raise ContextError(
                f"a context of {len(prompt):,} tokens does not fit into the memory of the device; /reset begins anew"
            ) from None
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # of torch.multinomial
                raise
            watch(arriving.end("interrupted"))
            raise ContextError(
                "the probabilities of the next token are no finite numbers: the temperature is too low to draw with "
                "(0 takes the likeliest token), or the weights are broken"
            ) from None
        answer = arriving.end(finish)
        watch(answer)
        return answer


class _Arriving:
    """An answer while its tokens come."""

    def __init__(self, speakers: Speakers, answer: Answer, watch: Watch) -> None:
        self._renderer = speakers.renderer
        self._decoding = Decoding(speakers.renderer.tokenizer)
        self.answer = answer
        self._watch = watch
        self._start = time.monotonic()
        self.ids: list[int] = []
        watch(answer)

    def take_tokens(self, is_stopped: Callable[[], bool], newest: list[int]) -> None:
        """
        Raises:
            KeyboardInterrupt: the user does not want to hear more.
        """
        self.ids += newest
        if newest[0] in self._renderer.stop_ids:
            return
        self._decoding.add(newest[0])
        thinking, response = self._renderer.reader.so_far(self._decoding.text)
        before = self.answer
        self.answer = replace(
            before,
            thinking=thinking,
            response=response,
            completion_tokens=len(self.ids),
            thinking_tokens=before.thinking_tokens if response else len(self.ids),
        )
        self._watch(self.answer)
        if is_stopped():
            raise KeyboardInterrupt

    def end(self, finish: Finish) -> Answer:
        """The answer as inference reads it; of one that was cut before its response, no more than its thinking."""
        renderer = self._renderer
        completion = before_stop(self.ids, renderer.stop_ids)
        thinking, response = renderer.split(completion)
        if finish != "stop" and not self.answer.response:  # inside the thinking, or what opens thinking or response
            thinking, response = self.answer.thinking, ""
        return replace(
            self.answer,
            thinking=thinking,
            response=response,
            finish=finish,
            completion_tokens=len(self.ids),
            thinking_tokens=self.answer.thinking_tokens if thinking else 0,
            seconds=time.monotonic() - self._start,
        )
