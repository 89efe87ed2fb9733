"""`mtr init`: from what was found in model and data to the text of a recipe that fits a GPU.

survey  ->  length_of_data  ->  fit: bits of the weights, longest turn, largest pack  ->  compose  ->  text, read back
"""

from __future__ import annotations

from typing import Any

import torch

from mtr.checks.data_report import DataReport
from mtr.errors import UserError, one_line
from mtr.model.device import available_memory, device_name
from mtr.plan.gpus import Gpu, find_gpu
from mtr.plan.memory import Settings, settings_for
from mtr.recipe.plain_yaml import parse_yaml
from mtr.recipe.sections import Recipe
from mtr.start.facts import Asked, Fit, Method, Survey
from mtr.start.settings import compose, length_of_data
from mtr.training.fitting import estimator_of

_SHORTEST = 1024
"""Below this, turns are not cut any further to make a model fit."""
_CPU_PACK, _GPU_PACK = 4096, 16384


def new_recipe(asked: Asked, found: Survey, gpu: str | None, method: str, modeline: str | None) -> str:
    """
    Args:
        gpu: a name, `cpu`, or None: what this machine has.
        method: lora, qlora, full or auto.
        modeline: the comment that tells an editor where the schema is.

    Raises:
        UserError: the model does not fit, or there is nothing to train in the rows.
    """
    _check_trained(found.report)
    length, reason = length_of_data(found)
    fitting = fit(found, gpu, method, length)
    if fitting.max_length < length:
        reason = f"what fits {fitting.device}; {reason}"
    text = compose(asked, found, fitting, reason, modeline)
    Recipe.model_validate(parse_yaml(text))
    return text


def _check_trained(report: DataReport) -> None:
    """
    Raises:
        UserError: a recipe for these rows would train nothing.
    """
    if not report.trained:
        reasons = [*report.unreadable, *report.refused, *report.chosen, *report.filtered]
        why = f"; the first reason: {reasons[0]}" if reasons else ""
        raise UserError(f"--data: nothing can be trained of the {report.rows:,} rows that were looked at{why}")


def fit(survey: Survey, gpu: str | None, method: str, max_length: int) -> Fit:
    """
    Args:
        gpu: a name, `cpu`, or None: what this machine has.
        method: lora, qlora, full, or auto: LoRA, with the weights in 4 bits if they do not fit otherwise.
        max_length: of the data.

    Raises:
        UserError: the model fits in no way; the message says with what it would.
    """
    device = _here() if gpu is None else None if gpu == "cpu" else find_gpu(gpu)
    if device is None:
        return _on_cpu(survey, method, max_length)
    recipe = _recipe(survey.recipe, method, max_length, _GPU_PACK)
    chosen: Method = "lora" if method == "auto" else method  # type: ignore[assignment]
    if survey.config is None:
        half = "bfloat16" if device.bf16 else "float16"
        return Fit(device.name, half, True, chosen, max_length, recipe.sequence.budget, "")
    settings, bits = _settings(recipe, device, method), ": in 16 they do not fit"
    if settings is None:  # then shorter turns, with as small weights as may be
        bits = ", which leaves memory for longer turns"
        least = "qlora" if method == "auto" and device.bf16 else method
        recipe = _recipe(survey.recipe, least, _SHORTEST, max(_GPU_PACK, max_length))
        settings = _settings(recipe, device, least)
    if settings is None:
        raise UserError(
            f"--gpu: {survey.recipe.model.name_or_path} does not fit {device.name} ({device.memory_gib:.0f} GiB) with "
            f"turns of {_SHORTEST:,} tokens and --method {method}; name a larger GPU or a smaller model"
            f"{', or try --method auto' if method != 'auto' else ''}"
        )
    found = settings.recipe
    memory = f"{settings.fit.high / 2**30:.1f} of {device.memory_gib:.1f} GiB by estimate"
    used: Method = "qlora" if found.model.load_in_4bit else chosen
    tokens = found.sequence.budget
    why = bits if method == "auto" else ""
    return Fit(device.name, found.model.dtype, True, used, min(max_length, tokens), tokens, memory, why)


def _recipe(recipe: Recipe, method: str, max_length: int, pack: int) -> Recipe:
    sections: dict[str, Any] = {"sequence": {"max_length": max_length, "max_tokens": max(pack, max_length)}}
    if method == "qlora":
        sections["model"] = {"load_in_4bit": True}
    changed = recipe.replace(**sections)
    return changed.model_copy(update={"lora": None}) if method == "full" else changed


def _settings(recipe: Recipe, gpu: Gpu, method: str) -> Settings | None:
    found = settings_for(recipe, gpu)
    in_four_bits = found is not None and found.recipe.model.load_in_4bit
    return None if in_four_bits and method not in ("auto", "qlora") else found


def _here() -> Gpu | None:
    """The first GPU of this machine."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(found.name, found.total_memory / 2**30, 0.0, "this machine", bf16)


def _on_cpu(survey: Survey, method: str, max_length: int) -> Fit:
    if method == "qlora":
        raise UserError("--method: qlora needs a CUDA GPU (bitsandbytes); name it with --gpu, or use lora")
    cpu = torch.device("cpu")
    recipe = _recipe(survey.recipe, method, max_length, _CPU_PACK)
    name, tokens, memory = device_name(cpu), recipe.sequence.budget, ""
    if survey.config is not None:
        needed, free = _needed_on_cpu(recipe, survey.config), available_memory(cpu)
        memory = f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB that are free, by estimate"
        if needed > free:
            memory += ": too much; use a smaller model, or a GPU"
    return Fit(f"CPU, {name}", "float32", False, "full" if method == "full" else "lora", max_length, tokens, memory)


def _needed_on_cpu(recipe: Recipe, config: Any) -> int:
    """Bytes, by estimate.

    Raises:
        UserError: no model can be built from the config.
    """
    try:
        estimator = estimator_of(recipe, config, torch.float32, ["segment"], torch.device("cpu"))
        state = estimator.training_state()
        least = estimator.activations("full", recipe.sequence.budget)
        return int(estimator.weights() + state.kept + max(state.update, int(least / estimator.share)))
    except UserError:
        raise
    except Exception as error:  # code of a model from the Hub may do anything
        name = recipe.model.name_or_path
        raise UserError(f"--model: no model can be built from the config.json of {name}: {one_line(error)}") from None
