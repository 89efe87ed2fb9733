"""Claims: a conversation is generated as at inference: the history holds the model's own answers, their thinking
stripped by the template; only what the model is asked for is generated and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.data.conversation import Conversation
from mtr.data.parsing import parse_row
from mtr.training import generation
from mtr.training.exact_match import GeneratedTurn, exact_match, gives_answer
from mtr.training.generation import generate_turns


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    from transformers import AutoTokenizer

    return make_renderer(AutoTokenizer.from_pretrained(str(QUICKSTART / "base")))


class Stub:
    """A model that says what it is told to, in order."""

    def __init__(self, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]) -> None:
        self.training = True
        self.prompts: list[list[str]] = []
        self.events: list[str] = []
        self._answers = answers
        self._renderer = renderer
        monkeypatch.setattr(generation, "with_own_attention", self._with_own_attention)
        monkeypatch.setattr(generation, "_generate", self._generate)

    @contextmanager
    def _with_own_attention(self, _: Any) -> Iterator[None]:
        self.events.append("own")
        yield
        self.events.append("tree")

    def eval(self) -> None:
        self.train(False)

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def _generate(self, model: Any, renderer: Renderer, prompts: list[list[int]], limit: int) -> list[list[int]]:
        assert model is self
        assert not self.training
        assert self.events == ["own"]
        assert limit == 9
        self.prompts.append([renderer.tokenizer.decode(ids) for ids in prompts])
        said = self._answers[len(self.prompts) - 1]
        assert len(said) == len(prompts)
        encoded: list[list[int]] = [renderer.tokenizer.encode(text, add_special_tokens=False) for text in said]
        return encoded


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def chat(*messages: dict[str, Any], where: str = "rows.jsonl, line 1") -> Conversation:
    return parse_row({"messages": list(messages)}, where)


def prompt(*messages: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in messages) + "<|im_start|>assistant\n"


def test_the_history_holds_the_models_own_answers_without_their_thinking(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stub(renderer, monkeypatch, [["<think>\nHm, 1.\n</think>\n\nWrong one."], ["Right two."]])
    generated = generate_turns(
        model,
        renderer,
        [chat(user("one?"), assistant("Right one.", reasoning_content="Ah."), user("two?"), assistant("Right two."))],
        9,
    )
    assert model.prompts == [
        [prompt(("user", "one?"))],
        [prompt(("user", "one?"), ("assistant", "Wrong one."), ("user", "two?"))],
    ]
    assert generated == [
        GeneratedTurn("rows.jsonl, line 1", 0, "Hm, 1.", "Wrong one.", "Right one.", asked="one?"),
        GeneratedTurn("rows.jsonl, line 1", 1, "", "Right two.", "Right two.", asked="two?"),
    ]
    assert [turn.exact_match for turn in generated] == [False, True]
    assert exact_match(generated) == 0.5


def test_the_model_is_left_as_it_was(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = [chat(user("one?"), assistant("One."))]
    for training in (True, False):
        model = Stub(renderer, monkeypatch, [["One."]])
        model.train(training)
        generate_turns(model, renderer, conversations, 9)
        assert model.training == training
        assert model.events == ["own", "tree"]


def test_conversations_of_several_lengths_are_generated_side_by_side(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stub(renderer, monkeypatch, [["A1", "x"], ["B1"], ["A2"]])
    long = chat(user("a1"), assistant("A1"), user("a2"), assistant("A2"), where="long")
    short = chat(user("c1"), assistant("C1"), where="short")
    late = chat({"role": "system", "content": "s"}, user("b1"), assistant("B1"), where="late")
    generated = generate_turns(model, renderer, [long, short, late], 9)
    assert [len(batch) for batch in model.prompts] == [2, 1, 1]
    assert model.prompts[1] == [prompt(("system", "s"), ("user", "b1"))]
    assert [(p.conversation, p.turn, p.exact_match) for p in generated] == [
        ("long", 0, True),
        ("short", 0, False),
        ("late", 0, True),
        ("long", 1, True),
    ]
    assert exact_match(generated) == 0.75


def test_tool_calls_and_greetings_are_taken_from_the_data(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stub(renderer, monkeypatch, [["Done."]])
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    conversation = chat(
        assistant("Welcome."),
        user("do it"),
        assistant("calling", tool_calls=calls),
        {"role": "tool", "content": "42"},
        assistant("Done."),
    )
    generated = generate_turns(model, renderer, [conversation], 9)
    assert model.prompts == [
        [prompt(("assistant", "Welcome."), ("user", "do it"), ("assistant", "calling"), ("tool", "42"))]
    ]
    assert [(p.turn, p.response, p.asked) for p in generated] == [(2, "Done.", "42")]


def test_a_reference_with_inline_thinking_is_compared_by_its_response(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stub(renderer, monkeypatch, [["<think>\nother\n</think>\n\nFour."]])
    (turn,) = generate_turns(model, renderer, [chat(user("2+2?"), assistant("<think>\nadd\n</think>\n\nFour."))], 9)
    assert (turn.thinking, turn.response, turn.reference) == ("other", "Four.", "Four.")
    assert turn.exact_match


def test_thinking_that_never_ends_is_no_answer(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stub(renderer, monkeypatch, [["<think>\nFour."]])
    (turn,) = generate_turns(model, renderer, [chat(user("2+2?"), assistant("Four."))], 9)
    assert not turn.exact_match


def test_nothing_to_generate_is_nothing(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate_turns(Stub(renderer, monkeypatch, []), renderer, [], 9) == []


def test_exact_match_is_the_share_of_turns() -> None:
    right, wrong = GeneratedTurn("x", 0, "", "a", "a"), GeneratedTurn("x", 0, "a", "b", "a")
    assert exact_match([right, wrong, wrong, wrong]) == 0.25
    assert exact_match([right]) == 1.0
    assert exact_match([]) == 0.0
    assert wrong.as_row() == {
        "conversation": "x",
        "turn": 0,
        "thinking": "a",
        "response": "b",
        "reference": "a",
        "exact_match": False,
    }


# --- the real generation ----------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """A module whose `generate` appends given ids and keeps what it was given."""

    def __init__(self, completions: list[list[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._completions = torch.tensor(completions)
        self.given: dict[str, Any] = {}

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(4096, 1)

    def generate(self, **given: Any) -> torch.Tensor:
        self.given = given
        return torch.cat([given["input_ids"], self._completions], dim=1)


def test_completions_are_cut_at_the_stop_and_prompts_padded_on_the_left(renderer: Renderer) -> None:
    stop, pad = renderer.stop_ids[0], renderer.pad_id
    model = Recorder([[5, 6, stop, 7], [8, 9, 10, 11]])
    assert generation._generate(model, renderer, [[20, 21, 22], [23]], 4) == [[5, 6], [8, 9, 10, 11]]
    assert model.given["input_ids"].tolist() == [[20, 21, 22], [pad, pad, 23]]
    assert model.given["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert model.given["eos_token_id"] == renderer.stop_ids
    assert model.given["max_new_tokens"] == 4
    assert model.given["do_sample"] is False


def test_conversations_side_by_side_say_what_each_says_alone(renderer: Renderer, models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(models("qwen3")), dtype=torch.float64)
    short = chat(user("Ana has 4."), assistant("x"), user("And now?"), assistant("y"), where="short")
    long = chat(user("Ben has 4 coins and gives 2 to Ana, who had none before."), assistant("z"), where="long")
    together = generate_turns(model, renderer, [short, long], 12)
    alone = generate_turns(model, renderer, [short], 12) + generate_turns(model, renderer, [long], 12)
    assert sorted(together, key=str) == sorted(alone, key=str)
    assert all(turn.response for turn in together)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("42", "42", True),
        (" 42 \n", "42", True),
        ("The answer is 42.", "42", True),
        ("First 42, then 43.", "42", False),
        ("So 1,234 in all.", "1234", True),
        ("It is 2.50 euros", "2.5", True),
        (r"\boxed{x + 1}", "x + 1", True),
        (r"\boxed{7} and then 8", "7", True),
        (r"\boxed{7} and then 8", "8", False),
        ("Paris", "paris", False),
        ("The capital is Paris", "Paris", False),
        ("", "42", False),
        ("-3", "3", False),
    ],
)
def test_an_answer_is_found_in_a_response(response: str, answer: str, right: bool) -> None:
    assert gives_answer(response, answer) is right


def test_the_last_turn_is_compared_with_the_answer_of_its_row() -> None:
    assert GeneratedTurn("x", 1, "", "It is 7.", "7!", answer="7").exact_match
    assert not GeneratedTurn("x", 1, "", "7!", "7!", answer="8").exact_match
    assert GeneratedTurn("x", 1, "", "7!", "7!", answer="8").as_row()["answer"] == "8"
