"""Types of a recipe's values, how some of them may be written, and the base of its sections."""

from __future__ import annotations

import datetime
import re
import signal
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0, lt=2**63)]
Tokens = Annotated[int, Field(gt=0, le=10**9)]
Rank = Annotated[int, Field(gt=0, le=2**16)]
Alpha = Annotated[float, Field(gt=0, le=10**6)]

RESERVED_ARGUMENTS = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "tokenizer_kwargs", "return_dict", "return_assistant_tokens_mask", "return_tensors",
}  # fmt: skip
"""Arguments that mtr itself gives to apply_chat_template, so a recipe must not."""


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds a character that no path may hold")
    return value


Name = Annotated[str, AfterValidator(_named)]
"""A path, or the id of something on the Hub."""


def as_date(value: Any) -> Any:
    if value is None:
        return None
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(value)):  # fromisoformat takes 20260131, too
            raise ValueError
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError("not a date; write it YYYY-MM-DD") from None


def as_trackers(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    return [] if value in (None, ["none"]) else value


def as_signals(value: Any) -> Any:
    """USR1, SIGUSR1 or a list of such names."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list):
        raise ValueError("must be the name of a signal, such as USR1, or a list of names")
    full = [f"SIG{str(name).upper().removeprefix('SIG')}" for name in names]
    for name in full:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"{name} is no signal that a process can catch")
    return full


_OTHER_STARTS = {
    "eva": "activations of the data",
    "corda": "activations of the data",
    "lora_ga": "gradients of the data",
}
"""Initialisations of PEFT that a run does not make, and what they start from."""


def as_lora_init(value: Any) -> Any:
    """
    Raises:
        ValueError: an initialisation of PEFT's that is not offered; says why, and the way out.
    """
    if type(value) is int:
        raise ValueError("must be true or the name of an initialisation")
    if isinstance(value, str) and value.startswith("pissa_niter") and not re.fullmatch(r"pissa_niter_\d{1,3}", value):
        raise ValueError("write pissa_niter_16, or another number of iterations up to 999")
    if value is False:
        raise ValueError("false starts from random A and B, so the model would be another one before the first step")
    if value == "mica":
        raise ValueError("mica trains A only and keeps B frozen, which mtr does not do; use pissa or true")
    if isinstance(value, str) and value in _OTHER_STARTS:
        raise ValueError(
            f"{value} starts from {_OTHER_STARTS[value]}, which mtr does not collect; let PEFT make the adapter, save "
            "it, and name its folder in lora.init_from"
        )
    return value


def repository(name: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]{1,96}", name):
        raise ValueError("not the name of a Hub repository, owner/name: letters, digits, '-', '_' and '.'")
    return name


class Section(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """yes, on and true are 1 to Python, and never what somebody means by a number."""
        annotation = str(cls.model_fields[str(info.field_name)].annotation)
        takes_numbers = "bool" not in annotation and ("int" in annotation or "float" in annotation)
        values = value.values() if isinstance(value, dict) else [value]
        if takes_numbers and any(isinstance(one, bool) for one in values):
            raise ValueError("must be a number, not true or false")
        return value
