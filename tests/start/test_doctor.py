"""Claims: `mtr doctor` finds a package of a wrong version, a backend that computes something wrong and one that does
not run; it shows no secrets; JSON holds the same findings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtr.attention.interface import attend
from mtr.recipe.hub import HubUnreachableError
from mtr.start import machine, packages
from mtr.start.backends import check_backends
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


def test_a_home_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    assert machine._without_home(Path("/home/ann/.cache/hub")) == "~/.cache/hub"
    assert machine._without_home(Path("/data/hub")) == "/data/hub"
