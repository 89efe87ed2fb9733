"""Claims: the tokenizer beside trained weights is the one that came with the model, its chat template letter by letter,
in no more bytes than it came in; no checkpoint has a card with paths of the machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rows import conversation_row

from mtr.recipe.loading import load_recipe
from mtr.training import checkpoint
from mtr.training.loop import train

Write = Callable[..., Path]


class Weights(torch.nn.Module):
    """Stands in for a model that has been trained."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "README.md").write_text("as PEFT writes it")


@needs_shared
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3", "r1-distill-qwen"])
def test_a_copy_is_the_same_tokenizer_and_no_larger(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    source = SHARED / "tokenizers" / name
    checkpoint.save_model(Weights(), AutoTokenizer.from_pretrained(str(source)), tmp_path / "copy")
    saved = tmp_path / "copy" / "tokenizer.json"
    assert saved.stat().st_size <= (source / "tokenizer.json").stat().st_size
    assert json.loads(saved.read_text()) == json.loads((source / "tokenizer.json").read_text())
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    again = AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    text = "<think>\nTwo  and two: 4, 名前 \U0001f600</think>"
    first = AutoTokenizer.from_pretrained(str(source))
    assert again(text).input_ids == first(text).input_ids
    assert again.special_tokens_map == first.special_tokens_map


def test_every_folder_of_a_run_has_the_tokenizer_and_no_path(
    write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    compact = json.dumps(json.loads((base / "tokenizer.json").read_text()), ensure_ascii=False, separators=(",", ":"))
    (base / "tokenizer.json").write_text(compact, encoding="utf-8")
    rows = write_rows([conversation_row(turns=2) for _ in range(4)])
    train(
        load_recipe(
            write_recipe(
                model={"name_or_path": str(base)},
                data={"train": str(rows)},
                training={"max_steps": 2, "save_steps": 1, "conversations_per_step": 1},
            )
        )
    )
    run = tmp_path / "run"
    text = "Ana has 4 coins."
    wanted = AutoTokenizer.from_pretrained(str(base))(text).input_ids
    for folder in (run, run / "checkpoint-1", run / "checkpoint-2"):
        assert (folder / "tokenizer.json").stat().st_size <= len(compact.encode())
        assert (folder / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()
        assert AutoTokenizer.from_pretrained(str(folder))(text).input_ids == wanted
        AutoPeftModelForCausalLM.from_pretrained(str(folder))
        cards = [path for path in folder.glob("*.md") if str(tmp_path) in path.read_text()]
        assert cards == []
    assert "trained by mtr" in (run / "README.md").read_text()
    assert not (run / "checkpoint-1" / "README.md").exists()
