"""LoRA: an adapter added to a model, and an existing one that a run starts from."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtr.attention.model_parts import freeze_idle, idle_parts, text_config
from mtr.errors import UserError, described, one_line
from mtr.model.fused import keep_adapters_in_use
from mtr.recipe.sections import LoraSection

log = logging.getLogger("mtr")


def add_lora(model: Any, lora: LoraSection, seed: int, checkpoint: Path | None = None) -> Any:
    """The model with adapters, which alone are trained.

    Args:
        checkpoint: of the run that goes on, where the adapters start from a part of the weights.

    Raises:
        UserError: the model has no such adapters.
    """
    from peft import get_peft_model

    from mtr.model.adapter_layers import compute_in_model_dtype
    from mtr.model.adapter_start import take_from_base

    _check_rank(model, lora)
    torch.manual_seed(seed)
    idle = list(idle_parts(model))
    _check_names(model, lora, idle)
    if lora.modules_to_save and getattr(model.config, "tie_word_embeddings", False):
        log.warning(
            "the model ties embeddings and head: modules_to_save trains a separate copy of each module that it names"
        )
    left_out = _left_out(model) if lora.target_modules == "all-linear" else []
    if left_out:
        log.warning("lora.target_modules: all-linear leaves out %s, which no adapter can train here", left_out)
    config = _config(lora, _excluded(left_out, idle))
    try:
        with warnings.catch_warnings():  # PEFT's own patterns for fused experts, which all-linear leaves alone
            warnings.filterwarnings(
                "ignore", message=".*keys did not match any targeted module", category=RuntimeWarning
            )
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # said above
            adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise UserError(f"lora: {one_line(error)}") from None
    if passed_by := [name for name in _read_by_weight(adapted) if hasattr(adapted.get_submodule(name), "lora_A")]:
        raise UserError(
            f"lora.target_modules: {passed_by[0]} cannot be trained by an adapter, because the model multiplies by its "
            "weight without calling it; leave it out"
        )
    if idle:
        _name_adapted(adapted.active_peft_config, adapted)
    if lora.takes_from_base:
        take_from_base(adapted, str(lora.init_lora_weights), checkpoint)
    if lora.init_from:
        _load_adapter(adapted, Path(lora.init_from))
    freeze_idle(adapted)
    compute_in_model_dtype(adapted)
    keep_adapters_in_use(adapted)
    return adapted


def _config(lora: LoraSection, excluded: str | list[str] | None) -> Any:
    """PEFT's config; a start from the weights is made afterwards."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=excluded,
        target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        init_lora_weights=lora.init_lora_weights if lora.init_lora_weights in ("gaussian", "orthogonal") else True,
    )


