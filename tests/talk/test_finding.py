"""Claims: whatever holds a model that was trained is found with its base and its recipe; what holds none says what to
give instead; nothing is loaded as pickle, and no recipe is taken from a folder that is no run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub import local_hub
from support.paths import QUICKSTART
from support.rows import copy_tokenizer
from support.runs import trained_run

from mtr.errors import UserError
from mtr.model.completions import GREEDY, Sampling
from mtr.talk.finding import Base, find_voice
from mtr.talk.loading import load_speakers
from mtr.talk.session import Limits, Session
from mtr.training.merge import merge

CPU = torch.device("cpu")
BASE = QUICKSTART / "base"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finding")
    run = trained_run(folder, training={"output_dir": str(folder / "run"), "max_steps": 2, "save_steps": 1})
    merge(run, run / "merged", "float32")
    return run


@pytest.mark.parametrize("part", ["", "checkpoint-1", "merged"])
def test_a_run_its_checkpoints_and_its_merged_model(run: Path, part: str) -> None:
    found = find_voice(str(run / part))
    assert (found.kind, found.base) == ("model" if part == "merged" else "LoRA adapter", Base(str(BASE)))
    assert found.recipe is not None
    assert found.recipe.model.name_or_path == str(BASE)
    speakers = load_speakers(found, CPU, compare=True)
    assert [voice.name for voice in speakers.voices] == ["base", "tuned"]
    assert (speakers.model.dtype, speakers.positions) == (torch.float32, 1024)
    ids = torch.arange(3, 40)[None]
    logits = []
    for voice in speakers.voices:
        with torch.no_grad(), voice.speaking() as model:
            logits.append(model(ids).logits)
    assert (logits[0] - logits[1].to(logits[0])).abs().max() > 1e-2


def test_the_merged_model_is_the_adapter(run: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapter, merged = (load_speakers(find_voice(str(run / p)), CPU).model(ids).logits for p in ("", "merged"))
    assert torch.allclose(adapter, merged, atol=1e-4)


def test_an_adapter_without_a_run_has_the_tokenizer_of_its_base(run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    found = find_voice(str(tmp_path))
    assert (found.base, found.recipe) == (Base(str(BASE)), None)
    speakers = load_speakers(found, CPU)
    assert speakers.renderer.tokenizer.name_or_path == str(BASE)
    assert speakers.model.dtype == torch.bfloat16, "as the base is stored"


def test_a_model_of_nobody_knows_no_base(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: another}")  # beside it by chance
    found = find_voice(str(tmp_path / "model"))
    assert (found.kind, found.base, found.recipe) == ("model", None, None)
    with pytest.raises(UserError, match=r"--compare: nothing says what .* was trained from; give its run"):
        load_speakers(found, CPU, compare=True)


def emptied(run: Path) -> Path:
    (run / "adapter_config.json").unlink()
    return run


def nothing_left(run: Path) -> None:
    for checkpoint in emptied(run).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda run: shutil.rmtree(run), "no such folder; give the output_dir of a run"),
        (emptied, "the run has not finished; talk to its newest checkpoint: mtr chat"),
        (nothing_left, "neither an adapter"),
        (lambda run: (emptied(run) / "config.json").write_text("{}"), "no .safetensors file"),
        (lambda run: (run / "adapter_config.json").write_text("["), "not the config of an adapter"),
        (lambda run: edit(run, peft_type="IA3"), "only LoRA adapters can be loaded and merged, this one is IA3"),
        (lambda run: edit(run, base_model_name_or_path=None), "base_model_name_or_path is None; name the base"),
        (lambda run: edit(run, base_model_name_or_path=str(run / "none")), "the base model cannot be loaded: "),
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b"x"), "the adapter cannot be loaded"),
        (lambda run: pickled(run), "holds its adapter only as pickle"),
    ],
)
def test_what_cannot_be_talked_to_is_said(
    run: Path, tmp_path: Path, prepare: Callable[[Path], Any], words: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    prepare(copy)
    with pytest.raises(UserError, match=re.escape(words)):
        load_speakers(find_voice(str(copy)), CPU)


def edit(run: Path, **keys: Any) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, **keys}))


def pickled(run: Path) -> None:
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")


def test_a_file_is_no_voice(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="a file; give the folder of a run"):
        find_voice(str(tmp_path / "recipe.yaml"))


def test_an_unknown_user_is_no_folder() -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_voice("~nobody-of-this-name/run")


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({"do_sample": False, "temperature": 0.6}, GREEDY),
        ({"do_sample": True}, Sampling(1.0, 1.0, 0)),
        ({"do_sample": True, "temperature": 2, "top_p": 1, "top_k": 20.0}, Sampling(2.0, 1.0, 20)),
    ],
)
def test_a_generation_config_is_drawn_from_as_it_is_written(
    tmp_path: Path, said: dict[str, Any], sampling: Sampling
) -> None:
    """Numbers of either kind, and beams, which nobody can watch, or not."""
    shutil.copytree(BASE, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 2, "num_beams": 3, **said}))
    speakers = load_speakers(find_voice(str(tmp_path / "model")), CPU)
    assert speakers.sampling == sampling
    (answer,) = Session(speakers, Limits(8, speakers.sampling, 0)).ask("Paul has 23 nuts.")
    assert 0 < answer.completion_tokens <= 8


def test_four_bits_need_a_gpu_and_there_is_a_way_out(run: Path) -> None:
    found = find_voice(str(run))
    assert found.recipe is not None
    recipe = found.recipe.replace(model={"load_in_4bit": True})
    with pytest.raises(UserError, match=r"load_in_4bit .* needs a CUDA device, .*\(mtr merge .*\) and talk to"):
        load_speakers(type(found)(found.name, found.where, found.adapter, found.base, recipe), CPU)


def test_code_of_a_repository_is_run_only_if_the_recipe_says_so(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        load_speakers(find_voice(str(tmp_path / "model")), CPU)
    assert not (tmp_path / "ran").exists()


def test_arguments_of_the_runs_recipe_reach_the_template(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    copy_tokenizer(tmp_path / "run", "{{ mood }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("template: {}", "template: {mood: glad}"))
    renderer = load_speakers(find_voice(str(tmp_path / "run")), CPU).renderer
    assert renderer.tokenizer.decode(renderer.prompt([{"role": "user", "content": "Hm."}])) == "gladHm.<|im_end|>"


# --- on the Hub -------------------------------------------------------------------------------------------------------


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        with pytest.raises(UserError, match="nobody/nothing is no local path, and the Hub shows you no model"):
            find_voice("nobody/nothing")
        assert len(hub.asked) == 1


def test_an_adapter_on_the_hub_is_downloaded_without_pickles(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(run / "checkpoint-1")

    monkeypatch.setattr("mtr.talk.finding.find", lambda _: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file, **_: str(run / file))
    found = find_voice("owner/adapter")
    assert (found.name, found.where, found.base) == ("owner/adapter", str(run / "checkpoint-1"), Base(str(BASE)))
    assert not any(fnmatch(file, p) for p in asked["owner/adapter"] for file in ("adapter_model.bin", "a.pt", "x.py"))
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: None)
    assert (find_voice("owner/model").kind, find_voice("owner/model").where) == ("model", "owner/model")
