"""Shared fixtures: tiny random models of several architectures, rows, recipes, and the command line in-process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
SHARED = ROOT.parent / "shared"
"""Real tokenizers and conversations, where this checkout has them beside it."""

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared with tokenizers and data")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the full matrix too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("qwen3")` is a folder with a tiny random model of that kind and the quickstart's tokenizer.

    `tokenizer` names another tokenizer folder. See ARCHITECTURES for the kinds.
    """
    made: dict[tuple[str, Path], Path] = {}

    def make(kind: str, tokenizer: Path = QUICKSTART / "base") -> Path:
        if (kind, tokenizer) not in made:
            folder = tmp_path_factory.mktemp(kind)
            save_tiny_model(kind, tokenizer, folder)
            made[kind, tokenizer] = folder
        return made[kind, tokenizer]

    return make


_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32768,
}
_WITHOUT_HEAD_DIM = {k: v for k, v in _BASE.items() if k != "head_dim"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", _BASE),
    "llama": ("LlamaConfig", _BASE),
    "gemma2": (
        "Gemma2Config",
        {**_BASE, "sliding_window": 24, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_BASE,
            "num_hidden_layers": 3,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt_oss": ("GptOssConfig", {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_WITHOUT_HEAD_DIM,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_BASE, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
    ),
}


def save_tiny_model(kind: str, tokenizer: Path, folder: Path) -> None:
    import transformers

    name, options = ARCHITECTURES[kind]
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    config = getattr(transformers, name)(**options)
    config.vocab_size = len(loaded)
    config.pad_token_id = config.bos_token_id = None
    config.eos_token_id = loaded.eos_token_id
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    loaded.save_pretrained(str(folder))


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """`write_recipe(model={...}, ...)` is a recipe file: the quickstart, changed section by section."""

    def write(**sections: Any) -> Path:
        raw: dict[str, Any] = {
            "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
            "data": {"train": str(QUICKSTART / "train.jsonl")},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "conversations_per_step": 4,
                "learning_rate": 1e-3,
            },
        }
        for section, value in sections.items():
            merged = isinstance(value, dict) and isinstance(raw.get(section), dict)
            raw[section] = {**raw[section], **value} if merged else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows([row, ...])` is a JSON-lines file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def mtr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`mtr("verify", "recipe.yaml")` runs a command in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from mtr import cli

        monkeypatch.setattr("sys.argv", ["mtr", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), captured.out, captured.err

    return run


def conversation_row(turns: int = 3, thinking: bool = True) -> dict[str, Any]:
    """A row in the quickstart's manner, each answer with its thinking."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Ana gets {turn + 2} more."})
        answer: dict[str, Any] = {"role": "assistant", "content": f"Ana has {3 * turn + 2} coins now."}
        if thinking:
            answer["reasoning_content"] = f"Before: {turn}. {turn} + 2 = {turn + 2}."
        messages.append(answer)
    return {"messages": messages}


def copy_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A folder with the quickstart's tokenizer alone, with another chat template if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / "base" / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
