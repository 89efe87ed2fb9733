"""`mtr merge RUN`: base weights + adapter -> RUN/merged, a folder that plain transformers loads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtr.attention.model_parts import output_embeddings, text_config
from mtr.errors import UserError, described, one_line
from mtr.model.adapted import load_adapter, load_weights, read_adapter_config
from mtr.recipe.existence import check_run
from mtr.recipe.hub import Named
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.processor import copy_processor
from mtr.recipe.sections import Recipe
from mtr.store.new_folder import check_free, new_folder
from mtr.training.model_card import front_matter, without_folders
from mtr.training.provenance import check_base
from mtr.training.serving import for_merged

TOLERANCE = 1e-3
"""Largest difference of a logit in float32, as a share of the largest logit: sums are taken in another order."""


def merge(run: Path, output: Path, dtype: str | None = None) -> dict[str, Any]:
    """Merge a run's adapter into its base weights and save the result, checked twice.

    In float32, the merged model's logits must be the adapter's, and so must those of the folder that was written,
    loaded again by plain transformers; what rounding to the dtype of the folder changes is reported. The folder gets
    its name when it has passed.

    Args:
        run: output_dir of a run, or one of its checkpoints.
        dtype: of the folder; by default the base model's own.

    Returns:
        `output`, `dtype`, and the relative differences of logits: `difference` between merged and adapter in float32,
        its `tolerance`, and `after_rounding`.

    Raises:
        UserError: there is no adapter, it cannot be merged, or the merged model differs.
        SaveError: the folder cannot be written; nothing of it is left.
    """
    config, recipe = _check_run(run, output)
    with new_folder(output, "--output") as folder:
        return {"output": str(output), **_merge_into(folder, run, config, recipe, dtype)}


def _merge_into(
    folder: Path, run: Path, config: dict[str, Any], recipe: Recipe | None, dtype: str | None
) -> dict[str, Any]:
    """Returns what `merge` does, without the folder."""
    tokenizer = _load_tokenizer(run)
    base, stored = _load_base(run, config, recipe)
    check_base(run, str(config["base_model_name_or_path"]), _revision(config, recipe))
    saved_dtype = _dtype(dtype, stored)
    ids = _sample(base)
    adapted = load_adapter(run, base)
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
    merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    copy_processor(str(config["base_model_name_or_path"]), _revision(config, recipe), folder)
    (folder / "README.md").write_text(_merged_card(run, config, recipe), encoding="utf-8")
    del base, adapted, merged
    gc.collect()
    problem = f"{run}: what was written does not load as the merged model"
    _compare(written, _logits(_load_again(folder, saved_dtype, recipe, problem), ids), problem)
    return {
        "dtype": str(saved_dtype).removeprefix("torch."),
        "difference": difference,
        "after_rounding": _difference(wanted, written),
        "tolerance": TOLERANCE,
    }


def _load_tokenizer(run: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(run))
    except Exception as error:  # whatever a library raises on files that it did not expect
        raise UserError(f"{run}: its tokenizer cannot be loaded: {described(error)}") from None


def _load_base(run: Path, adapter_config: dict[str, Any], recipe: Recipe | None) -> tuple[Any, Any]:
    """The base model in float32, and its config as stored. What the adapter keeps whole, the base may lack."""
    problem = f"{run}: the base model cannot be loaded"
    named = Named(problem, str(adapter_config["base_model_name_or_path"]), _revision(adapter_config, recipe))
    kept = adapter_config.get("modules_to_save") or []
    return load_weights(named, f"{problem} from", recipe.model if recipe else None, kept, dtype=torch.float32)


def _load_again(folder: Path, dtype: torch.dtype, recipe: Recipe | None, problem: str) -> Any:
    """As plain transformers loads the folder."""
    from transformers import AutoConfig

    from mtr.model.pretrained import Allowed, load_pretrained

    trust = _trusts_remote_code(recipe)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
        return load_pretrained(str(folder), None, config, Allowed(), dtype=dtype, trust_remote_code=trust)[0]
    except UserError as error:
        raise UserError(f"{problem}: {error}") from None


def _revision(adapter_config: dict[str, Any], recipe: Recipe | None) -> str | None:
    """Of the base model."""
    return recipe.model.revision if recipe else adapter_config.get("revision")


def _trusts_remote_code(recipe: Recipe | None) -> bool:
    return bool(recipe and recipe.model.trust_remote_code)


def _check_run(run: Path, output: Path) -> tuple[dict[str, Any], Recipe | None]:
    """The run's adapter_config.json, and its recipe where it has one.

    Raises:
        UserError: it cannot be merged, or not into this folder.
    """
    check_run(run)
    config = read_adapter_config(run / "adapter_config.json")
    base = config["base_model_name_or_path"]
    _check_output(output, run, Path(base))
    recipes = (folder / "recipe.yaml" for folder in (run, run.parent))
    saved = next((path for path in recipes if path.exists()), None)
    return config, load_saved_recipe(saved) if saved else None


def _check_output(output: Path, run: Path, base: Path) -> None:
    target = output.resolve()
    if target == run.resolve():
        raise UserError(f"--output: {output} is the run itself; name a folder of its own")
    if base.is_dir() and base.resolve() in (target, *target.parents):
        raise UserError(f"--output: {output} is in the folder of the base model ({base}); name another folder")
    check_free(target, "--output")


def _dtype(asked: str | None, config: Any) -> torch.dtype:
    from mtr.model.loading import DTYPES

    if asked is None:
        kept: torch.dtype | None = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return kept or torch.bfloat16
    if asked not in DTYPES:
        raise UserError(f"--dtype: {asked!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[asked]


def _sample(model: Any) -> Tensor:
    """Random token ids, [2, 64], to compare logits on; none of those that stand for an image or a sound."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (2, 64), generator=generator)
    others = [value for key, value in vars(model.config).items() if key.endswith(("_token_id", "_token_index"))]
    known = torch.tensor([value for value in others if isinstance(value, int)], dtype=ids.dtype)
    return ids.where(~torch.isin(ids, known), ids[~torch.isin(ids, known)][0])


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
    if not getattr(base.config, "tie_word_embeddings", False):
        return
    touched = set(config.get("modules_to_save") or []) | {
        name.rsplit(".", 1)[-1] for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    head, embeddings = output_embeddings(base), base.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module in (head, embeddings)}
    if touched & (names | {"lm_head", "embed_tokens"}):
        base.config.tie_word_embeddings = text_config(base.config).tie_word_embeddings = False
        layer = getattr(head, "base_layer", head)
        if not hasattr(layer, "modules_to_save"):
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def _merged_card(run: Path, config: dict[str, Any], recipe: Recipe | None) -> str:
    base = config["base_model_name_or_path"]
    own = run / "README.md"
    if recipe is not None and own.exists():
        text = own.read_text(encoding="utf-8", errors="replace").replace(
            "library_name: peft", "library_name: transformers"
        )
        return for_merged(text.replace("A LoRA adapter of", "A model merged from a LoRA adapter and", 1))
    card = [
        *front_matter(base, "transformers"),
        f"# {run.absolute().name}",
        "",
        f"Merged from a LoRA adapter of `{without_folders(base)}`.",
    ]
    return "\n".join([*card, ""])
