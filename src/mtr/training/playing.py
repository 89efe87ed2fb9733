"""Play conversations turn by turn, as inference does: the model's own answers are in the history, stripped.

A turn is right when its response is the reference's. Where a row has an `answer`, the last turn is right when its
response gives that answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mtr.attention.interface import use_own_attention, use_tree_attention
from mtr.chat.rendering import Renderer
from mtr.data.conversation import Conversation


@dataclass(frozen=True)
class Played:
    """One generated turn beside its reference."""

    conversation: str
    turn: int
    thinking: str
    response: str
    reference: str
    answer: str | None = None
    """Of the row, for its last turn."""

    @property
    def exact_match(self) -> bool:
        if self.answer is not None:
            return gives_answer(self.response, self.answer)
        return self.response == self.reference

    def as_row(self) -> dict[str, Any]:
        row = {**asdict(self), "exact_match": self.exact_match}
        return {key: value for key, value in row.items() if value is not None}


@torch.no_grad()
def play(
    model: Any,
    renderer: Renderer,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> list[Played]:
    """Greedy, all conversations side by side. Turns that call tools are taken from the data, not generated.

    Args:
        stop: asked before each turn; when it says so, what has been played until then is returned.
    """
    was_training = model.training
    model.eval()
    use_own_attention(model)
    histories: list[list[dict[str, Any]]] = [[] for _ in conversations]
    played: list[Played] = []
    for index in range(max((len(c.messages) for c in conversations), default=0)):
        asked = []
        for number, conversation in enumerate(conversations):
            if index >= len(conversation.messages):
                continue
            message = conversation.messages[index]
            if message.role == "assistant" and not message.tool_calls and index > 0:
                asked.append(number)
            else:
                histories[number].append(dict(message.data))
        if not asked:
            continue
        if stop():
            break
        prompts = [renderer.prompt(histories[n], conversations[n].tools) for n in asked]
        for number, ids in zip(asked, _generate(model, renderer, prompts, max_new_tokens), strict=True):
            conversation = conversations[number]
            thinking, response = renderer.split(ids)
            own = renderer.own(conversation.messages[index])
            turn = conversation.turns.index(index)
            answer = _answer(conversation) if index == conversation.turns[-1] else None
            played.append(Played(conversation.where, turn, thinking, response, own.response, answer))
            histories[number].append(
                {"role": "assistant", "content": response} | ({"reasoning_content": thinking} if thinking else {})
            )
    use_tree_attention(model)
    model.train(was_training)
    return played


def gives_answer(response: str, answer: str) -> bool:
    """The response is the answer, or its last boxed{} holds it, or, for a number, its last number is equal."""
    response, answer = response.strip(), answer.strip()
    boxed = _BOXED.findall(response)
    if response == answer or (boxed and boxed[-1].strip() == answer):
        return True
    wanted, found = _number(answer), _NUMBER.findall(boxed[-1] if boxed else response)
    return wanted is not None and bool(found) and _number(found[-1]) == wanted


_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _number(text: str) -> float | None:
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _answer(conversation: Conversation) -> str | None:
    answer = conversation.row.get("answer")
    return str(answer) if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) else None


def exact_match(played: Sequence[Played]) -> float:
    """Share of turns, 0 to 1."""
    return sum(turn.exact_match for turn in played) / max(len(played), 1)


def _generate(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Token ids after each prompt, the stop token left out; prompts are padded on the left."""
    longest, pad = max(map(len, prompts)), renderer.pad_id
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        eos_token_id=renderer.stop_ids,
        pad_token_id=pad,
    )
    completions = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in renderer.stop_ids), len(row))
        completions.append(row[:end])
    return completions
