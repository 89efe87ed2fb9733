"""Claims: an upload takes the result and nothing else, and no path of the machine; one that cannot work is refused
before the training, and one that fails after it has an exit code of its own, with everything kept on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import check_refused
from support.hub import LocalHub, local_hub
from support.paths import QUICKSTART
from support.rows import conversation_row

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


class Client:
    """The Hub's client, without the Hub."""

    uploaded: dict[str, bytes]
    private: bool | None = None
    fails: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": []}

    def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
        if self.fails is not None:
            raise self.fails
        Client.private = options["private"]
        return SimpleNamespace(repo_id=name)

    def create_commit(self, name: str, operations: list[Any], **_: Any) -> None:
        assert name == "me/mine"
        for operation in operations:
            with operation.as_file() as file:
                self.uploaded[operation.path_in_repo] = file.read()

    def upload_folder(self, **_: Any) -> None:
        """As it was done before: everything as it is on disk."""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    monkeypatch.setattr(Client, "uploaded", {}, raising=False)
    monkeypatch.setattr(Client, "fails", None)
    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    return Client


@pytest.fixture
def recipe(write_recipe: Write, write_rows: Write, tmp_path: Path) -> Path:
    """One step on a base model in a folder, to be pushed."""
    shutil.copytree(QUICKSTART / "base", tmp_path / "base")
    rows = write_rows([conversation_row(turns=2) for _ in range(4)])
    training = {"max_steps": 1, "save_steps": 1, "conversations_per_step": 1, "push_to_hub": "me/mine"}
    return write_recipe(
        model={"name_or_path": str(tmp_path / "base")}, data={"train": str(rows), "eval": str(rows)}, training=training
    )


RESULT = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "README.md",
}  # fmt: skip


def test_an_upload_takes_the_result_and_no_path_of_the_machine(
    client: type[Client], mtr: Mtr, recipe: Path, tmp_path: Path
) -> None:
    code, out, err = mtr("train", recipe)
    assert (code, out) == (0, "")
    assert err.splitlines()[-1].split() == ["Hub", "uploaded", "to", "me/mine"]
    assert client.private is True
    assert client.uploaded.keys() == RESULT
    run = tmp_path / "run"
    for name, content in client.uploaded.items():
        assert str(tmp_path).encode() not in content, name
        assert name == "adapter_config.json" or content == (run / name).read_bytes()
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base"), "here it has to be found"
    assert json.loads(client.uploaded["adapter_config.json"]) == {**config, "base_model_name_or_path": "base"}


def test_an_upload_that_fails_has_its_exit_code_and_keeps_everything(
    client: type[Client], mtr: Mtr, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "fails", ConnectionError("no \x1b[31mnetwork"))
    code, out, err = mtr("train", recipe)
    assert (code, out) == (7, "")
    last = err.splitlines()[-1]
    run = tmp_path / "run"
    assert last.startswith(
        f"error: not uploaded to me/mine: no \\x1b[31mnetwork. Everything is in {run}; upload it with"
    )
    assert f"hf upload --private me/mine {run} . --include 'adapter_*' --include 'tokenizer*'" in last
    assert "Traceback" not in err
    assert {path.name for path in run.iterdir()} >= RESULT
    assert "loss " in err, "the summary is shown all the same"
    code, out, err = mtr("merge", run, "--push-to-hub", "me/mine")
    assert (code, len(err.splitlines())) == (7, 1)
    assert "merged logits equal" in out
    assert err.startswith(f"error: not uploaded to me/mine: no \\x1b[31mnetwork. Everything is in {run / 'merged'}")
    assert (run / "merged" / "model.safetensors").exists()


def test_a_merged_model_is_uploaded_whole(client: type[Client], mtr: Mtr, recipe: Path, tmp_path: Path) -> None:
    assert mtr("train", recipe, "training.push_to_hub=null")[0] == 0
    code, out, err = mtr("merge", tmp_path / "run", "--push-to-hub", "me/mine")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "uploaded to me/mine"
    assert client.uploaded.keys() == RESULT - {"adapter_config.json", "adapter_model.safetensors"} | {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert [name for name, content in client.uploaded.items() if str(tmp_path).encode() in content] == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


def refused(mtr: Mtr, recipe: Path, *words: str) -> None:
    """Both commands that upload refuse at the start, and write nothing."""
    message = check_refused(mtr("train", recipe), "training.push_to_hub: me/mine could not be uploaded to: ", *words)
    assert "secret" not in message
    assert not (recipe.parent / "run").exists()


def test_an_upload_without_a_token_or_a_network_is_refused_before_the_training(
    hub: LocalHub, mtr: Mtr, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(mtr, recipe, "there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.answers["/api/whoami-v2"] = (401, "", {"error": "Invalid credentials"})
    refused(mtr, recipe, "the Hub does not take the token; log in with")
    hub.user("me", role="read")
    refused(mtr, recipe, "the token may only read; make one that may write")
    hub.user("you", "yours")
    refused(mtr, recipe, "me is neither the token's user, you, nor an organization of that user")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens
    refused(mtr, recipe, "cannot be reached", "train without it, and upload the result later")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(mtr, recipe, "HF_HUB_OFFLINE is set; train without it")


def test_a_merge_that_could_not_be_uploaded_is_refused_before_it(
    hub: LocalHub, mtr: Mtr, recipe: Path, tmp_path: Path
) -> None:
    assert mtr("train", recipe, "training.push_to_hub=null")[0] == 0
    run = tmp_path / "run"
    check_refused(mtr("merge", run, "--push-to-hub", "me/mine"), "--push-to-hub: me/mine", "no token")
    check_refused(
        mtr("merge", run, "--push-to-hub", "not a name"), "--push-to-hub: not a name could not be uploaded to"
    )
    assert not (run / "merged").exists()


def test_a_token_that_may_write_passes_and_a_busy_hub_too(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtr.training.hub import check_push

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for user in (("me",), ("you", "Me")):
        hub.user(*user)
        check_push("me/mine", "key")
    check_push("mine", "key")
    hub.answers["/api/whoami-v2"] = (429, "", {})
    check_push("me/mine", "key")
    check_push(None, "key")
    assert len(hub.asked) == 4
