"""Asks the Hugging Face Hub whether it has what a recipe names, before the libraries that load it are asked to.

They try for half a minute and more, file by file and in silence, where there is no network.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mtr.errors import UserError, one_line
from mtr.recipe.paths import exists
from mtr.recipe.sections import Recipe

log = logging.getLogger("mtr")

QUIET_SECONDS = 1.0
"""After this long it is said what is waited for."""
PATIENCE_SECONDS = 8.0
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
Answer = TypeVar("Answer")


class HubUnreachableError(Exception):
    """The Hub does not answer, or is not to be asked; the message says why."""


@dataclass(frozen=True)
class Named:
    """What may be a repository on the Hub."""

    key: str
    """The key of the recipe that names it."""
    name: str
    revision: str | None = None
    kind: str = "model"
    """model or dataset."""


def named_model(recipe: Recipe) -> Named:
    return Named("model.name_or_path", recipe.model.name_or_path, recipe.model.revision)


def named_data(recipe: Recipe) -> list[Named]:
    keys = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    return [Named(key, source.path, source.revision, "dataset") for key, found in keys.items() for source in found]


def find(wanted: Sequence[Named]) -> None:
    """Look for each repository that is no local path.

    If the Hub does not answer and there is a copy of each in the cache, this process goes on offline.

    Raises:
        UserError: the Hub does not have it, or not for this user; or it does not answer, and there is no copy.
    """
    problem = None
    for one in wanted:
        if exists(Path(), one.name):
            continue
        try:
            if problem is None:
                _find(one)
        except HubUnreachableError as error:
            problem = str(error)
        if problem is not None and not _is_cached(one):
            raise UserError(
                f"{one.key}: {one.name} is no local path, no copy of it is in the cache, and {problem}; "
                "check the spelling, or download it first"
            )
    if problem is not None:
        _go_offline(problem)


def _find(one: Named) -> None:
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    file, kind, page = "config.json", None, f"{constants.ENDPOINT}/{one.name}"
    if one.kind == "dataset":
        file, kind, page = "README.md", "dataset", f"{constants.ENDPOINT}/datasets/{one.name}"
    try:
        url = hf_hub_url(one.name, file, repo_type=kind, revision=one.revision)
        ask(f"looking for {one.name} on the Hub", lambda: get_hf_file_metadata(url, timeout=PATIENCE_SECONDS))
    except errors.HFValidationError:
        problem = f"{one.name!r} is no local path, and cannot be a name on the Hub (owner/name)"
    except errors.GatedRepoError:
        problem = f"{one.name} is gated: ask for access at {page}, and {LOGIN}"
    except errors.RepositoryNotFoundError:
        problem = (
            f"{one.name} is no local path, and the Hub shows you no {one.kind} of this name: check the spelling, or if "
            f"it is private, {LOGIN}"
        )
    except errors.RevisionNotFoundError:
        problem = f"{one.name} has no revision {one.revision!r} on the Hub"
    except (errors.EntryNotFoundError, errors.HfHubHTTPError):
        return  # it is there, or the Hub is busy: the libraries ask again
    else:
        return
    raise UserError(f"{one.key}: {problem}")


def ask(what: str, question: Callable[[], Answer]) -> Answer:
    """The Hub's answer to a question, within PATIENCE_SECONDS; resolving a host name has no time limit of its own.

    Args:
        what: is being done; said if it takes long.

    Raises:
        HubUnreachableError: there is no answer.
        OSError, ValueError: the answer is an error, of the kinds in `huggingface_hub.errors`.
    """
    from huggingface_hub import constants, errors

    future: Future[Answer] = Future()

    def answer() -> None:
        try:
            future.set_result(question())
        except Exception as error:
            future.set_exception(error)

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("HF_HUB_OFFLINE is set")
    threading.Thread(target=answer, daemon=True).start()
    if not wait([future], QUIET_SECONDS).done:
        log.info("%s ...", what)
    try:
        return future.result(PATIENCE_SECONDS - QUIET_SECONDS)
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.LocalTokenNotFoundError):
        raise
    except TimeoutError:
        reason = f"no answer within {PATIENCE_SECONDS:g} seconds"
    except Exception as error:  # of whichever HTTP client
        reason = one_line(error, 120)
    raise HubUnreachableError(f"the Hub ({constants.ENDPOINT}) cannot be reached ({reason})") from None


def _is_cached(one: Named) -> bool:
    """Whether the Hub's client, or `datasets`, has a copy; of which revision and how complete is seen on loading."""
    from huggingface_hub import constants

    copies = Path(constants.HF_HUB_CACHE, f"{one.kind}s--{one.name.replace('/', '--')}", "snapshots")
    tables = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    return copies.is_dir() or (one.kind == "dataset" and (tables / one.name.replace("/", "___")).is_dir())


def _go_offline(problem: str) -> None:
    """For libraries that are imported already, and those that are not, here and in data workers."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        log.warning("%s: going on with the copies in the cache", problem)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
