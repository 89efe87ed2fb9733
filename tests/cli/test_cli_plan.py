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


def test_results_are_written_whole_or_not_at_all(
    mtr: Mtr, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.figure

    picture, known = tmp_path / "results" / "plan.png", tmp_path / "results" / "plan.json"
    picture.parent.mkdir()
    picture.write_text("old")

    def full(figure: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    code, _, err = mtr("plan", recipe, "--plot", picture, "--json", known)
    assert (code, err.startswith(f"error: --plot: {picture} cannot be written: ")) == (2, True)
    assert "No space left" in err
    assert picture.read_text() == "old"
    assert sorted(file.name for file in picture.parent.iterdir()) == ["plan.json", "plan.png"]
    assert json.loads(known.read_text())["rows"] == 7


def test_merged_rows_have_no_more_supervised_tokens_than_tokens(
    mtr: Mtr, write_recipe: Write, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = write_rows([conversation_row(2)] * 8)
    merged = write_recipe(data={"train": str(rows)}, sequence={"merge": "step"}, training={"conversations_per_step": 8})
    code, out, _ = mtr("plan", merged)
    supervised = next(line for line in out.splitlines() if line.startswith("supervised"))
    assert code == 0
    assert 0 < int(supervised.split("(")[1].removesuffix("%)")) < 100


def test_rows_that_cannot_be_read_are_counted(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    rows = write_rows([conversation_row(1), *[{"messages": 1}] * 9])
    code, out, _ = mtr("plan", write_recipe(data={"train": str(rows), "on_bad_row": "skip"}), "--gpu", "l4")
    assert code == 0
    assert "rows that cannot be read, 9 in all" in out
    assert "9 of 10 rows (90%) cannot be read" in " ".join(out.split())


def test_each_share_of_the_peak_is_said_with_its_gpus() -> None:
    from dataclasses import replace

    from mtr.cli.views.plan import _assumptions
    from mtr.plan.duration import Duration
    from mtr.plan.gpus import find_gpu
    from mtr.plan.result import GpuPlan

    fast, small = (GpuPlan(find_gpu(name), 1) for name in ("H100", "4090"))
    fast = replace(fast, duration=Duration((0.25, 0.45), (1.0, 2.0)))
    both = next(iter(_assumptions([fast, replace(small, duration=Duration((0.175, 0.405), (1.0, 2.0)))])))
    assert "at 25% to 45% (H100 SXM), 18% to 40% (RTX 4090) of the dense 16-bit peak" in both
    assert "at 25% to 45% of the dense" in next(iter(_assumptions([fast])))


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
        (["--plot", "plan.pdf", "--json", "./plan.pdf"], "--plot and --json name the same file, plan.pdf; name two"),
        (["--price", "inf"], "'--price'"),
        (["--price", "nan"], "'--price'"),
    ],
)
def test_wrong_options_are_one_line(mtr: Mtr, recipe: Path, options: list[str], words: str) -> None:
    check_refused(mtr("plan", recipe, *options), words)
