"""Claims: `mtr init` writes a recipe that loads and trains something, or says why it cannot; its lengths are those of
the data; template arguments are those under which most turns are trained; 4 bits and shorter turns are used only where
nothing else fits; no file is replaced unasked; without a terminal nothing is asked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from support.commands import check_refused
from support.paths import QUICKSTART, ROOT, SHARED, needs_shared
from support.rows import chat, conversation_row, copy_tokenizer
from support.templates import BEHAVIOURS

from mtr.cli.init import _named
from mtr.errors import UserError
from mtr.start.facts import Asked, Survey, positions_of
from mtr.start.init import fit, new_recipe
from mtr.start.settings import length_of_data
from mtr.start.survey import survey
from mtr.start.writing import Block, Line, recipe_text

Mtr = Callable[..., tuple[int, str, str]]
WriteRows = Callable[..., Path]
SHAPE = ROOT / "benchmarks" / "shapes" / "qwen3-8b" / "config.json"

values = st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False), st.none())
anything = st.one_of(values, st.lists(values, max_size=3), st.dictionaries(st.text(), values, max_size=3))


@given(anything, st.text(), st.text(), st.booleans())
@example(1, " ", " ", False)
@example("\xa0", "", "", False)
def test_a_recipe_says_its_values_whatever_its_comments_say(value: Any, comment: str, head: str, off: bool) -> None:
    lines = [Line("first", value, comment), Line("second", 1, off=off)]
    text = recipe_text([("head", head)], [Block("section", lines, comment), Block("empty", ())])
    wanted = {"first": value} if off else {"first": value, "second": 1}
    assert yaml.safe_load(text) == {"section": wanted, "empty": None}


def test_positions_are_those_with_the_scaling_of_rope() -> None:
    """As `sequence.max_length` is warned of in training."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    config = transformers.Qwen3Config(max_position_embeddings=32768, rope_parameters=rope)
    assert positions_of(config) == 131072
    assert positions_of(transformers.Qwen3Config(max_position_embeddings=0)) is None


# --- what is found in the data ----------------------------------------------------------------------------------------


def surveyed(model: Path, data: Path) -> Survey:
    return survey(_named(str(model), str(data), "auto"))


def test_the_longest_turn_decides_the_length(write_rows: WriteRows) -> None:
    rows = write_rows([conversation_row(turns) for turns in (1, 2, 40)])
    found = surveyed(QUICKSTART / "base", rows)
    lengths = found.report.lengths
    assert lengths is not None
    assert lengths.longest is not None
    length, reason = length_of_data(found)
    assert 512 < lengths.longest <= length == -(-lengths.longest // 512) * 512
    assert f"{lengths.longest:,} tokens" in reason
    assert found.report.turns == found.report.trained == 43


def test_a_model_of_few_positions_limits_the_length(write_rows: WriteRows, models: Callable[..., Path]) -> None:
    found = surveyed(models("qwen3", max_position_embeddings=128), write_rows([conversation_row(40)]))
    assert length_of_data(found)[0] == 128


def test_template_arguments_are_those_that_train_most(write_rows: WriteRows, tmp_path: Path) -> None:
    template = BEHAVIOURS["closed, and a switch opens it"].text
    tokenizer = copy_tokenizer(tmp_path / "closed", template)
    found = surveyed(tokenizer, write_rows([conversation_row()]))
    assert found.recipe.template == {"deliberate": "yes"}
    assert found.report.refused == {}
    unthinking = surveyed(tokenizer, write_rows([conversation_row(thinking=False)], "plain.jsonl"))
    assert unthinking.recipe.template == {}


def test_inline_history_goes_where_the_template_reads_it(write_rows: WriteRows) -> None:
    row = conversation_row()
    for message in row["messages"]:
        if thought := message.pop("reasoning_content", None):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    assert surveyed(QUICKSTART / "base", write_rows([row])).recipe.thinking.history == "respell"
    assert surveyed(QUICKSTART / "base", write_rows([conversation_row()])).recipe.thinking.history == "as_data"


def test_a_long_common_beginning_is_merged(write_rows: WriteRows) -> None:
    policy = {"role": "system", "content": "Count every coin. " * 40}
    alike = write_rows([chat(policy, *conversation_row(turns)["messages"]) for turns in (1, 2)])
    other = write_rows([conversation_row(turns) for turns in (1, 2)], "other.jsonl")
    texts = [made(QUICKSTART / "base", rows, "cpu") for rows in (alike, other)]
    assert [yaml.safe_load(text)["sequence"].get("merge") for text in texts] == ["step", None]


def test_what_is_lost_is_said(write_rows: WriteRows) -> None:
    text = made(QUICKSTART / "base", write_rows([conversation_row(), {"messages": 3}, {"text": "x"}]), "cpu")
    raw = yaml.safe_load(text)
    assert raw["data"]["on_bad_row"] == "skip"
    assert text.count("cannot be read: ") == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
        ({"dialogue": []}, "found: dialogue"),
        (chat({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, *chat()["messages"]), "images"),
    ],
    ids=["no assistant", "other columns", "images"],
)
def test_no_recipe_is_written_that_would_train_nothing(write_rows: WriteRows, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"--data: nothing can be trained of the 2 rows .*{said}"):
        made(QUICKSTART / "base", write_rows([row, row]), "cpu")


