"""Uploads to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mtr.errors import one_line


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload weights, tokenizer and model card, not checkpoints and logs.

    The token is that of the Hub's own login or of HF_TOKEN; it is never shown.

    Returns:
        What happened, in one line: an upload that fails ends nothing, since everything is in `folder`.
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
        return f"not uploaded to {repository}: {one_line(error)}; everything is in {folder}"
    return f"uploaded to {repository}"
