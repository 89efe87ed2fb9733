"""Claims: `mtr plan` prints what the contract of its JSON promises; its report fits 80 columns, in ASCII too, and shows
histograms; it draws a picture; wrong options are one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import check_refused
from support.rows import conversation_row, copy_tokenizer

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture
def recipe(write_recipe: Write, write_rows: Write) -> Path:
    """With a row that is bad and turns that are too long."""
    rows = [*(conversation_row(turns) for turns in (1, 2, 3, 5, 8, 13)), {"messages": 1}]
    return write_recipe(
        data={"train": str(write_rows(rows)), "on_bad_row": "skip"},
        lora={"r": 4},
        model={"dtype": "bfloat16"},
        sequence={"max_length": 200},
    )


def test_json_has_the_keys_of_the_contract(mtr: Mtr, recipe: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    code, out, err = mtr("plan", recipe, "--json", "--gpu", "l4", "--price", "2", "--plot", picture)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["rows"] == 7
    assert found["turns"] + sum(found["untrained_turns"].values()) == 32
    assert list(found["untrained_turns"]) == ["longer than sequence.max_length (200)"]
    assert set(found["num_tokens"]) == {"single_pass", "per_turn", "supervised"}
    assert set(found["flops"]) == {"single_pass", "per_turn"}
    assert found["speedup_limit"] == found["flops"]["per_turn"] / found["flops"]["single_pass"]
    assert found["history"] == "dropped"
    assert found["verdict"].startswith("One pass needs ")
    (gpu,) = found["gpus"]
    assert gpu["memory"]["bytes"][0] < gpu["memory"]["bytes"][1]
    assert gpu["seconds"][0] < gpu["seconds"][1]
    assert gpu["cost"] == pytest.approx([2 * seconds / 3600 for seconds in gpu["seconds"]])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_report_fits_80_columns(mtr: Mtr, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = mtr("plan", recipe, "--gpu", "h100-sxm", "--gpu", "rtx-pro-6000", "--price", "1.25")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for words in (
        "turns that are not trained",
        "longer than sequence.max_length (200)",
        "rows that cannot be read",
        "tokens of one pass by role",
        "thinking, trained",
        "query-key pairs",
        "RTX PRO 6000",
        "verdict",
    ):
        assert words in out, words
    assert "█" in out
    assert "…" not in out  # nothing is cut


def test_a_terminal_without_unicode_gets_ascii(recipe: Path) -> None:
    import io

    from rich.console import Console

    from mtr.cli.views.plan import show_plan
    from mtr.plan.planning import plan
    from mtr.recipe.loading import load_recipe

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    show_plan(plan(load_recipe(recipe), 3), Console(file=file, width=80, soft_wrap=True, highlight=False))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "#" in text
    assert "3 of the 7 of an epoch" in text
    assert "extrapolated from the sample" in text


def test_a_tokenizer_alone_will_do(mtr: Mtr, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(model={"name_or_path": str(copy_tokenizer(tmp_path / "tokenizer"))})
    code, out, err = mtr("plan", recipe, "--rows", 5)
    assert (code, err) == (0, "")
    assert "has no config.json, so FLOPs, memory and time are not known" in " ".join(out.split())
    assert "times fewer tokens" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h900"], "--gpu: 'h900' is no GPU that mtr knows"),
        (
            ["--gpu", "l4", "--gpu", "t4", "--price", "1", "--price", "2", "--price", "3"],
            "--price: 3 prices for 2 GPUs",
        ),
        (["--plot", "plan.gif"], "--plot: plan.gif must end in .png, .svg or .pdf"),
    ],
)
def test_wrong_options_are_one_line(mtr: Mtr, recipe: Path, options: list[str], words: str) -> None:
    check_refused(mtr("plan", recipe, *options), words)
