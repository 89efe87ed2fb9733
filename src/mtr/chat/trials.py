"""The template audit: what a chat template does, found by rendering sentinel conversations at start-up.

    sentinel texts -> rendered -> where are they, what is around them -> Findings

There is no table of models: which fields are read, what surrounds the thinking, what ends a turn and which argument
opens the thinking is tried out on the template itself. All of it happens in a child process under limits, so that a
template which loops, fills the memory or crashes Python is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from mtr.chat.completion import INLINE, THINKING_FIELDS
from mtr.chat.confined import confined
from mtr.chat.encoding import Encoder
from mtr.chat.findings import Findings, Tags
from mtr.chat.sentinels import ANSWER, RESPONSE, USER, Sentinels
from mtr.chat.survival import survivals, whitespace
from mtr.chat.template import Template
from mtr.chat.think_tags import find_tags
from mtr.chat.thinking import ThinkingTrials
from mtr.chat.turn_end import TurnEnd

_CACHE: dict[Any, Findings] = {}


def find(template: Template, stop_ids: Sequence[int] = (), tags: Tags | None = None) -> Findings:
    """Audit a template; once for each template, tokenizer, set of arguments and date.

    Args:
        stop_ids: what the generation config stops at.
        tags: around thinking, where the recipe names them.

    Raises:
        UserError: the template fails on a single user message, or takes too much time or memory.
    """
    tokenizer = template.tokenizer
    key = (
        template.text,
        repr(template.arguments),
        template.day,
        tokenizer.name_or_path,
        len(tokenizer),
        repr(tokenizer.special_tokens_map),
        tuple(stop_ids),
        tags,
    )
    if key not in _CACHE:
        _CACHE[key] = _try_out(template, stop_ids, tags)
    return _CACHE[key]


def _try_out(template: Template, stop_ids: Sequence[int], tags: Tags | None) -> Findings:
    what = f"{template.tokenizer.name_or_path}: trying out the chat template on a few short messages"
    return confined(partial(_findings, template, stop_ids, tags), what)


def _findings(template: Template, stop_ids: Sequence[int], tags: Tags | None) -> Findings:
    Encoder(template.tokenizer)  # a tokenizer that crashes or takes all memory does so here
    sentinels = Sentinels(template)
    found_tags = find_tags(sentinels, tags)
    thinking, end = ThinkingTrials(sentinels, found_tags.tags), TurnEnd(sentinels, stop_ids)
    answer_stop = end.stop(calls=False, answer=None)
    call_stop = end.stop(calls=True, answer=answer_stop)
    answers_read, calls_read = thinking.read(calls=False), thinking.read(calls=True)
    own = thinking.own_rendering(ANSWER)
    bos, bos_on_encode = end.bos()
    field = next((s for s in (*answers_read, *calls_read) if s != INLINE), THINKING_FIELDS[0])
    return Findings(
        generation_prompt=sentinels.generation_prompt,
        prompt_ends=thinking.state(),
        tags=found_tags.tags,
        tags_from=found_tags.source,
        spacing=found_tags.spacing,
        answers_read=answers_read,
        calls_read=calls_read,
        fields=thinking.fields(),
        history=thinking.history(field),
        history_inline=thinking.history(INLINE),
        switches=tuple(thinking.switches(answers_read, field)),
        answer_opening=own[: own.find(RESPONSE)].lstrip() if RESPONSE in own else "",
        response_opening=thinking.response_opening(answers_read),
        answer_stop=answer_stop,
        call_stop=call_stop,
        after_stop=_after(own, answer_stop.text) if answer_stop else "",
        history_end=end.history_end(answer_stop),
        bos=bos,
        bos_on_encode=bos_on_encode,
        dated=_is_dated(sentinels),
        whitespace=whitespace(sentinels),
        arguments=sentinels.arguments,
        call_content=sentinels.call_content,
        **survivals(sentinels, found_tags.tags, calls_read),
    )


def _is_dated(sentinels: Sentinels) -> bool:
    later = sentinels.template.on(sentinels.template.day + timedelta(days=400))
    return sentinels.text([USER], template=later) != sentinels.text([USER])


def _after(text: str, stop: str) -> str:
    return text.rpartition(stop)[2] if stop in text else ""
