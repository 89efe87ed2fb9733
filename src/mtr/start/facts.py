"""What `mtr init` is asked for, and what it finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mtr.attention.model_parts import text_config
from mtr.checks.data_report import DataReport
from mtr.model.config import positions
from mtr.recipe.sections import Recipe

Method = Literal["lora", "qlora", "full"]


@dataclass(frozen=True)
class Asked:
    """Spelled as it is given."""

    model: str
    data: str
    output: str
    """The recipe."""
    data_format: str = "auto"


@dataclass(frozen=True)
class Survey:
    recipe: Recipe
    """Of model and data, with the template's arguments and the spelling of history; all else is default."""
    report: DataReport
    config: Any | None
    """Of the model; None where there is only a tokenizer."""
    strategy: str
    """In words: one pass, or why not."""
    shared_prefix: int
    """Tokens with which the first rows all begin."""

    @property
    def all_rows(self) -> bool:
        """Whether every row was looked at."""
        return self.report.rows == self.report.of_rows

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model is made for, as its config says."""
        return positions_of(self.config)


def positions_of(config: Any | None) -> int | None:
    """Those that training warns beyond; None where there is no config, or none in it."""
    return None if config is None else max(0, positions(text_config(config)) or 0) or None


@dataclass(frozen=True)
class Fit:
    """What of a model fits a device."""

    device: str
    """In words, for the head of the recipe."""
    dtype: str
    on_cuda: bool
    method: Method
    max_length: int
    max_tokens: int
    memory: str
    """What it takes, in words; empty if that is not known."""
    reason_of_bits: str = ""
    """Why 4 bits, where nobody asked for them."""
