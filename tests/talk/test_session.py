"""Claims: what `mtr chat` answers is what training generates in the same conversation, token for token, with the
adapter and without; every prompt is the template's rendering of the messages; a chat that kept earlier thinking in its
history would ask something else.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART
from support.runs import trained_run

from mtr.chat.rendering import Renderer
from mtr.data.parsing import parse_row
from mtr.model.completions import GREEDY, Sampling
from mtr.model.loading import load_model
from mtr.recipe.loading import load_saved_recipe
from mtr.talk import session as session_module
from mtr.talk.finding import find_voice
from mtr.talk.loading import Speakers, load_speakers
from mtr.talk.session import Answer, ContextError, Limits, Session
from mtr.training.generation import generate_turns

CPU = torch.device("cpu")
LIMITS = Limits(48, GREEDY, 0)
QUESTIONS = ["Paul has 23 nuts.", "He buys 12 more.", "He finds 3 more."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def speakers(run: Path) -> Speakers:
    return load_speakers(find_voice(str(run)), CPU, compare=True)


@pytest.fixture
def session(speakers: Speakers) -> Session:
    return Session(speakers, LIMITS)


class Prompts:
    """What a renderer is asked for."""

    def __init__(self, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        self._prompt = renderer.prompt
        monkeypatch.setattr(renderer, "prompt", self._keep)

    def _keep(self, *arguments: Any) -> list[int]:
        self.ids.append(self._prompt(*arguments))
        return self.ids[-1]


def row(questions: list[str]) -> dict[str, Any]:
    asked = [{"role": "user", "content": question} for question in questions]
    return {"messages": [message for one in asked for message in (one, {"role": "assistant", "content": "-"})]}


@pytest.mark.parametrize("voice", ["base", "tuned"])
def test_answers_are_those_that_training_generates(session: Session, run: Path, voice: str) -> None:
    """Training's own model: made by its loader, from its recipe."""
    recipe = load_saved_recipe(run / "recipe.yaml")
    changes: dict[str, Any] = {"init_from": str(run)}
    trained = load_model(recipe.replace(lora=changes) if voice == "tuned" else recipe, CPU)
    conversation = parse_row(row(QUESTIONS), "row 1")
    generated = generate_turns(trained, session.speakers.renderer, [conversation], LIMITS.max_new_tokens)
    assert len(generated) == len(QUESTIONS)
    for question, turn in zip(QUESTIONS, generated, strict=True):
        answer = next(answer for answer in session.ask(question) if answer.voice == voice)
        assert (answer.thinking, answer.response, answer.finish) == (turn.thinking, turn.response, "stop")


def test_the_adapter_makes_a_difference_and_is_back_after_the_base_has_spoken(session: Session) -> None:
    base, tuned = session.ask(QUESTIONS[0])
    assert (base.thinking, base.response) != (tuned.thinking, tuned.response)
    session.undo()
    assert [a.response for a in session.ask(QUESTIONS[0])] == [base.response, tuned.response]


def test_the_base_is_the_base_model_itself(speakers: Speakers) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "base"), dtype=torch.float32)
    with torch.no_grad(), speakers.voices[0].speaking() as base:
        assert torch.equal(base(ids).logits, plain(ids).logits)
    with torch.no_grad(), speakers.voices[1].speaking() as tuned:
        assert not torch.allclose(tuned(ids).logits, plain(ids).logits, atol=1e-2)


