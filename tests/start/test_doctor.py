"""Claims: `mtr doctor` finds a package that is of a wrong version or cannot be imported, a backend that computes
something wrong and one that does not run; it shows no secrets and no private folders; JSON holds the same findings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtr.attention.interface import attend
from mtr.recipe.hub import HubUnreachableError
from mtr.start import machine, packages
from mtr.start.backends import check_backends
from mtr.start.finding import shareable
from mtr.start.machine import check_hub, check_machine
from mtr.start.packages import check_packages

Mtr = Callable[..., tuple[int, str, str]]


def test_what_works_here_is_found(mtr: Mtr) -> None:
    code, out, _ = mtr("doctor", "--no-hub", "--json")
    result = json.loads(out)
    assert (code, result["passed"], result["problems"]) == (0, True, [])
    found = {(finding["section"], finding["name"]): finding for finding in result["findings"]}
    assert found["packages", "torch"]["value"] == torch.__version__
    assert found["attention", "segment"]["state"] == "ok"
    assert ("Hub", "access") not in found


def test_a_wrong_version_is_a_problem(mtr: Mtr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: {"torch": "2.4.0"}.get(name, "9999"))
    states = {finding.name: finding for finding in check_packages()}
    assert states["torch"].state == "problem"
    assert "mtr needs" in states["torch"].text
    code, out, _ = mtr("doctor")
    assert code == 1
    assert "to be mended:" in out
    assert "torch" in out.partition("to be mended:")[2]
    assert "attention" not in out  # nothing is imported that may fail


def test_a_backend_that_is_wrong_or_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend

    def wrong(attention: Any, span: Any, query: Any, *others: Any) -> torch.Tensor:
        if attention.backend == "varlen":
            raise RuntimeError("no kernel")
        out = right(attention, span, query, *others)
        return out * 1.01 if attention.backend == "segment" else out

    monkeypatch.setattr("mtr.start.backends.attend", wrong)
    found = {finding.name: finding for finding in check_backends()}
    assert (found["segment"].state, found["segment"].text[:6]) == ("problem", "WRONG:")
    assert found["varlen"].state == "none"
    assert "no kernel" in found["varlen"].text
    assert found["sdpa"].state == "ok"


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    endpoint = "https://me:hf_secret@hub.example"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine, "ask", lambda *_: None)
    answered = check_hub()
    assert (answered.state, "a token is set" in answered.text) == ("ok", True)

    def unreachable(*_: object) -> None:
        raise HubUnreachableError(f"the Hub ({endpoint}) cannot be reached")

    monkeypatch.setattr(machine, "ask", unreachable)
    texts = [finding.text for finding in (answered, check_hub(), *check_machine())]
    assert [text for text in texts if "secret" in text] == []
    assert any("https://hub.example" in text for text in texts)


def test_little_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3 * 2**30

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    assert any("little" in finding.text for finding in check_machine() if finding.name == "disk here")


def test_no_private_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "ann")
    (tmp_path / "ann-secret-project").mkdir()
    monkeypatch.chdir(tmp_path / "ann-secret-project")
    found = {}
    for cache in ("ann/.cache/hub", "bert/hub"):
        monkeypatch.setattr(machine, "_cache", lambda cache=cache: tmp_path / cache)
        texts = {finding.name: finding.text for finding in check_machine()}
        assert [text for text in texts.values() if str(tmp_path) in text or "secret" in text] == []
        found[cache] = texts["disk of the Hub's cache"]
    assert "in ~/.cache/hub" in found["ann/.cache/hub"]
    assert "bert" not in found["bert/hub"]
    text = f"no {tmp_path}/ann/lib.so, {tmp_path}/annabel, {tmp_path}/ann-secret-project/x, https://me:key@hub/y"
    assert shareable(text) == f"no ~/lib.so, {tmp_path}/annabel, ./x, https://hub/y"


def test_a_user_without_a_home_and_a_folder_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def refused(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "home", no_home)
    assert any(finding.name == "disk here" for finding in check_machine())
    monkeypatch.setattr("shutil.disk_usage", refused)
    texts = [finding.text for finding in check_machine() if finding.name.startswith("disk")]
    assert texts == ["cannot be looked at: Permission denied"] * 2


BROKEN = {
    "torch": 'raise OSError("libcudart.so.12: cannot open shared object file")',
    "transformers": 'raise RuntimeError("half an update")',
    "peft": "from transformers import no_such_name",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_package_that_cannot_be_imported_is_a_problem(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(BROKEN[name])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "mtr", "doctor", "--no-hub", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    (problem,) = json.loads(done.stdout)["problems"]  # of those that need it nothing is said
    assert problem.startswith(f"{name}: installed, and cannot be imported: ")
    assert "pip install --force-reinstall" in problem


def test_a_removed_working_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd '{tmp_path}/gone' && rmdir ../gone && '{sys.executable}' -P -m mtr doctor --no-hub"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working folder was removed; change into another\n"


def test_damaged_metadata_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: {"torch": "not a version", "peft": None}.get(name, "9999"))
    states = {finding.name: finding for finding in check_packages()}
    assert states["torch"].text.startswith("not a version is not tried")
    assert states["peft"].text.startswith("missing: pip install")
