"""Claims: a checkpoint for images and text is trained as any other is: its text decoder learns, and all else comes out
bit for bit as it was. What a run leaves loads into the class that the checkpoint names, with the logits of
the model that was trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.image_text import IMAGE_TEXT, save_image_text
from support.paths import QUICKSTART
from support.processes import in_processes

from mtr.attention.model_parts import idle_parts
from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe
from mtr.training.checkpoint import load_weights
from mtr.training.loop import train

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
LORA = {"r": 4, "target_modules": "all-linear"}
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="session")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`wrapped("gemma3")` is a folder with a tiny model of that kind and the quickstart's tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_image_text(kind, QUICKSTART / "base", made[kind])
        return made[kind]

    return make


@pytest.fixture
def recipe_of(wrapped: Callable[[str], Path], write_recipe: Recipes, tmp_path: Path) -> Recipes:
    """`recipe_of("run", kind="gemma3", ...)` trains a tiny model in that folder, three conversations a step."""
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:9]))

    def write(name: str, kind: str, **sections: Any) -> Path:
        training = {
            "output_dir": str(tmp_path / name),
            "max_steps": 3,
            "save_steps": 3,
            "conversations_per_step": 3,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            **sections.pop("training", {}),
        }
        model = {"name_or_path": str(wrapped(kind)), "dtype": "float32"}
        data = {"train": str(tmp_path / "few.jsonl"), **sections.pop("data", {})}
        return write_recipe(model=model, training=training, data=data, date="2026-01-31", **sections)

    return write


@pytest.fixture
def go(recipe_of: Recipes, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, kind: str, resume: bool = False, **sections: Any) -> Path:
        train(load_recipe(recipe_of(name, kind, **sections)), resume=resume)
        return tmp_path / name

    return run


Go = Callable[..., Path]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def trained(run: Path) -> Any:
    """The model of a run's last checkpoint, as the run itself had it."""
    model = load_model(load_recipe(run / "recipe.yaml"), torch.device("cpu"))
    load_weights(run / "checkpoint-3", model)
    return model


