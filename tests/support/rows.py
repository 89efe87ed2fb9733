"""Rows and tokenizers to try things on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from support.paths import QUICKSTART


def conversation_row(turns: int = 3, thinking: bool = True) -> dict[str, Any]:
    """A row in the quickstart's manner, each answer with its thinking."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Ana gets {turn + 2} more."})
        answer: dict[str, Any] = {"role": "assistant", "content": f"Ana has {3 * turn + 2} coins now."}
        if thinking:
            answer["reasoning_content"] = f"Before: {turn}. {turn} + 2 = {turn + 2}."
        messages.append(answer)
    return {"messages": messages}


def copy_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A folder with the quickstart's tokenizer alone, with another chat template if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / "base" / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def chat(*messages: Any) -> dict[str, Any]:
    """A row of these messages."""
    return {"messages": list(messages)}


USER = {"role": "user", "content": "Ana has 4 coins."}
ANSWER = {"role": "assistant", "content": "Ana has 4 coins now."}