def test_the_steps_are_those_of_the_plan(mtr: Mtr, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = write_rows([*[conversation_row()] * 110, *[{"messages": 3}] * 10])
    text = made(QUICKSTART / "base", rows, "cpu")
    (tmp_path / "recipe.yaml").write_text(text)
    code, out, err = mtr("plan", tmp_path / "recipe.yaml", "--json")
    assert code == 0, err
    planned = json.loads(out)["run"]["steps"]
    assert int(re.findall(r"about (\d+) steps", text)[0]) == planned


def test_the_steps_of_a_stream_are_not_guessed(write_rows: WriteRows) -> None:
    found = surveyed(QUICKSTART / "base", write_rows([conversation_row()] * 120))
    stream = replace(found, report=replace(found.report, of_rows=None))
    text = new_recipe(Asked("model", "data", "recipe.yaml"), stream, "cpu", "auto", None)
    assert "about" not in text
    assert "not known how many steps" in " ".join(text.replace("#", " ").split())
    assert yaml.safe_load(text)["data"].get("eval") is None


def test_why_4_bits_is_said_only_where_it_is_so(write_rows: WriteRows) -> None:
    text = made(QUICKSTART / "base", write_rows([conversation_row()]), "H100", "qlora")
    assert "load_in_4bit: true" in text
    assert "do not fit" not in text  # it was asked for


def made(model: Path, data: Path, gpu: str | None, method: str = "auto") -> str:
    asked = Asked(str(model), str(data), "recipe.yaml")
    return new_recipe(asked, surveyed(model, data), gpu, method, None)


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3_14b(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """14 billion parameters: the shape of Qwen3-8B with more layers."""
    folder = copy_tokenizer(tmp_path_factory.mktemp("qwen3") / "14b")
    config = json.loads(SHAPE.read_text()) | {"num_hidden_layers": 66, "max_window_layers": 66}
    (folder / "config.json").write_text(json.dumps(config))
    return surveyed(folder, QUICKSTART / "eval.jsonl")


@pytest.mark.parametrize(
    ("gpu", "method", "wanted"),
    [
        ("H100 SXM", "auto", ("bfloat16", "lora", 13312)),
        ("H100 SXM", "full", None),
        pytest.param("L4", "auto", ("bfloat16", "qlora", 13312), marks=pytest.mark.slow),
        pytest.param("L4", "lora", None, marks=pytest.mark.slow),
    ],
)
def test_4_bits_only_where_16_do_not_fit(qwen3_14b: Survey, gpu: str, method: str, wanted: Any) -> None:
    if wanted is None:
        with pytest.raises(UserError, match=f"does not fit {gpu}"):
            fit(qwen3_14b, gpu, method, 13312)
        return
    found = fit(qwen3_14b, gpu, method, 13312)
    assert (found.dtype, found.method, found.max_length) == wanted
    assert found.max_tokens >= found.max_length
    assert "by estimate" in found.memory


@pytest.mark.slow
def test_turns_are_shortened_only_where_they_do_not_fit(qwen3_14b: Survey) -> None:
    found = fit(qwen3_14b, "L4", "auto", 131072)
    assert 1024 <= found.max_length < 131072


def test_a_cpu_says_what_is_too_much(qwen3_14b: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.start.init.available_memory", lambda _: 20 * 2**30)
    assert "too much" in fit(qwen3_14b, "cpu", "auto", 1024).memory  # 32 GiB of weights
    monkeypatch.setattr("mtr.start.init.available_memory", lambda _: 80 * 2**30)
    assert "too much" not in fit(qwen3_14b, "cpu", "auto", 1024).memory
    with pytest.raises(UserError, match="qlora needs a CUDA GPU"):
        fit(qwen3_14b, "cpu", "qlora", 1024)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_recipe_trains(mtr: Mtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(QUICKSTART / "eval.jsonl", tmp_path / "chats.jsonl")
    flags = ("--model", QUICKSTART / "base", "--data", "chats.jsonl", "--gpu", "cpu", "--output", "my.yaml")
    code, out, err = mtr("init", *flags)
    assert (code, out) == (0, ""), err
    assert yaml.safe_load((tmp_path / "my.yaml").read_text())["data"]["train"] == "chats.jsonl"
    assert (tmp_path / "my.yaml").read_text().startswith("# yaml-language-server: $schema=")
    assert mtr("audit", "my.yaml")[0] == 0
    assert mtr("plan", "my.yaml", "--json")[0] == 0
    code, _, err = mtr("train", "my.yaml", "training.max_steps=1", "generation.conversations=0")
    assert code == 0, err
    assert (tmp_path / "runs" / "my" / "adapter_config.json").exists()


def test_nothing_is_replaced_or_asked(mtr: Mtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("mine")
    flags = ("--model", QUICKSTART / "base", "--data", QUICKSTART / "eval.jsonl", "--gpu", "cpu")
    check_refused(mtr("init", *flags), "recipe.yaml exists", "--force")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    check_refused(mtr("init", "--output", "new.yaml"), "--model and --data must be given", "no terminal")
    check_refused(mtr("init", *flags[:4], "--gpu", "H900", "--output", "new.yaml"), "H900")
    check_refused(mtr("init", *flags, "--method", "lor", "--output", "new.yaml"), "--method")
    check_refused(mtr("init", *flags, "--data", "none.jsonl", "--output", "new.yaml"), "no such file: none.jsonl")
    code, out, _ = mtr("init", *flags, "--output", "-")
    assert (code, yaml.safe_load(out)["model"]["dtype"]) == (0, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_elsewhere_finds_its_pattern(mtr: Mtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here and now"
    folder.mkdir()
    shutil.copy(QUICKSTART / "eval.jsonl", folder / "chats.jsonl")
    monkeypatch.chdir(folder)
    flags = ("--model", QUICKSTART / "base", "--data", "*.jsonl", "--gpu", "CPU", "--output")
    for output, train in (("../there/r.yaml", str(folder / "*.jsonl")), ("r.yaml", "*.jsonl")):
        code, _, err = mtr("init", *flags, output)
        assert code == 0, err
        assert yaml.safe_load(Path(output).read_text())["data"]["train"] == train
    monkeypatch.chdir("/")
    assert mtr("audit", tmp_path / "there" / "r.yaml")[0] == 0


def test_nothing_is_asked_that_cannot_mend_a_wrong_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtr.cli import init
    from mtr.cli.views import asking

    def asked(*_: Any, **__: Any) -> str:
        raise AssertionError("asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asking, "can_ask", lambda: True)
    monkeypatch.setattr("typer.prompt", asked)
    with pytest.raises(UserError, match="no such model folder"):
        init._answers("./none", None, None, "auto")
    with pytest.raises(UserError, match="H900"):
        init._answers(str(QUICKSTART / "base"), None, "H900", "auto")


def test_questions_are_asked_until_the_answer_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtr.cli import init
    from mtr.cli.views import asking

    monkeypatch.chdir(tmp_path)
    shutil.copy(QUICKSTART / "eval.jsonl", tmp_path / "chats.jsonl")
    answers = iter(["./none", str(QUICKSTART / "base"), "chats.jsonl", "H900", "cpu"])
    asked: list[tuple[str, Any]] = []

    def answer(question: str, default: Any = None, **_: Any) -> str:
        asked.append((question.split()[0], default))
        return next(answers)

    monkeypatch.setattr(asking, "can_ask", lambda: True)
    monkeypatch.setattr("typer.prompt", answer)
    assert init._answers(None, None, None, "auto") == (str(QUICKSTART / "base"), "chats.jsonl", "cpu")
    assert [word for word, _ in asked] == ["Model", "Model", "Conversations", "GPU,", "GPU,"]
    assert asked[2][1] == "chats.jsonl"
    assert "no such model folder: ./none" in capsys.readouterr().err


TOKENIZERS = sorted((SHARED / "tokenizers").glob("*")) if SHARED.is_dir() else []
DATA = sorted((SHARED / "data").glob("*.jsonl")) if SHARED.is_dir() else []


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("data", DATA, ids=lambda path: path.stem)
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda path: path.name)
def test_recipes_of_real_data_audit_and_plan(mtr: Mtr, tmp_path: Path, tokenizer: Path, data: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    code, _, err = mtr("init", "--model", tokenizer, "--data", data, "--gpu", "L4", "--output", recipe)
    assert code == 0, err
    code, out, _ = mtr("audit", recipe, "--json")
    losses = json.loads(out)["losses"]
    assert code == (1 if losses else 0)
    assert all(loss in " ".join(recipe.read_text().replace("\n# ", " ").split()) for loss in losses)
    code, out, err = mtr("plan", recipe, "--json")
    assert code == 0, err
    assert json.loads(out)["untrained_turns"].keys() <= set(losses)
