"""Uploads to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtr.errors import one_line

if TYPE_CHECKING:
    pass


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload weights, tokenizer and card, not the run's files; returns what to say.

    The token is the one of the Hub's own login or of HF_TOKEN; it is never shown.
    """
    from huggingface_hub import HfApi

    wanted = ["adapter_*", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
    wanted += ["tokenizer*", "special_tokens_map.json", "chat_template*", "*.model", "README.md"]
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=wanted,
            ignore_patterns=["checkpoint-*/*", ".checkpoint-*/*", "merged/*"],
        )
    except Exception as error:  # the Hub client raises its own kinds
        return f"not pushed {repository}: {one_line(error)}; everything is in {folder}"
    return f"pushed     {repository}"