def test_each_prompt_is_the_templates_rendering(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = session.speakers.renderer.tokenizer
    session.system = "Count."
    prompts = Prompts(session.speakers.renderer, monkeypatch)
    for question in QUESTIONS:
        before = len(prompts.ids)
        session.ask(question)
        for talk, ids in zip(session.talks, prompts.ids[before:], strict=True):
            messages = [{"role": "system", "content": "Count."}, *talk.messages[:-1]]
            wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert tokenizer.decode(ids) == wanted
            assert wanted.count("<think>") == 0, "of earlier turns"


def test_a_history_with_its_thinking_would_be_another_context(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other direction: thinking left in the content is seen."""
    right = [session.ask(question)[1].prompt_tokens for question in QUESTIONS]
    session.reset()

    def with_thinking(thinking: str, response: str) -> dict[str, Any]:
        return {"role": "assistant", "content": f"<think>\n{thinking}\n</think>\n\n{response}"}

    monkeypatch.setattr(session_module, "as_message", with_thinking)
    wrong = [session.ask(question)[1].prompt_tokens for question in QUESTIONS]
    assert wrong[0] == right[0]
    assert wrong[1] > right[1]


def test_what_arrives_ends_as_the_answer(session: Session) -> None:
    seen: list[Answer] = []
    answers = session.ask(QUESTIONS[0], seen.append)
    assert [answer.voice for answer in seen if answer.finish] == ["base", "tuned"]
    for answer in answers:
        parts = [one for one in seen if one.voice == answer.voice]
        assert parts[0] == Answer(answer.voice, prompt_tokens=answer.prompt_tokens)
        assert parts[-1] == answer
        assert len(parts) == answer.completion_tokens + 1, "a stop token shows nothing"
        assert all(answer.response.startswith(part.response) for part in parts)
        assert 0 < answer.thinking_tokens < answer.completion_tokens


def test_undo_retry_and_reset(session: Session) -> None:
    assert session.undo() is None
    assert session.take_again() is None
    first = session.ask(QUESTIONS[0])
    session.ask(QUESTIONS[1])
    assert session.undo() == QUESTIONS[1]
    assert session.questions == QUESTIONS[:1]
    assert session.take_again() == QUESTIONS[0]
    assert session.messages == []
    assert [a.response for a in session.ask(QUESTIONS[0])] == [a.response for a in first]
    session.system = "Count."
    session.reset()
    assert session.messages == [{"role": "system", "content": "Count."}]


def test_an_answer_cut_within_its_thinking_is_not_kept(speakers: Speakers) -> None:
    session = Session(speakers, replace(LIMITS, max_new_tokens=4))
    answers = session.ask(QUESTIONS[0])
    assert [(a.finish, a.response, a.is_kept, a.completion_tokens) for a in answers] == [("length", "", False, 4)] * 2
    assert all(answer.thinking for answer in answers)
    assert session.messages == []
    assert session.take_again() == QUESTIONS[0]
    session.limits = LIMITS
    assert all(answer.is_kept for answer in session.ask(QUESTIONS[0]))


def test_a_stopped_answer_is_kept_as_far_as_it_came(session: Session) -> None:
    def stop(answer: Answer) -> None:
        if answer.response and answer.finish is None:
            raise KeyboardInterrupt

    whole = session.ask(QUESTIONS[0])
    session.reset()
    for answer, complete in zip(session.ask(QUESTIONS[0], stop), whole, strict=True):
        if answer.finish == "interrupted":
            assert complete.response.startswith(answer.response)
            assert answer.completion_tokens < complete.completion_tokens
    assert session.questions == QUESTIONS[:1]
    assert session.answers[0].finish == "interrupted"


def test_a_full_context_is_said(session: Session) -> None:
    session.ask(QUESTIONS[0])
    before = session.messages
    with pytest.raises(ContextError, match=r"the context is full: .* tokens, and the model was made for 1,024;"):
        session.ask("nuts " * 1100)
    assert session.messages == before
    limit = session.context() + 8
    session.speakers = replace(session.speakers, positions=limit)
    answers = session.ask("Hm.")
    assert {answer.finish for answer in answers} == {"length"}
    assert max(answer.prompt_tokens + answer.completion_tokens for answer in answers) <= limit


def test_what_cannot_be_drawn_is_said_and_the_chat_goes_on(session: Session) -> None:
    seen: list[Answer] = []
    session.limits = replace(LIMITS, sampling=Sampling(1e-42))
    with pytest.raises(ContextError, match="no finite numbers: the temperature is too low to draw with"):
        session.ask(QUESTIONS[0], seen.append)
    assert seen[-1].finish == "interrupted", "so that whoever watches can end"
    assert session.messages == []
    session.limits = LIMITS
    assert session.take_again() == QUESTIONS[0]
    assert all(answer.is_kept for answer in session.ask(QUESTIONS[0]))


def test_a_question_to_be_asked_again_is_not_lost_when_it_is_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.ask(QUESTIONS[0])
    assert session.take_again() == QUESTIONS[0]
    with monkeypatch.context() as patch:
        patch.setattr(session.speakers.renderer.tokenizer, "chat_template", "{{ raise_exception('no') }}")
        with pytest.raises(ContextError):
            session.ask(QUESTIONS[0])
    assert session.take_again() == QUESTIONS[0]


def test_a_question_that_the_template_refuses_changes_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.speakers.renderer.tokenizer, "chat_template", "{{ raise_exception('no users') }}")
    with pytest.raises(ContextError, match="the chat template refuses it: no users"):
        session.ask("Hm.")
    assert session.messages == []


def test_a_seed_repeats_what_is_drawn(speakers: Speakers) -> None:
    def drawn(seed: int) -> list[str]:
        session = Session(speakers, Limits(24, Sampling(5.0), seed))
        return [f"{a.thinking}|{a.response}" for a in session.ask(QUESTIONS[0])]

    assert drawn(1) == drawn(1) != drawn(2)
    session = Session(speakers, Limits(24, Sampling(5.0), 1))
    session.ask(QUESTIONS[0])
    assert [f"{a.thinking}|{a.response}" for a in session.ask(QUESTIONS[0])] != drawn(1), "another each time"


def test_a_row_is_one_that_mtr_trains_on(session: Session) -> None:
    session.system = "Count."
    for question in QUESTIONS[:2]:
        session.ask(question)
    saved = parse_row(json.loads(json.dumps(session.row())), "row 1")
    assert len(saved.turns) == 2
    turns = session.speakers.renderer.render(saved)
    assert [turn.reason for turn in turns] == [None, None]
    said = [session.speakers.renderer.split(list(turn.completion_ids)) for turn in turns]
    assert said[1] == (session.answers[1].thinking, session.answers[1].response)
