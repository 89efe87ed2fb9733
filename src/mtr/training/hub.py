"""Uploads to the Hugging Face Hub: what is taken along, and, before the work that leads to it, whether one can work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtr.errors import UploadError, UserError, one_line
from mtr.recipe.hub import LOGIN, HubUnreachableError, ask
from mtr.training.model_card import without_folders

_UPLOADED = (
    "adapter_*",
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "README.md",
)
"""Weights, tokenizer and model card; no logs, no rows, no checkpoints."""
_BASE = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Keys of JSON files that hold the folder of a local base model."""


def check_push(repository: str | None, key: str) -> None:
    """Refuse an upload that cannot work, before the work that it is for. The token is used, never shown.

    Args:
        repository: None where no upload is asked for.
        key: the key or option that names it.

    Raises:
        UserError: no such name, no token, one that the Hub does not take or that may not write, or no connection.
    """
    from huggingface_hub import HfApi, errors, hf_hub_url

    if repository is None:
        return
    try:
        hf_hub_url(repository, "README.md")  # checks the name
        user = ask(f"logging in to the Hub, for {key}", HfApi().whoami)
    except errors.HFValidationError as error:
        problem = one_line(error)
    except errors.LocalTokenNotFoundError:
        problem = f"there is no token for the Hub; {LOGIN}"
    except HubUnreachableError as error:
        problem = f"{error}; train without it, and upload the result later"
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            return  # the Hub is busy
        problem = f"the Hub does not take the token; {LOGIN}"
    else:
        problem = _why_not(user, repository)
    if problem:
        raise UserError(f"{key}: {repository} could not be uploaded to: {problem}")


def _why_not(user: dict[str, Any], repository: str) -> str:
    """What keeps a user, as the Hub describes one, from writing to a repository; empty where nothing is known to."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may only read; make one that may write"
    owner, slash, _ = repository.rpartition("/")
    owners = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
    if slash and "orgs" in user and owner.lower() not in [str(name).lower() for name in owners]:
        return f"{owner} is neither the token's user, {user.get('name')}, nor an organization of that user"
    return ""


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload what `_UPLOADED` names, in one commit. A new repository is private.

    Returns:
        What happened, in one line.

    Raises:
        UploadError: it failed; everything is in `folder`, and the message has a command that uploads it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    found = {pattern: [path for path in folder.glob(pattern) if path.is_file()] for pattern in _UPLOADED}
    files = sorted({path for paths in found.values() for path in paths})
    try:
        api = HfApi()
        repository = api.create_repo(repository, private=True, exist_ok=True).repo_id
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), uploaded_content(path)) for path in files]
        api.create_commit(repository, added, commit_message="Upload by mtr")
    except (Exception, KeyboardInterrupt) as error:  # the Hub's client raises its own kinds
        patterns = " ".join(f"--include '{pattern}'" for pattern in found if found[pattern])
        raise UploadError(
            f"not uploaded to {repository}: {one_line(error) or type(error).__name__}. Everything is in {folder}; "
            f"upload it with: hf upload --private {repository} {folder} . {patterns}"
        ) from None
    return f"uploaded to {repository}"


def uploaded_content(path: Path) -> str | bytes:
    """What is uploaded for a file: its path, or its text with the last part of each local base model's folder.

    The name that is left cannot be found by `AutoPeftModel`, which says so; `PeftModel` is given its base model.
    """
    if path.name not in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        return str(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    public = {key: without_folders(content[key]) for key in _BASE if isinstance(content.get(key), str)}
    if public.items() <= content.items():
        return str(path)
    return json.dumps(content | public, indent=2).encode()
