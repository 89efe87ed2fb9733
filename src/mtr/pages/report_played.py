"""Played conversations for the report page: each turn before training and after it, run beside run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Said = dict[str, Any]
Turns = dict[int, dict[str, Any]]
"""A conversation as one run played it: by number of the turn."""


def played_side_by_side(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the template shows, None where no run played a conversation.

    Conversations of two runs are one if their files are of one name and what was asked and expected is the same.

    Keys: more (how many a run played, if some are not shown), shown (how many of them are) and chats: {where, scores,
    turns}; of turns: asked, label, wanted, kinds and said, a list of {who, index of the run or None, thinking,
    response, right}.
    """
    chats: dict[tuple[object, ...], dict[int, Turns]] = {}
    for index, run in enumerate(runs):
        for chat in run["played"]["conversations"]:
            texts = ((turn["turn"], turn["asked"], turn.get("answer"), turn["reference"]) for turn in chat["turns"])
            played = chats.setdefault((chat["where"], *texts), {})
            played[index] = {turn["turn"]: turn for turn in chat["turns"]}
    if not chats:
        return None
    total, shown = max((run["played"]["num_conversations"], len(run["played"]["conversations"])) for run in runs)
    names = [run["name"] for run in runs]
    return {
        "more": total if total > shown else None,
        "shown": shown,
        "chats": [_chat(str(where), played, names) for (where, *_), played in chats.items()],
    }


def _chat(where: str, played: dict[int, Turns], names: Sequence[str]) -> dict[str, Any]:
    numbers = sorted({number for turns in played.values() for number in turns})
    is_shared = len(names) > 1 and _said_the_same(list(played.values()), numbers)
    turns = [
        _turn(number, {index: turns[number] for index, turns in played.items() if number in turns}, names, is_shared)
        for number in numbers
    ]
    return {"where": where, "scores": _scores(played, names, is_shared), "turns": turns}


def _said_the_same(played: Sequence[Turns], numbers: Sequence[int]) -> bool:
    """Whether all runs began with the same model, by what it said."""
    befores = [[turns[n]["before"] if n in turns else None for n in numbers] for turns in played]
    return any(befores[0]) and all(before == befores[0] for before in befores)


def _scores(played: dict[int, Turns], names: Sequence[str], is_shared: bool) -> list[str]:
    scores = []
    for place, (index, turns) in enumerate(played.items()):
        for when in ("before", "after"):
            said = [turn[when] for turn in turns.values() if turn[when]]
            if not said or (is_shared and when == "before" and place):
                continue
            own = len(names) > 1 and not (is_shared and when == "before")
            name = f"{names[index]}{'' if is_shared else f' {when}'}" if own else when
            scores.append(f"{name}: {sum(one['right'] for one in said)} of {len(said)}")
    return scores


def _turn(number: int, said: dict[int, dict[str, Any]], names: Sequence[str], is_shared: bool) -> dict[str, Any]:
    first = next(iter(said.values()))
    answers: list[Said] = []
    if is_shared and first["before"]:
        answers.append({"who": "before training", "index": None, **first["before"]})
    for index, turn in said.items():
        name = names[index] if len(names) > 1 else ""
        if turn["before"] and not is_shared:
            answers.append({"who": f"{name} before training".strip(), "index": None, **turn["before"]})
        if turn["after"]:
            after = name if is_shared else f"{name} after training".strip()
            answers.append({"who": after, "index": index, **turn["after"]})
    is_answer = first.get("answer") is not None
    return {
        "asked": first["asked"],
        "label": f"turn {number}, expected{' answer' if is_answer else ''}",
        "wanted": first["answer"] if is_answer else first["reference"],
        "kinds": sorted(_kinds(list(said.values()))),
        "said": answers,
    }


def _kinds(turns: Sequence[dict[str, Any]]) -> set[str]:
    """What the filter of the page knows a turn by."""
    kinds = set()
    for turn in turns:
        before, after = turn["before"], turn["after"]
        if after and not after["right"]:
            kinds.add("wrong")
        if before and after and before["right"] != after["right"]:
            kinds.add("mended" if after["right"] else "broken")
    return kinds