def _check_names(model: Any, lora: LoraSection, idle: Collection[str]) -> None:
    """
    Raises:
        UserError: the part of the model that text passes has nothing of a name in the recipe.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, wanted, kind, names in (
        ("modules_to_save", lora.modules_to_save, "module", modules),
        ("target_parameters", lora.target_parameters, "parameter", parameters),
    ):
        for one in wanted or []:
            found = [name for name in names if name == one or name.endswith(f".{one}")]
            if not found:
                raise UserError(f"lora.{key}: the model has no {kind} {one!r}")
            if all(_is_inside(name, idle) for name in found):
                raise UserError(
                    f"lora.{key}: {one} is in {found[0]}, which text does not pass, so nothing would train it"
                )


def _name_adapted(config: Any, adapted: Any) -> None:
    """Leave out of an adapter's config the names that PEFT took for `all-linear` and then excluded."""
    if isinstance(config.target_modules, set):
        names = [f".{name}" for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
        config.target_modules = {
            wanted for wanted in config.target_modules if any(name.endswith(f".{wanted}") for name in names)
        }


def _is_inside(name: str, parts: Collection[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _excluded(names: Collection[str], idle: Collection[str]) -> str | list[str] | None:
    """For PEFT: modules of these names, and all that text does not pass."""
    if not idle:
        return list(names) or None
    ends = "".join(rf"|(.*\.)?{re.escape(name)}" for name in names)
    return rf"({'|'.join(map(re.escape, idle))})(\..*)?{ends}"


_WITHOUT_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models for which PEFT neither makes nor loads an adapter of out_proj, as its tuners_utils has them."""


def _left_out(model: Any) -> list[str]:
    """Names of linear layers that an adapter cannot train."""
    found = {name.rpartition(".")[2] for name in _read_by_weight(model)}
    if text_config(model.config).model_type in _WITHOUT_OUT_PROJ:
        found.add("out_proj")
    found |= {name.rpartition(".")[2] for name, module in model.named_modules() if _is_more_than_linear(module)}
    return sorted(found)


def _is_more_than_linear(module: Any) -> bool:
    """Of a model's own class that inherits from a linear layer and returns something else, as some routers do."""
    kind = type(module)
    own = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    if not isinstance(module, nn.Linear) or not own or kind.forward is nn.Linear.forward:
        return False
    try:
        with torch.no_grad():
            out = module(module.weight.new_zeros(1, module.in_features))
    except RuntimeError:
        return True  # it takes another shape
    return not isinstance(out, Tensor) or out.shape != (1, module.out_features)


def _read_by_weight(model: Any) -> list[str]:
    """Linear layers whose weight Mamba's selective scan reads without calling them, so that an adapter is passed by."""
    names = [name for name, module in model.named_modules() if hasattr(module, "dt_proj") and hasattr(module, "x_proj")]
    return [f"{name}.dt_proj" for name in names]


def _check_rank(model: Any, lora: LoraSection) -> None:
    """Beyond the smaller side of every matrix, a rank costs memory and allows no other update.

    Raises:
        UserError: names the key and the limit.
    """
    limit = max((min(parameter.shape[-2:]) for parameter in model.parameters() if parameter.dim() > 1), default=0)
    ranks = {"lora.r": lora.r} | {f"lora.rank_pattern: {name}": rank for name, rank in lora.rank_pattern.items()}
    for key, rank in ranks.items():
        if rank > limit:
            raise UserError(f"{key}: {rank} is above {limit}, the smaller side of the model's largest matrix; lower it")


def check_kept(fresh: Iterable[str], modules_to_save: Collection[str]) -> None:
    """Refuse random values under an adapter that are not saved with it: nothing could load the result.

    Args:
        fresh: names of parameters that start from random values.

    Raises:
        UserError: names the first that no module to save holds.
    """
    for name in fresh:
        parts = name.split(".")[:-1]
        modules = {".".join(parts[start:end]) for end in range(len(parts) + 1) for start in range(end)}
        if not modules & set(modules_to_save):
            raise UserError(
                f"model.allow_missing: {name} starts from random values, which an adapter does not keep; name its "
                "module in lora.modules_to_save, so that it is trained and saved whole"
            )


def _load_adapter(model: Any, folder: Path) -> None:
    """Start from an existing adapter, which must belong to this base model and have the same shape.

    Raises:
        UserError: there is none, or it does not fit; the message names what differs.
    """
    from peft import set_peft_model_state_dict

    key = f"lora.init_from: {folder}"
    try:
        saved, weights = read_adapter(folder)
    except UserError as error:
        raise UserError(f"{key} {error}") from None
    config = model.active_peft_config
    was, now = str(saved.get("base_model_name_or_path")), str(config.base_model_name_or_path)
    if Path(was).name != Path(now).name:
        raise UserError(f"{key} is an adapter of {was}, and model.name_or_path is {now}")
    names = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    names |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    for name, ours in names.items():
        if saved.get(name) != getattr(config, name):
            raise UserError(f"{key} has {ours} {saved.get(name)}, the recipe says lora.{ours}: {getattr(config, name)}")
    if misfit := adapter_misfit(model, weights):
        raise UserError(
            f"{key} {misfit}; give lora.target_modules, target_parameters and modules_to_save as it has them"
        )
    set_peft_model_state_dict(model, weights)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of an adapter and its tensors.

    Raises:
        UserError: to be put after the folder's name: what is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            "holds its adapter only as pickle (adapter_model.bin), which can run code when it is read and is never "
            "opened; save it as safetensors first, with save_pretrained of PEFT"
        )
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("adapter_config.json is no JSON object")
        if saved.get("peft_type") != "LORA":
            raise ValueError(f"it is no LoRA adapter, its peft_type is {saved.get('peft_type')!r:.40}")
        return saved, load_file(str(file))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"holds no adapter that can be read: {described(error)}") from None


def adapter_misfit(model: Any, weights: Mapping[str, Tensor]) -> str | None:
    """How an adapter's tensors differ from what the model's own adapter has; PEFT passes over names without a word."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model)
    if strange := sorted(wanted.keys() ^ weights.keys()):
        return f"{'does not adapt' if strange[0] in wanted else 'adapts more:'} {strange[0]}"
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            return f"has {name} with shape {list(tensor.shape)}, and the model needs {list(wanted[name].shape)}"
        if not tensor.is_floating_point():
            return f"has {name} as {tensor.dtype}, which is no kind of number to train"
    return None


def adapted_modules(model: Any) -> list[str]:
    """Names of the modules with LoRA, layer numbers replaced by `*`."""
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split(".lora_")[0].split("."))
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    return sorted(name.removeprefix("base_model.model.") for name in names)
