"""Claims: whatever a model answers (thinking that is closed twice or never, control tokens, nothing at all), the next
prompt of a chat has the tokens of `tokenizer.apply_chat_template` of the whole history, and training on the saved chat
has the same prompts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from support.paths import SHARED, needs_shared
from support.rendering import behaving, load
from support.templates import BEHAVIOURS

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.data.parsing import parse_row
from mtr.model.completions import GREEDY
from mtr.talk import session as session_module
from mtr.talk.session import Answer, Limits, Session

QUESTIONS = "How many nuts, 漢字 and <b>?"
QWEN = (
    "<think>\nHm, 4.\n</think>\n\nFour.<|im_end|>",
    "<think>\n\n</think>\n\nFive.<|im_end|>",
    "No thinking.<|im_end|>",
    "<think>\nnever closed<|im_end|>",
    "<think>closed</think>twice</think>c<|im_end|>",
    "</think>closed only<|im_end|>",
    "<think>no response</think><|im_end|>",
    "a<|im_start|>user\nb<|im_end|>",
    "<think><think>opened twice</think>\n\n\nz  <|im_end|>",
    "<|im_end|>",
    "<tool_call>\n{}\n</tool_call><|im_end|>",
)
R1 = (
    "<think>\nopened again\n</think>\n\nFour.<｜end▁of▁sentence｜>",
    "Hm\n</think>\n\nFive.<｜end▁of▁sentence｜>",
    "never closed<｜end▁of▁sentence｜>",
    "a</think>b</think>c<｜end▁of▁sentence｜>",
    "<｜User｜>x<｜end▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
)
FINAL = "<|start|>assistant<|channel|>final<|message|>"
OSS = (
    f"<|channel|>analysis<|message|>Hm, 4.<|end|>{FINAL}Four.<|return|>",
    "<|channel|>final<|message|>Five.<|return|>",
    "<|channel|>analysis<|message|>never closed<|return|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "plain<|return|>",
    "<|return|>",
)
CASES: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("qwen3", QWEN, {}, "reasoning_content"),
    ("qwen3", QWEN, {"enable_thinking": False}, "reasoning_content"),
    ("r1-distill-qwen", R1, {}, "reasoning_content"),
    ("gpt-oss", OSS, {"reasoning_effort": "low"}, "thinking"),
]


class Scripted:
    """A chat with a model that says what it is told to; its prompts are kept."""

    def __init__(self, renderer: Renderer, system: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        self._says = ""

        @contextlib.contextmanager
        def speaking() -> Iterator[None]:
            yield None

        def complete(model: Any, prompts: Sequence[list[int]], room: int, *others: Any) -> None:
            self.prompts.append(prompts[0])
            for id_ in renderer.tokenizer.encode(self._says, add_special_tokens=False)[:room]:
                others[-1]([id_])

        monkeypatch.setattr(session_module, "complete", complete)
        voice = SimpleNamespace(name="tuned", speaking=speaking)
        speakers: Any = SimpleNamespace(voices=(voice,), positions=None, renderer=renderer)
        self.session = Session(speakers, Limits(1000, GREEDY, 0), system)

    def ask(self, question: str, says: str) -> Answer:
        self._says = says
        (answer,) = self.session.ask(question)
        return answer

    def trained_prompts(self) -> list[list[int] | None]:
        """Of training on the saved chat; None for a turn that it does not train, with the reason."""
        saved = parse_row(json.loads(json.dumps(self.session.row())), "row 1")
        turns = self.session.speakers.renderer.render(saved)
        return [None if turn.reason else list(turn.prompt_ids) for turn in turns]


@needs_shared
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(("name", "says", "arguments", "field"), CASES)
def test_prompts_are_the_templates(
    name: str,
    says: tuple[str, ...],
    arguments: dict[str, Any],
    field: str,
    system: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load(str(SHARED / "tokenizers" / name))
    chat = Scripted(make_renderer(tokenizer, template=arguments), system, monkeypatch)
    for text in says:
        history = [*chat.session.messages, {"role": "user", "content": QUESTIONS}]
        in_its_field = [{field if key == "reasoning_content" else key: m[key] for key in m} for m in history]
        answer = chat.ask(QUESTIONS, text)
        assert answer.finish == "stop"
        wanted = tokenizer.apply_chat_template(in_its_field, add_generation_prompt=True, return_dict=True, **arguments)
        assert chat.prompts[-1] == wanted["input_ids"], text
    trained = chat.trained_prompts()
    assert sum(prompt is not None for prompt in trained) >= len(says) / 3
    assert all(prompt in (None, seen) for prompt, seen in zip(trained, chat.prompts, strict=True))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_prompts_are_those_that_training_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a template does with earlier thinking, and wherever it wants to be given it."""
    renderer = behaving(name)
    chat = Scripted(renderer, None, monkeypatch)
    can_think = renderer.tags is not None and renderer.findings.prompt_ends != "closes thinking"
    thinking = "Hm, 4." if can_think else ""
    stop = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids[0])
    for response in ("Four.", "Five.", "Six."):
        text = BEHAVIOURS[name].says(thinking, response, "").removesuffix(stop)
        answer = chat.ask(QUESTIONS, text + stop)
        assert (answer.thinking, answer.response, answer.finish) == (thinking, response, "stop")
    assert chat.trained_prompts() == chat.prompts


@needs_shared
def test_an_answer_cut_between_thinking_and_response_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of gpt-oss's channels are no words of the model; they were kept as its answer."""
    renderer = make_renderer(load(str(SHARED / "tokenizers" / "gpt-oss")))
    chat = Scripted(renderer, None, monkeypatch)
    ids = renderer.tokenizer.encode(OSS[0], add_special_tokens=False)
    final = renderer.tokenizer.decode(ids).index("Four")
    for count in range(len(ids) - 1):
        text = renderer.tokenizer.decode(ids[:count])
        answer = chat.ask(QUESTIONS, text)
        assert answer.finish == "length"
        assert answer.is_kept == (len(text) > final), text
        assert not answer.response or "Four.".startswith(answer.response)
        assert "Hm, 4.".startswith(answer.thinking)
        if answer.is_kept:
            chat.session.undo()
