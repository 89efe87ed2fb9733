"""Tiny random models of several architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtr.model.tree_model import TreeModel, use_tree
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack
from support.hybrids import HYBRIDS
from support.trees import view

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


Tensors = dict[str, Tensor]


def changed_model(
    source: Path, target: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any
) -> Path:
    """A copy of a model folder with other tensors in its one file, or other keys in its config; None removes a key."""
    shutil.copytree(source, target)
    if tensors is not None:
        save_tensors(tensors(load_file(target / "model.safetensors")), target / "model.safetensors")
    file = target / "config.json"
    keys = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in keys.items() if key not in config or value is not None}))
    return target


def save_tensors(tensors: Tensors, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def save_sharded(tensors: Tensors, folder: Path, shards: int = 2, **weight_map: Any) -> dict[str, str]:
    """In several files with an index, in place of the one file; `weight_map` adds entries to the index.

    Returns:
        The file of each tensor.
    """
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_tensors({name: tensors[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": {**files, **weight_map}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def save_tiny_model(kind: str, tokenizer: Path, folder: Path, **changes: Any) -> None:
    import transformers

    name, options = {**HYBRIDS, **ARCHITECTURES}[kind]
    save_random_model(getattr(transformers, name)(**{**options, **changes}), tokenizer, folder)


def save_random_model(config: Any, tokenizer: Path, folder: Path) -> None:
    """With the vocabulary and the end of a turn of a tokenizer, which is saved beside it."""
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    config.vocab_size = len(loaded)
    config.pad_token_id = config.bos_token_id = None
    config.eos_token_id = loaded.eos_token_id
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    loaded.save_pretrained(str(folder))


EXACT = [kind for kind in ARCHITECTURES if kind != "qwen3_next"]


WITHOUT = {
    ("sdpa", "gemma2"): "soft cap",
    ("sdpa", "gpt_oss"): "attention sinks",
    ("varlen", "gemma2"): "soft cap",
}


def tiny_config(kind: str, **changes: Any) -> Any:
    name, options = {**HYBRIDS, **ARCHITECTURES}[kind]
    return getattr(transformers, name)(**{**options, "vocab_size": 64, **changes})


def wide_model(layers: int = 4) -> Any:
    """A Qwen3 whose packs take megabytes, in float32, with tree attention."""
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_tree(model)
    return model.train()


def load(folder: Path) -> Any:
    """In float64, with weights large enough for a leak to show."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    model.set_experts_implementation("eager")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def chat() -> list[View]:
    """Three turns, the second without thinking; paths longer than the windows of the tiny models."""
    ids = iter(np.random.default_rng(0).integers(0, 600, 200).tolist())

    def take(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    history = take(9)
    views = []
    for turn, (thinking, answer) in enumerate([(20, 11), (0, 14), (25, 8)]):
        said = take(answer)
        views.append(view(history, take(thinking) + said, 1.0, turn))
        history = history + said + take(4)
    return views


def gradients(model: Any, backend: str = "segment") -> tuple[dict[str, torch.Tensor], int]:
    """Of a pack, and the bytes that its graph kept from the forward."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    use_tree(model)
    model.train()
    batch = build_batch(Pack((merge(chat()),)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = TreeModel(model, backend)(batch)  # type: ignore[arg-type]
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())
