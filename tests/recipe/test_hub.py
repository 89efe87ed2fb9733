"""Claims: what the Hub does not have, or not for this user, is said by the key that names it; where it does not answer,
that is said within seconds, a copy in the cache is used, and nobody waits in silence.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import check_refused
from support.hub import LocalHub, local_hub

from mtr.errors import UserError

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


@pytest.fixture
def silent(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """It takes connections and answers nothing, and patience is short."""
    import mtr.recipe.hub

    hub.delay.clear()
    monkeypatch.setattr(mtr.recipe.hub, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(mtr.recipe.hub, "PATIENCE_SECONDS", 0.4)
    return hub


MODEL = "/nobody/nothing/resolve/"
DATA = "/datasets/nobody/nothing/resolve/"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, "RepoNotFound", {}), "no local path, and the Hub shows you no model of this name: check the spelling"),
        ((403, "GatedRepo", {}), "is gated: ask for access at http://127.0.0.1"),
        ((404, "RevisionNotFound", {}), "has no revision 'v2' on the Hub"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_named_by_its_key(
    hub: LocalHub, mtr: Mtr, write_recipe: Write, answer: tuple[int, str, object], words: str
) -> None:
    hub.answers[MODEL] = answer
    recipe = write_recipe(model={"name_or_path": "nobody/nothing", "revision": "v2"})
    for command in ("train", "verify", "bench", "inspect", "audit"):
        check_refused(mtr(command, recipe), "model.name_or_path: nobody/nothing", words)
    assert hub.asked == ["/nobody/nothing/resolve/v2/config.json"] * 5, "once each, and nothing else"


def test_data_that_the_hub_does_not_give_is_named_by_its_key(hub: LocalHub, mtr: Mtr, write_recipe: Write) -> None:
    words = "the Hub shows you no dataset of this name"
    check_refused(mtr("train", write_recipe(data={"train": "nobody/nothing"})), "data.train: nobody/nothing", words)
    check_refused(mtr("train", write_recipe(data={"eval": "nothing"})), "data.eval: nothing is no local path", words)
    hub.answers[DATA] = (403, "GatedRepo", {})
    message = check_refused(mtr("inspect", write_recipe(data={"train": "nobody/nothing"})), "is gated")
    assert "/datasets/nobody/nothing, and log in with `hf auth login`" in message


def test_a_tokenizer_and_a_name_that_cannot_be(hub: LocalHub, mtr: Mtr, write_recipe: Write) -> None:
    check_refused(mtr("audit", "nobody/nothing"), "model.name_or_path: nobody/nothing", "no model of this name")
    check_refused(
        mtr("train", write_recipe(model={"name_or_path": "no body/no--thing"})), "cannot be a name on the Hub"
    )
    assert len(hub.asked) == 1


@pytest.mark.parametrize("answer", [(200, "", {}), (404, "EntryNotFound", {}), (503, "", {}), (429, "", {})])
def test_what_is_there_passes_and_a_busy_hub_is_left_to_the_libraries(
    hub: LocalHub, answer: tuple[int, str, object]
) -> None:
    from mtr.recipe.hub import Named, find

    hub.answers |= {MODEL: answer, DATA: answer}
    find([Named("model", "nobody/nothing"), Named("data", "nobody/nothing", kind="dataset")])
    assert len(hub.asked) == 2


def test_local_paths_are_not_looked_up(hub: LocalHub, mtr: Mtr, write_recipe: Write) -> None:
    assert mtr("inspect", write_recipe())[0] == 0
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_said_within_seconds(
    silent: LocalHub, mtr: Mtr, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    recipe = write_recipe(model={"name_or_path": "nobody/nothing"})
    code, out, err = mtr("train", recipe)
    assert time.monotonic() - began < 5
    assert (code, out) == (2, "")
    waiting, error = err.splitlines()
    assert waiting == "looking for nobody/nothing on the Hub ..."
    assert error.startswith(f"error: {recipe}:")
    assert "model.name_or_path: nobody/nothing is no local path, no copy of it is in the cache" in error
    assert "cannot be reached (" in error


def test_a_machine_without_a_network_is_told_so(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtr.recipe.hub import Named, find

    nothing_listens = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nothing_listens)
    with pytest.raises(UserError, match=r"key: nobody/nothing is no local path, .* cannot be reached \(.*refused"):
        find([Named("key", "nobody/nothing")])


def test_asking_offline_is_answered_at_once(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtr.recipe.hub import HubUnreachableError, Named, ask, find

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; check the spelling, or download it first"):
        find([Named("key", "nobody/nothing")])
    with pytest.raises(HubUnreachableError):
        ask("asking", lambda: None)
    assert hub.asked == []


def test_a_copy_in_the_cache_is_used_without_the_hub(
    silent: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    from mtr.recipe.hub import Named, find

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "cache" / "models--nobody--nothing" / "snapshots").mkdir(parents=True)
    tables = tmp_path / "tables"
    (tables / "nobody___rows").mkdir(parents=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tables))
    with caplog.at_level(logging.INFO, "mtr"):
        find([Named("model", "nobody/nothing"), Named("data", "nobody/rows", kind="dataset")])
    assert "going on with the copies in the cache" in caplog.text
    assert len(silent.asked) == 1, "the second is not waited for"
    assert (os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE) == ("1", True)
    with pytest.raises(UserError, match="no copy of it is in the cache"):
        find([Named("model", "nobody/else")])
