"""What ends a turn, and whether the template writes BOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mtr.chat.findings import Stop
from mtr.chat.sentinels import ANSWER, RESPONSE, TOOL_RESULT, USER, VALUE, Sentinels


class TurnEnd:
    """Trials of where inference stops."""

    def __init__(self, sentinels: Sentinels, stop_ids: Sequence[int]) -> None:
        """
        Args:
            stop_ids: the generation config's, best first; without any, the tokenizer's eos is inference's stop.
        """
        self.sentinels = sentinels
        self.explicit_stops = list(stop_ids)
        eos = sentinels.tokenizer.eos_token_id
        self.stop_ids = self.explicit_stops or ([] if eos is None else [eos])

    def stop(self, calls: bool, answer: Stop | None) -> Stop | None:
        """What ends an answer, or tool calls.

        The first token after a turn's own text that inference stops at, else the token that closes the turn. If its
        rendering has neither, the first token of the next message may be a stop; else it is inference's own.

        Args:
            answer: what ends an answer, where this is about calls.
        """
        own, message, following = (VALUE, self.sentinels.calls(), TOOL_RESULT) if calls else (RESPONSE, ANSWER, USER)
        added = self.sentinels.added
        full = self.sentinels.text([USER, message])
        if own not in full:
            return None if calls else self._own_stop()
        tail = full[full.rindex(own) + len(own) :]
        found = list(added.pattern.finditer(tail))
        known = next((match.group() for match in found if added.ids[match.group()] in self.stop_ids), None)
        if known is not None:
            return self._stop_at(known, "template")
        if calls:
            special = [match.group() for match in found if match.group() in added.special]
            # A generation config that lacks the end of an answer says nothing about the end of a call either.
            unknown = not self.explicit_stops or answer is None or not answer.stops_inference
            if special and (unknown or (answer is not None and special[-1] == answer.text)):
                return self._stop_at(special[-1], "template")
        elif found:
            run = found[0]
            for match in found[1:]:
                run = match if match.start() == run.end() else run
            return self._stop_at(run.group(), "template")
        later = self.sentinels.text([USER, message, following], generation=True)
        later = later[later.rindex(own) + len(own) :] if own in later else ""
        if later.startswith(tail):
            first = added.pattern.match(later[len(tail) :])
            if first and added.ids[first.group()] in self.stop_ids:
                return self._stop_at(first.group(), "next message")
        return answer if calls and answer and answer.source == "template" else self._own_stop()

    def history_end(self, stop: Stop | None) -> str:
        """What ends the same answer once another message follows."""
        own = self.sentinels.text([USER, ANSWER])
        later = self.sentinels.text([USER, ANSWER, USER], generation=True)
        if RESPONSE not in own or RESPONSE not in later:
            return ""
        own, later = own[own.rindex(RESPONSE) :], later[later.rindex(RESPONSE) :]
        if stop is None or later.startswith(own[: own.find(stop.text) + len(stop.text)]):
            return stop.text if stop else ""
        match = self.sentinels.added.pattern.search(later)
        return match.group() if match else ""

    def bos(self) -> tuple[Literal["template", "none", "twice"], bool]:
        """Who writes BOS, and whether encoding with special tokens would add another one."""
        tokenizer = self.sentinels.tokenizer
        bos = tokenizer.bos_token_id
        if bos is None:
            return "none", False
        text = self.sentinels.text([USER], generation=True)
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        more = tokenizer(text)["input_ids"]
        count = plain[:2].count(bos)
        return ("none", "template", "twice")[count], more[: count + 1].count(bos) > count

    def _stop_at(self, text: str, source: Literal["template", "next message"]) -> Stop:
        id_ = self.sentinels.added.ids[text]
        return Stop(text, id_, source, id_ in self.stop_ids)

    def _own_stop(self) -> Stop | None:
        """Inference's own stop, of the generation config or the tokenizer."""
        if not self.stop_ids:
            return None
        source: Literal["generation config", "tokenizer"] = "generation config" if self.explicit_stops else "tokenizer"
        text = self.sentinels.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        return Stop(str(text), self.stop_ids[0], source, True)