def named_class(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def towers(model: Any) -> dict[str, torch.Tensor]:
    """All tensors outside of the text decoder and its head."""
    state = model.state_dict()
    return {name: state[name] for name in state if name.startswith(tuple(f"{part}." for part in idle_parts(model)))}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_an_adapter_loads_into_the_class_that_the_checkpoint_names(
    go: Go, mtr: Mtr, wrapped: Callable[[str], Path], kind: str
) -> None:
    from peft import PeftModel

    run, base = go("run", kind, lora=LORA), wrapped(kind)
    names = load_file(run / "adapter_model.safetensors")
    assert names
    assert all(".language_model." in name for name in names)
    wanted = logits(trained(run))
    for loader in (named_class(base), transformers.AutoModelForImageTextToText):
        model = loader.from_pretrained(str(base), dtype=torch.float32)
        plain = logits(model)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(model, str(run))), wanted)
        assert (wanted - plain).abs().max() > 1e-2

    assert mtr("merge", run)[::2] == (0, "")
    merged = named_class(base).from_pretrained(str(run / "merged"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert same(towers(merged), towers(named_class(base).from_pretrained(str(base), dtype=torch.float32)))
    assert named_class(run / "merged") is named_class(base)


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_all_weights_of_the_text_decoder_are_trained_and_no_others(
    go: Go, wrapped: Callable[[str], Path], kind: str
) -> None:
    run = go("run", kind, lora=None)
    base, tuned = (transformers.AutoModelForImageTextToText.from_pretrained(str(f)) for f in (wrapped(kind), run))
    assert type(tuned) is type(base) is named_class(run)
    assert same(towers(tuned), towers(base))
    torch.testing.assert_close(logits(tuned), logits(trained(run)))
    before, idle = base.state_dict(), towers(base)
    text = {name: tensor for name, tensor in tuned.state_dict().items() if name not in idle and tensor.dim() > 1}
    assert text
    assert not any(torch.equal(before[name], text[name]) for name in text)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differs(one: Path, other: Path) -> float:
    """The largest relative difference of losses and gradient norms, step by step."""
    pairs = [(a[key], b[key]) for a, b in zip(lines(one), lines(other), strict=True) for key in ("loss", "grad_norm")]
    assert len(pairs) >= 4
    return float(max(abs(a - b) / abs(a) for a, b in pairs))


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_one_pass_is_one_pass_per_turn(go: Go, kind: str) -> None:
    one = go("one", kind, lora=LORA, sequence={"strategy": "single_pass"})
    plain = go("plain", kind, lora=LORA, sequence={"strategy": "per_turn_unpacked"})
    assert differs(one, plain) < 2e-5


def test_a_run_resumes_bit_for_bit(go: Go) -> None:
    whole = go("whole", "qwen3_vl", lora=LORA, training={"save_steps": 1})
    part = go("part", "qwen3_vl", lora=LORA, training={"save_steps": 1})
    shutil.rmtree(part / "checkpoint-3")
    go("part", "qwen3_vl", resume=True, lora=LORA, training={"save_steps": 1})
    assert same(*(load_file(folder / "adapter_model.safetensors") for folder in (whole, part)))


def test_held_out_turns_are_generated(go: Go) -> None:
    """The text of an image-text model, from its own cache and positions."""
    sections = {
        "data": {"eval": str(QUICKSTART / "eval.jsonl")},
        "generation": {"conversations": 2, "max_new_tokens": 4},
    }
    run = go("run", "qwen3_vl", lora=LORA, **sections)
    generated = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert {turn["step"] for turn in generated} == {0, 3}


@pytest.mark.distributed
def test_a_sharded_model_comes_out_whole(recipe_of: Recipes, tmp_path: Path) -> None:
    train(load_recipe(recipe_of("one", "gemma3", lora=None)))
    recipe = recipe_of("two", "gemma3", lora=None, training={"parallel": "fsdp2"})
    done = in_processes(2, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert differs(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = (
        transformers.AutoModelForImageTextToText.from_pretrained(str(tmp_path / name)) for name in ("one", "two")
    )
    assert same(towers(one), towers(two))
    torch.testing.assert_close(logits(two), logits(one), rtol=1e-3, atol=1e-4)


# --- files of the processor -------------------------------------------------------------------------------------------


def test_a_processor_goes_along_and_gives_its_template(go: Go, mtr: Mtr, tmp_path: Path, recipe_of: Recipes) -> None:
    """As published: the template lies with the processor, reads text from lists only, and the tokenizer has none."""
    base = tmp_path / "base"
    save_image_text("qwen3_vl", QUICKSTART / "base", base)
    (base / "chat_template.jinja").unlink()
    lists_only = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
        "{{ c['text'] }}{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (base / "chat_template.json").write_text(json.dumps({"chat_template": lists_only}))
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    rows = tmp_path / "plain.jsonl"
    user, answer = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "No"}
    pictured = {"role": "user", "content": [{"type": "image"}, *user["content"]]}
    rows.write_text("".join(json.dumps({"messages": [first, answer]}) + "\n" for first in (user, pictured, user)))
    data = {"train": str(rows), "on_bad_row": "skip"}
    recipe = load_recipe(recipe_of("run", "qwen3_vl", data=data, lora={"r": 2}))
    train(recipe.replace(model={"name_or_path": str(base)}))
    run = tmp_path / "run"
    (rejected,) = map(json.loads, (run / "rejects.jsonl").read_text().splitlines())
    assert "images, videos or sound, and only text is trained" in rejected["reason"]
    assert (run / "chat_template.jinja").read_text() == lists_only
    assert mtr("merge", run)[::2] == (0, "")
    for file in ("preprocessor_config.json", "chat_template.json"):
        assert (run / "merged" / file).read_text() == (base / file).read_text()
