"""Claims: a bad recipe, path, key or option is answered before torch and transformers are imported, in less than a
second of the processor's time, with one line and exit code 2.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import WITHOUT_HEAVY_IMPORTS
from support.paths import QUICKSTART
from support.rows import copy_tokenizer

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

BAD: dict[str, tuple[str, str]] = {
    "recipe": ("train {tmp}/none.yaml", "no such recipe file"),
    "recipe that is a folder": ("verify {tmp}", "cannot be read"),
    "recipe that is a device": ("inspect /dev/zero", "not a regular file"),
    "recipe that is no YAML": ("train {tmp}/broken.yaml", "not valid YAML"),
    "nested 5,000 deep": ("bench {tmp}/deep.yaml", "nested more than 50 deep"),
    "key": ("train {recipe} trainig.seed=1", "did you mean 'training'?"),
    "value": ("train {recipe} lora.r=100000000", "'lora.r': Input should be less than or equal to 65536"),
    "override": ("audit {recipe} data.train.7.path=x", "is not an index into a list of 1"),
    "data file": ("train {recipe} data.train={tmp}/none.jsonl", "data: no such file: {tmp}/none.jsonl"),
    "data file for evaluation": ("train {recipe} data.eval=trian.jsonl", "data: no such file: trian.jsonl"),
    "pattern": ("verify {recipe} data.train={tmp}/*.parquet", "data: no file matches {tmp}/*.parquet"),
    "pattern that is none": ("train {recipe} data.train={tmp}/a/**b.jsonl", "data: {tmp}/a/**b.jsonl is no pattern"),
    "folder without data": ("inspect {recipe} data.train={tmp}/empty", "{tmp}/empty: no data file in this folder"),
    "kind of data": ("audit {recipe} data.train={tmp}/broken.yaml", "{tmp}/broken.yaml: unknown file type"),
    "model folder": ("bench {recipe} model.name_or_path={tmp}/none", "no such model folder: {tmp}/none"),
    "folder without a model": (
        "train {recipe} model.name_or_path={tmp}/empty",
        "no tokenizer can be loaded from {tmp}",
    ),
    "folder without a config": ("verify {recipe} model.name_or_path={tmp}/bare", "no model config at {tmp}/bare"),
    "folder without weights": ("train {recipe} model.name_or_path={tmp}/light", "no weights can be loaded from {tmp}"),
    "adapter": (
        "train {recipe} lora.init_from={tmp}/none",
        "lora.init_from: {tmp}/none holds no adapter that can be read",
    ),
    "folder without an adapter": ("train {recipe} lora.init_from={tmp}/empty", "it has no adapter_config.json"),
    "processes, data file": ("train {recipe} data.train={tmp}/none.jsonl --num-processes 2", "data: no such file"),
    "tokenizer": ("audit {tmp}/none", "no such model folder: {tmp}/none"),
    "folder without a tokenizer": ("audit {tmp}/empty", "no tokenizer can be loaded from {tmp}/empty"),
    "run": ("merge {tmp}/none", "{tmp}/none: no such folder"),
    "folder without a run": ("merge {tmp}/empty", "no adapter_config.json"),
    "attention": ("verify {recipe} --attention flash", "--attention: 'flash' is not one of flex, varlen, segment"),
    "attention of bench": ("bench {recipe} --attention flash", "--attention: 'flash' is not one of"),
    "dtype": ("verify {recipe} --dtype int8", "--dtype: 'int8' is not one of float64, float32"),
    "json in a file": ("verify {recipe} --json {recipe}/x.json", "--json: {recipe}/x.json cannot be written"),
    "json that is a folder": ("bench {recipe} --json {tmp}/empty", "cannot be written: it is a folder"),
    "plot in a file": ("bench {recipe} --plot {recipe}/x.png", "--plot: {recipe}/x.png cannot be written"),
    "kind of plot": ("bench {recipe} --plot {tmp}/x.txt", "must end in .png, .svg or .pdf"),
    "option": ("train {recipe} --nonsense", "--nonsense"),
}
MEASURED = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n" + WITHOUT_HEAVY_IMPORTS


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    copy_tokenizer(tmp_path / "bare")
    shutil.copy(QUICKSTART / "base" / "config.json", copy_tokenizer(tmp_path / "light") / "config.json")
    return tmp_path


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_at_once(folders: Path, write_recipe: Write, kind: str) -> None:
    recipe = write_recipe()
    command, words = (text.format(tmp=folders, recipe=recipe) for text in BAD[kind])
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command.split()], capture_output=True, text=True, timeout=60
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{kind}: {seconds:.2f} s of the processor, {wall:.2f} s")
    assert done.returncode == 2, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert seconds < 1


def test_the_dtypes_of_verify_are_those_it_has_tolerances_for() -> None:
    from mtr.checks.verify import TOLERANCE
    from mtr.cli.options import DTYPES

    assert tuple(TOLERANCE) == DTYPES


def test_what_only_looks_strange_is_not_refused(mtr: Mtr, write_recipe: Write, tmp_path: Path) -> None:
    """A result in a folder that is made for it, random weights for a folder without any, a tokenizer alone."""
    light = copy_tokenizer(tmp_path / "light")
    code, out, _ = mtr("audit", light, "--json")
    assert (code in (0, 1), out[:1]) == (True, "{")
    assert mtr("inspect", write_recipe(model={"name_or_path": str(light)}), "--json")[0] == 0
    shutil.copy(QUICKSTART / "base" / "config.json", light / "config.json")
    recipe = write_recipe(model={"name_or_path": str(light)}, data={"eval": str(QUICKSTART)})
    result = tmp_path / "new" / "folder" / "result.json"
    options = ("--random-weights", "--conversations", 1, "--repeats", 1, "--json", result)
    code, _, err = mtr("bench", recipe, *options)
    assert code == 0, err
    assert result.exists()
