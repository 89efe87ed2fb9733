"""`mtr merge RUN`: base weights + adapter -> RUN/merged, a folder that plain transformers loads."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtr.errors import UserError, one_line
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe
from mtr.training.model_card import front_matter, without_folders

TOLERANCE = 1e-3
"""Largest difference of a logit in float32, as a share of the largest logit: sums are taken in another order."""


def merge(run: Path, output: Path, dtype: str | None = None) -> dict[str, Any]:
    """Merge a run's adapter into its base weights and save the result, checked twice.

    In float32, the merged model's logits must be the adapter's, and so must those of the folder that was written,
    loaded again by plain transformers; what rounding to the dtype of the folder changes is reported.

    Args:
        run: output_dir of a run, or one of its checkpoints.
        dtype: of the folder; by default the base model's own.

    Returns:
        `output`, `dtype`, and the relative differences of logits: `difference` between merged and adapter in float32,
        its `tolerance`, and `after_rounding`.

    Raises:
        UserError: there is no adapter, it cannot be merged, or the merged model differs.
    """
    recipe = _check_run(run, output)
    config = json.loads((run / "adapter_config.json").read_text())
    base, stored = _load_base(run, config, recipe)
    saved_dtype = _dtype(dtype, stored)
    ids = _sample(base)
    adapted = _load_adapter(run, base)
    wanted = _logits(adapted, ids)
    _untie(base, adapted, config)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{run}: the adapter cannot be merged: {one_line(error)}") from None
    difference = _compare(wanted, _logits(merged, ids), f"{run}: merging changed the model")

    for parameter in merged.parameters():  # not the buffers: rotary frequencies stay in float32, as after loading
        parameter.data = parameter.data.to(saved_dtype)
    merged.config.dtype = saved_dtype
    written = _logits(merged, ids)
    _save(merged, run, output, _merged_card(run, config, recipe))
    del base, adapted, merged
    gc.collect()
    _compare(
        written,
        _logits(_load_again(output, saved_dtype, recipe), ids),
        f"{output}: the folder does not load as the merged model",
    )
    return {
        "output": str(output),
        "dtype": str(saved_dtype).removeprefix("torch."),
        "difference": difference,
        "after_rounding": _difference(wanted, written),
        "tolerance": TOLERANCE,
    }


def _load_base(run: Path, adapter_config: dict[str, Any], recipe: Recipe | None) -> tuple[Any, Any]:
    """The base model in float32, and its config as stored."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from mtr.model.quantization import unquantised

    name, trust = adapter_config["base_model_name_or_path"], _trusts_remote_code(recipe)
    revision = recipe.model.revision if recipe else adapter_config.get("revision")
    load = {"revision": revision, "trust_remote_code": trust, "use_safetensors": True}
    try:
        stored = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **load, **unquantised(stored)), stored
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{run}: the base model cannot be loaded from {name}: {one_line(error)}") from None


def _load_adapter(run: Path, base: Any) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(base, str(run)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{run}: the adapter cannot be loaded: {one_line(error)}") from None


def _save(merged: Any, run: Path, output: Path, card: str) -> None:
    from transformers import AutoTokenizer

    merged.save_pretrained(str(output))
    AutoTokenizer.from_pretrained(str(run)).save_pretrained(str(output))
    (output / "README.md").write_text(card, encoding="utf-8")


def _load_again(output: Path, dtype: torch.dtype, recipe: Recipe | None) -> Any:
    """As plain transformers loads the folder."""
    from transformers import AutoModelForCausalLM

    trust = _trusts_remote_code(recipe)
    return AutoModelForCausalLM.from_pretrained(str(output), dtype=dtype, trust_remote_code=trust)


def _trusts_remote_code(recipe: Recipe | None) -> bool:
    return bool(recipe and recipe.model.trust_remote_code)


def _check_run(run: Path, output: Path) -> Recipe | None:
    """Whether the run can be merged into this folder; returns its recipe, where it has one."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    if not (run / "adapter_config.json").exists():
        if any(run.glob("model*.safetensors")):
            raise UserError(f"{run}: it holds full weights, so there is nothing to merge; load it as it is")
        raise UserError(f"{run}: no adapter_config.json; give the output_dir of a finished run, or a checkpoint")
    kind = json.loads((run / "adapter_config.json").read_text()).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{run}: only LoRA adapters can be merged, this one is {kind}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is not empty; remove it, or name another folder")
    for folder in (run, run.parent):
        if (folder / "recipe.yaml").exists():
            return load_saved_recipe(folder / "recipe.yaml")
    return None


def _dtype(asked: str | None, config: Any) -> torch.dtype:
    from mtr.model.loading import DTYPES

    if asked is None:
        kept: torch.dtype | None = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return kept or torch.bfloat16
    if asked not in DTYPES:
        raise UserError(f"--dtype: {asked!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[asked]


def _sample(model: Any) -> Tensor:
    """Random token ids, [2, 64], to compare logits on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.get_input_embeddings().num_embeddings, (2, 64), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.float()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _compare(one: Tensor, other: Tensor, problem: str) -> float:
    difference = _difference(one, other)
    if not difference <= TOLERANCE:
        raise UserError(f"{problem}: logits differ by {difference:.1e} of the largest one, more than {TOLERANCE:.0e}")
    return difference


def _untie(base: Any, adapted: Any, config: dict[str, Any]) -> None:
    """Untie embeddings and head where the adapter changes only one of them: one tensor cannot hold both."""
    text = base.config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False):
        return
    touched = set(config.get("modules_to_save") or []) | {
        name.rsplit(".", 1)[-1] for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module in (head, embeddings)}
    if touched & (names | {"lm_head", "embed_tokens"}):
        base.config.tie_word_embeddings = text.tie_word_embeddings = False
        layer = getattr(head, "base_layer", head)
        if not hasattr(layer, "modules_to_save"):
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def _merged_card(run: Path, config: dict[str, Any], recipe: Recipe | None) -> str:
    base = config["base_model_name_or_path"]
    own = run / "README.md"
    if recipe is not None and own.exists():
        text = own.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers")
        return text.replace("A LoRA adapter of", "A model merged from a LoRA adapter and", 1)
    card = [
        *front_matter(base, "transformers"),
        f"# {run.absolute().name}",
        "",
        f"Merged from a LoRA adapter of `{without_folders(base)}`.",
    ]
    return "\n".join([*card, ""])
