"""mtr merge: base weights + adapter."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtr.errors import UserError, one_line
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe
from mtr.training.export import _front_matter, _shown

if TYPE_CHECKING:
    pass


TOLERANCE = 1e-3
"""Largest difference of a logit in float32, as a share of the largest logit: products are added in another order."""


def merge(run: Path, output: Path, dtype: str | None = None) -> dict[str, Any]:
    """Add a run's adapter to its base weights and save the sum, checked twice.

    In float32, the merged model's logits must be the adapter's, and so must those of the folder that was written,
    loaded again by plain transformers; what rounding to the dtype of the folder changes is reported.

    Args:
        run: output_dir of a run, or one of its checkpoints.
        dtype: of the folder; by default the base model's own.

    Returns:
        What was compared, for the display.

    Raises:
        UserError: there is no adapter, it cannot be merged, or the merged model is another one.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mtr.model.quantization import unquantised

    recipe = _check_run(run, output)
    config = json.loads((run / "adapter_config.json").read_text())
    name, trust = config["base_model_name_or_path"], bool(recipe and recipe.model.trust_remote_code)
    revision = recipe.model.revision if recipe else config.get("revision")
    load = {"revision": revision, "trust_remote_code": trust, "use_safetensors": True}
    try:
        stored = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **load, **unquantised(stored))
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{run}: the base model cannot be loaded from {name}: {one_line(error)}") from None
    saved_dtype = _dtype(dtype, stored)
    ids = _sample(base)
    try:
        adapted = PeftModel.from_pretrained(base, str(run)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{run}: the adapter cannot be loaded: {one_line(error)}") from None
    wanted = _logits(adapted, ids)
    _untie(base, adapted, config)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{run}: the adapter cannot be merged: {one_line(error)}") from None
    difference = _compare(wanted, _logits(merged, ids), f"{run}: merging changed the model")

    for parameter in merged.parameters():  # not the buffers: rotations stay in float32, as they do on loading
        parameter.data = parameter.data.to(saved_dtype)
    merged.config.dtype = saved_dtype
    rounded = _difference(wanted, _logits(merged, ids))
    merged.save_pretrained(str(output))
    AutoTokenizer.from_pretrained(str(run)).save_pretrained(str(output))
    (output / "README.md").write_text(_merged_card(run, config, recipe), encoding="utf-8")
    written = _logits(merged, ids)
    del base, adapted, merged
    gc.collect()
    again = AutoModelForCausalLM.from_pretrained(str(output), dtype=saved_dtype, trust_remote_code=trust)
    _compare(written, _logits(again, ids), f"{output}: the folder does not hold the merged model")
    return {
        "output": str(output),
        "dtype": str(saved_dtype).removeprefix("torch."),
        "difference": difference,
        "after_rounding": rounded,
        "tolerance": TOLERANCE,
    }


def _check_run(run: Path, output: Path) -> Recipe | None:
    """The run's recipe, where it has one."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    if not (run / "adapter_config.json").exists():
        if any(run.glob("model*.safetensors")):
            raise UserError(f"{run}: it holds whole weights, so there is nothing to merge; load it as it is")
        raise UserError(f"{run}: no adapter_config.json; name the output_dir of a run that is done, or a checkpoint")
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
    """Ids to compare logits on: any will do, and all words take part over the rows."""
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
    """An adapter that changes the embeddings or the head apart cannot be merged into one tensor for both."""
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
        *_front_matter(base, "transformers"),
        f"# {run.absolute().name}",
        "",
        f"Merged from a LoRA adapter of `{_shown(base)}`.",
    ]
    return "\n".join([*card, ""])
