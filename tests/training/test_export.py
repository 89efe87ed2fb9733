"""Claims: an adapter gives the same logits through PEFT as merged, and the merged folder loads with transformers alone;
what cannot be merged is refused; the model card says where the model comes from and holds no path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART
from support.recipes import quickstart_recipe
from support.rows import conversation_row

import mtr.training.merge
from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.merge import merge
from mtr.training.model_card import front_matter, write_model_card
from mtr.training.state import RunState

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(write_recipe: Recipes, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A run of two steps at a high learning rate; returns its folder."""

    def go(**sections: Any) -> Path:
        rows = write_rows([conversation_row(turns=2) for _ in range(4)])
        training = {"learning_rate": 0.05, "max_steps": 2, "conversations_per_step": 2, "lr_scheduler_type": "constant"}
        training |= {"gradient_checkpointing": False, **sections.pop("training", {})}
        data = {"train": str(rows), **sections.pop("data", {})}
        train(load_recipe(write_recipe(data=data, training=training, **sections)))
        return tmp_path / "run"

    return go


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run as `trained()` leaves, for tests that copy it."""
    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(conversation_row(turns=2)) + "\n" for _ in range(4)))
    training = {"learning_rate": 0.05, "conversations_per_step": 2, "lr_scheduler_type": "constant"}
    training |= {"gradient_checkpointing": False}
    train(load_recipe(quickstart_recipe(folder, data={"train": str(rows)}, training=training)))
    return folder / "run"


@pytest.fixture
def copied(trained_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("quickstart", {}),
    "rslora": ("quickstart", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 8}}),
    "dora": ("quickstart", {"use_dora": True, "r": 4}),
    "tied head": ("quickstart", {"modules_to_save": ["lm_head"]}),
    "tied embeddings": ("quickstart", {"modules_to_save": ["embed_tokens"]}),
    "tied target": ("quickstart", {"target_modules": ["q_proj", "lm_head"]}),
    "experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_and_merged_model_say_the_same(trained: Trained, models: Callable[..., Path], kind: str) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture, lora = KINDS[kind]
    name = str(QUICKSTART / "base" if architecture == "quickstart" else models(architecture))
    run = trained(lora=lora, model={"name_or_path": name})
    result = merge(run, run / "merged", "float32")
    assert result["difference"] <= result["tolerance"]
    ids = torch.arange(40).view(2, 20)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)(ids).logits
    adapter = AutoPeftModelForCausalLM.from_pretrained(str(run), dtype=torch.float32)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(str(run / "merged"), dtype=torch.float32)(ids).logits
    scale = adapter.abs().max()
    assert (adapter - merged).abs().max() < 1e-5 * scale
    assert (adapter - base).abs().max() > 1e-2 * scale, "nothing was trained, so nothing was compared"
    tokenizer = AutoTokenizer.from_pretrained(str(run / "merged"))
    assert tokenizer.chat_template == (QUICKSTART / "base" / "chat_template.jinja").read_text()
    names = {path.name for path in (run / "merged").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert not any(name.endswith(".bin") or name.startswith("adapter") for name in names)


def test_the_command_merges_a_run_and_a_checkpoint(trained: Trained, mtr: Mtr, tmp_path: Path) -> None:
    run = trained(training={"save_steps": 1})
    code, out, err = mtr("merge", run)
    assert (code, err) == (0, "")
    assert "merged logits equal the adapter's within" in out
    assert "as bfloat16 within" in out, "the base model's own dtype"
    assert (run / "merged" / "model.safetensors").exists()
    code, out, _ = mtr("merge", run / "checkpoint-1", "--output", tmp_path / "one", "--dtype", "float32")
    assert code == 0
    assert f"merged        {tmp_path / 'one'}" in out


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda run: (run / "merged").mkdir() or (run / "merged" / "x").write_text("mine"), "is not empty"),
        (
            lambda run: edit(run, peft_type="PREFIX_TUNING"),
            "only LoRA adapters can be loaded and merged, this one is PREFIX",
        ),
        (lambda run: edit(run, base_model_name_or_path=str(run / "none")), "the base model cannot be loaded"),
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b"x"), "the adapter cannot be loaded"),
    ],
)
def test_what_cannot_be_merged_is_refused(copied: Path, mtr: Mtr, prepare: Callable[[Path], Any], words: str) -> None:
    run = copied
    prepare(run)
    code, out, err = mtr("merge", run)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def edit(run: Path, **keys: Any) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, **keys}))


def test_whole_weights_need_no_merging(trained: Trained, mtr: Mtr) -> None:
    code, _, err = mtr("merge", trained(lora=None, training={"learning_rate": 1e-4}))
    assert code == 2
    assert "holds full weights, so there is nothing to merge" in err


def test_a_merge_that_changes_the_model_is_seen(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other direction: the check can fail."""
    run = copied
    logits = mtr.training.merge._logits
    calls = iter(range(10))
    monkeypatch.setattr(mtr.training.merge, "_logits", lambda *a: logits(*a) * (1.0 + 0.01 * (next(calls) == 1)))
    with pytest.raises(UserError, match="merging changed the model: logits differ by"):
        merge(run, run / "merged")
    assert not (run / "merged").exists()


def test_the_model_card_says_where_it_comes_from_and_no_path(
    trained: Trained, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    held_out = write_rows([conversation_row()], "held_out.jsonl")
    run = trained(data={"eval": str(held_out)}, generation={"conversations": 1, "max_new_tokens": 2})
    card = (run / "README.md").read_text()
    for words in (
        "library_name: peft",
        "LoRA adapter of `base`",
        "- data: `rows.jsonl`",
        "- evaluation data: `held_out.jsonl`",
        "| steps | 2 |",
        "torch 2.",
        "in one pass per conversation.",
    ):
        assert words in card
    assert "learning_rate: 0.05" in card
    assert str(tmp_path) not in card
    assert str(QUICKSTART) not in card
    recipe = load_recipe(run / "recipe.yaml", ["sequence.strategy=per_turn"])
    write_model_card(tmp_path, "run", recipe, RunState(tmp_path))
    assert "in one pass per turn." in (tmp_path / "README.md").read_text()


def test_a_hub_model_is_named_in_the_card(tmp_path: Path) -> None:
    assert "base_model: Qwen/Qwen3-8B" in front_matter("Qwen/Qwen3-8B", "peft")
    assert not any("base_model" in line for line in front_matter(str(tmp_path), "peft"))
