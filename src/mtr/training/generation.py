"""Held-out conversations generated turn by turn, as at inference: the model's own responses become the history."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtr.attention.interface import with_own_attention
from mtr.chat.reading import as_message
from mtr.chat.rendering import Renderer
from mtr.data.conversation import Conversation
from mtr.files import replace_file, write_json
from mtr.model.completions import complete
from mtr.recipe.sections import Recipe
from mtr.training.exact_match import GeneratedTurn, exact_match
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.processes import gather_values, is_sharded
from mtr.training.saving import Saving
from mtr.training.state import Goal, RunState
from mtr.training.stopping import Stopping


@torch.no_grad()
def generate_turns(
    model: Any,
    renderer: Renderer,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> list[GeneratedTurn]:
    """Greedy decoding of all conversations in one batch. Turns that call tools are taken from the data instead.

    Args:
        stop: asked before each turn; once it is true, what has been generated until then is returned.
    """
    histories: list[list[dict[str, Any]]] = [[] for _ in conversations]
    generated: list[GeneratedTurn] = []
    was_training = model.training
    with with_own_attention(model):
        model.eval()
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
                own = renderer.expected(conversation.messages[index])
                turn = conversation.turns.index(index)
                answer = _answer(conversation) if index == conversation.turns[-1] else None
                asked_for = _asked(conversation, index)
                generated.append(
                    GeneratedTurn(conversation.where, turn, thinking, response, own.response, answer, asked_for)
                )
                histories[number].append(as_message(thinking, response))
    model.train(was_training)
    return generated


def _asked(conversation: Conversation, index: int) -> str:
    """What was said since the assistant's last message before `index`, system prompts left out."""
    said: list[str] = []
    for message in reversed(conversation.messages[:index]):
        if message.role == "assistant":
            break
        if message.role != "system":
            said.insert(0, message.content)
    return "\n\n".join(said)


def _answer(conversation: Conversation) -> str | None:
    answer = conversation.row.get("answer")
    return str(answer) if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) else None


def _generate(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Token ids after each prompt, without the stop token."""
    return complete(model, prompts, max_new_tokens, renderer.stop_ids, renderer.pad_id)


def write_generations(output_dir: Path, step: int, generated: list[GeneratedTurn]) -> None:
    """Add to generations.jsonl; what an earlier try wrote for this step or later ones is replaced."""
    path = output_dir / "generations.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    kept = [line for line in lines if line and json.loads(line)["step"] < step]
    new = [write_json(None, {"step": step, **turn.as_row()}) for turn in generated]
    replace_file(path, "".join(f"{line}\n" for line in [*kept, *new]))


class Generation:
    """Generates the held-out conversations before the first step and after the last one, each process its share."""

    def __init__(
        self,
        recipe: Recipe,
        held_out: Sequence[Conversation],
        renderer: Renderer,
        learner: Learner,
        state: RunState,
        goal: Goal,
        saving: Saving,
        stopping: Stopping,
        log: RunLog,
    ) -> None:
        self._held_out = held_out
        self._renderer = renderer
        self._max_new_tokens = recipe.generation.max_new_tokens
        self._learner = learner
        self._state = state
        self._goal = goal
        self._saving = saving
        self._stopping = stopping
        self._log = log
        self._generated_at: int | None = None

    def is_due(self) -> bool:
        steps = self._state.steps
        first_or_last = steps == 0 or self._goal.is_reached(self._state)
        return bool(self._held_out) and first_or_last and self._generated_at != steps

    def generate(self) -> None:
        """Given up when a signal comes; done again when the run is resumed."""
        if self._goal.is_reached(self._state):
            self._saving.load_best()
        with self._saving.result():
            shares = self._generate_shares()
        if self._stopping.agree():
            return
        order = {conversation.where: i for i, conversation in enumerate(self._held_out)}
        generated = sorted((turn for share in shares for turn in share), key=lambda turn: order[turn.conversation])
        self._state.exact_match.append(exact_match(generated))
        if self._learner.accelerator.is_main_process:
            write_generations(self._state.output_dir, self._state.steps, generated)
        self._log.display.generated(self._state.steps, generated)
        self._generated_at = self._state.steps

    def _generate_shares(self) -> list[list[GeneratedTurn]]:
        """What each process generated."""
        model, accelerator = self._learner.model, self._learner.accelerator
        if is_sharded(model):  # every process takes part in every forward, so all of them generate everything
            stop = self._stopping.agree
            run = partial(generate_turns, model, self._renderer, self._held_out, self._max_new_tokens, stop)
            return [self._learner.tree_model(None, run=run)]
        own = self._held_out[accelerator.process_index :: accelerator.num_processes]
        mine = generate_turns(model, self._renderer, own, self._max_new_tokens, lambda: self._stopping.is_asked_here)
        return gather_values(accelerator, mine)
