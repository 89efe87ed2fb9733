"""What others get from a run: one merged model, a model card, a push to the Hub.

mtr merge RUN    base weights + adapter -> RUN/merged, a folder that plain transformers loads
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from mtr import __version__
from mtr.errors import UserError
from mtr.recipe.sections import Recipe

if TYPE_CHECKING:
    from mtr.training.state import Summary

TOLERANCE = 1e-3
"""Largest difference of a logit in float32, as a share of the largest logit: products are added in another order."""
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


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

    from mtr.model.loading import unquantised

    recipe = _check_run(run, output)
    config = json.loads((run / "adapter_config.json").read_text())
    name, trust = config["base_model_name_or_path"], bool(recipe and recipe.model.trust_remote_code)
    revision = recipe.model.revision if recipe else config.get("revision")
    load = {"revision": revision, "trust_remote_code": trust, "use_safetensors": True}
    try:
        stored = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **load, **unquantised(stored))
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{run}: the base model cannot be loaded from {name}: {_one_line(error)}") from None
    saved_dtype = _dtype(dtype, stored)
    ids = _sample(base)
    try:
        adapted = PeftModel.from_pretrained(base, str(run)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{run}: the adapter cannot be loaded: {_one_line(error)}") from None
    wanted = _logits(adapted, ids)
    _untie(base, adapted, config)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{run}: the adapter cannot be merged: {_one_line(error)}") from None
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
            return Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
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


# --- model card and Hub ---


def write_model_card(output_dir: Path, recipe: Recipe, summary: Summary) -> None:
    """README.md: what it was made from, with what, and how well it went. No path of the machine is in it."""
    base, what = _shown(recipe.model.name_or_path), "LoRA adapter" if recipe.lora else "model"
    rows = [("conversations", f"{summary.counts.conversations:,}"), ("turns", f"{summary.counts.turns:,}")]
    rows += [("supervised tokens", f"{summary.counts.supervised_tokens:,}"), ("steps", f"{summary.steps:,}")]
    rows += [("training loss, last step", f"{summary.loss:.4f}")] if summary.loss is not None else []
    best = recipe.training.load_best_at_end and summary.best_eval_loss is not None
    if summary.eval_loss is not None:
        rows.append(("evaluation loss", f"{summary.best_eval_loss if best else summary.eval_loss:.4f}"))
    if best:
        rows.append(("taken from step", f"{summary.best_step:,}"))
    else:
        rows += [(f"evaluation loss, {name}", f"{loss:.4f}") for name, loss in summary.eval_loss_by_source.items()]
    if len(summary.exact_match) == 2:
        rows.append(("held-out turns answered exactly", "{:.1%} before, {:.1%} after".format(*summary.exact_match)))
    sources = ", ".join(f"`{_shown(source.path)}`" for source in recipe.data.train)
    held_out = ", ".join(f"`{_shown(source.path)}`" for source in recipe.data.eval) or "none"
    card = [
        *_front_matter(recipe.model.name_or_path, "peft" if recipe.lora else "transformers"),
        f"# {output_dir.absolute().name}",
        "",
        f"A {what} of `{base}`, trained by mtr {__version__}: every turn in the context that inference gives it, in "
        "one pass per conversation.",
        "",
        f"- base model: `{base}`" + (f", revision `{recipe.model.revision}`" if recipe.model.revision else ""),
        f"- data: {sources}",
        f"- evaluation data: {held_out}",
        f"- versions: {', '.join(f'{name} {importlib.metadata.version(name)}' for name in _PACKAGES)}",
        "",
        "| result | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(_without_paths(recipe.model_dump()), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    (output_dir / "README.md").write_text("\n".join(card), encoding="utf-8")


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


def _front_matter(base: str, library: str) -> list[str]:
    known = [] if Path(base).is_absolute() else [f"base_model: {base}"]
    return ["---", *known, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [mtr]", "---", ""]


def _shown(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _shown(value) if isinstance(value, str) and Path(value).is_absolute() else value


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
        return f"not pushed {repository}: {_one_line(error)}; everything is in {folder}"
    return f"pushed     {repository}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
