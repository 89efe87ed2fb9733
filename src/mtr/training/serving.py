"""How to serve a result, for its model card: the prompts that it was trained in, and what a server needs for them.

What is said of vLLM was tried on its CPU build 0.32, and read in the source of 0.33:
https://github.com/vllm-project/vllm
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtr.attention.model_parts import base_model, text_config
from mtr.chat.completion import COMMON_TAGS
from mtr.chat.findings import spelled
from mtr.chat.rendering import Renderer
from mtr.data.conversation import THINKING_KEYS
from mtr.model.auto_class import auto_class
from mtr.recipe.sections import Recipe

HEADING, BY_ADAPTER, BY_MERGED = "## Serving", "### The adapter", "### Merged"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (vllm/config/lora.py)."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""init_lora_weights of adapters whose base model stays as it is (vllm/lora/peft_helper.py)."""
_REQUEST = "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
_HISTORY = {
    "always": "stays in the prompt, so it has to be sent back with each answer",
    "since the last user message": "is dropped once the user has spoken again; in a loop of tool calls it stays, so it "
    "has to be sent back with the calls",
    "until answered": "stays until the question is answered; in a loop of tool calls it has to be sent back with them",
    "only the final message": "is rendered in the final message only",
    "never": "is dropped, so it need not be sent back",
}


@dataclass(frozen=True)
class Served:
    """What a server has to know."""

    name: str
    """Of the result's folder."""
    base: str
    """A Hub id, or the name of a folder."""
    revision: str | None
    trusts_remote_code: bool
    dtype: str
    arguments: Mapping[str, Any]
    """Of the chat template."""
    loader: str
    """The class of transformers."""
    is_harmony: bool
    """gpt-oss, whose chats vLLM renders with an encoder of its own (vllm/renderers/online_renderer.py)."""


def serving_section(folder: Path, name: str, recipe: Recipe, renderer: Renderer, model: Any) -> list[str]:
    """Lines of the model card.

    Args:
        folder: that the result was just written to.
        name: of the folder that it will be in.
        model: that was trained.
    """
    section, config = recipe.model, base_model(model).config
    served = Served(
        name=name,
        base=Path(section.name_or_path).name if Path(section.name_or_path).is_absolute() else section.name_or_path,
        revision=section.revision,
        trusts_remote_code=section.trust_remote_code,
        dtype=section.dtype,
        arguments=recipe.template,
        loader=auto_class(config).__name__,
        is_harmony=text_config(config).model_type == "gpt_oss",
    )
    lines = [HEADING, "", *_prompts(served, renderer), ""]
    lines += [f"Paths below are relative to the folder that `{name}` is in.", ""]
    adapter = folder / "adapter_config.json"
    has_template = (folder / "chat_template.jinja").exists()
    if adapter.exists():
        found = json.loads(adapter.read_text(encoding="utf-8"))
        lines += [BY_ADAPTER, "", *_with_transformers(served, renderer, name, adapter=True), ""]
        lines += [*_adapter_with_vllm(served, renderer, found, has_template), ""]
        lines += [BY_MERGED, "", "`mtr merge` writes a folder of whole weights, with tokenizer and template:", ""]
        lines += ["```bash", f"mtr merge {_path(name)}", *_vllm(served, renderer, f"{name}/merged"), "```", ""]
        lines += [*_with_transformers(served, renderer, f"{name}/merged"), ""]
    else:
        lines += [*_with_transformers(served, renderer, name), ""]
        lines += ["```bash", *_vllm(served, renderer, name), "```", ""]
    return [*lines, *_request(served, renderer), ""]


def for_merged(card: str) -> str:
    """The card of an adapter as that of the merged model: without what is about the adapter."""
    before, found, rest = card.partition(f"{BY_ADAPTER}\n")
    return before + BY_MERGED + rest.partition(BY_MERGED)[2] if found and BY_MERGED in rest else card


def _prompts(served: Served, renderer: Renderer) -> list[str]:
    findings = renderer.findings
    lines = ["The model was trained in the prompts that its chat template renders. To get the same ones:", ""]
    if served.arguments:
        given = ", ".join(f"`{key}: {spelled(value)}`" for key, value in served.arguments.items())
        lines.append(f"- Template arguments: {given} (`chat_template_kwargs` of a request).")
    else:
        lines.append("- The template needs no arguments.")
    stops = ", ".join(f"`{renderer.tokenizer.convert_ids_to_tokens(i)}` ({i})" for i in renderer.stop_ids)
    told = "" if not _untold(renderer) else f"; servers are not told of {_untold(renderer)}, see `stop_token_ids` below"
    lines.append(f"- An answer ends with one of {stops}{told}.")
    lines.append(f"- Thinking of earlier turns {_HISTORY[findings.history]}.{_where(renderer)}")
    if findings.history_inline != findings.history and findings.history_inline == "always" and findings.tags:
        lines.append(
            f"- An answer must not keep its `{findings.tags[0]}` block in `content` when it is sent back: the template "
            "would leave it in the prompt."
        )
    if findings.whitespace == "kept":
        lines.append(
            "- Strip `content` before it is sent back: servers that split off the thinking leave the line breaks "
            "before the answer, and the template would keep them."
        )
    if findings.dated:
        lines.append(f"- The template prints a date; in training it was {renderer.day.isoformat()}.")
    return lines


def _where(renderer: Renderer) -> str:
    field = next((key for key in THINKING_KEYS if key in renderer.findings.fields), None)
    if field is None or renderer.findings.history == "never":
        return ""
    return f" It goes into `{field}` of the message; vLLM answers with it in `reasoning`, and takes both names."


def _untold(renderer: Renderer) -> list[int]:
    """Stop tokens of the template that no config of the model names."""
    found = (renderer.findings.answer_stop, renderer.findings.call_stop)
    return sorted({stop.id for stop in found if stop is not None and not stop.stops_inference})


def _with_transformers(served: Served, renderer: Renderer, path: str, adapter: bool = False) -> list[str]:
    plain = served.loader == "AutoModelForCausalLM" and served.revision is None  # PEFT would load the newest one
    options = "".join([f', dtype="{served.dtype}"', ", trust_remote_code=True" if served.trusts_remote_code else ""])
    loader, source = served.loader, json.dumps(path)
    lines = ["```python"]
    if adapter:
        lines.append(f"from peft import {'AutoPeftModelForCausalLM' if plain else 'PeftModel'}")
        loader = "AutoPeftModelForCausalLM" if plain else loader
    lines += [
        f"from transformers import {'AutoTokenizer' if adapter and plain else f'{served.loader}, AutoTokenizer'}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
    ]
    if adapter and not plain:
        pinned = "" if served.revision is None else f", revision={json.dumps(served.revision)}"
        lines.append(f"base = {loader}.from_pretrained({json.dumps(served.base)}{pinned}{options})")
        lines.append(f"model = PeftModel.from_pretrained(base, {source})")
    else:
        lines.append(f"model = {loader}.from_pretrained({source}{options})")
    arguments = "".join(f", {key}={value!r}" for key, value in served.arguments.items())
    return [
        *lines,
        'messages = [{"role": "user", "content": "Hello"}]',
        "prompt = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{arguments}',
        ")",
        f"completion = model.generate(**prompt, eos_token_id={list(renderer.stop_ids)}, max_new_tokens=512)",
        'print(tokenizer.decode(completion[0, prompt["input_ids"].shape[1] :]))',
        "```",
    ]


def _adapter_with_vllm(served: Served, renderer: Renderer, config: Mapping[str, Any], template: bool) -> list[str]:
    if (problem := _vllm_refuses(config)) is not None:
        return [f"vLLM does not load this adapter, {problem}; it serves the merged model."]
    rank = next(size for size in _VLLM_RANKS if size >= _rank(config))
    options = [] if served.revision is None else [f"--revision {shlex.quote(served.revision)}"]
    options += ["--enable-lora", f"--max-lora-rank {rank}"]
    options.append(f"--lora-modules {shlex.quote(served.name)}={_path(served.name)}")
    text = "vLLM takes tokenizer and chat template from the base model, not from the adapter's folder"
    if template and not served.is_harmony:
        options.append(f"--chat-template {_path(f'{served.name}/chat_template.jinja')}")
        text += "; `--chat-template` names the one of the training"
    command = _command(shlex.quote(served.base), [*options, *_common(served, renderer)])
    return [f"{text}:", "", "```bash", *command, "```"]


def _vllm(served: Served, renderer: Renderer, path: str) -> list[str]:
    return _command(_path(path), [f"--served-model-name {shlex.quote(served.name)}", *_common(served, renderer)])


def _common(served: Served, renderer: Renderer) -> list[str]:
    options = [] if served.dtype == "auto" else [f"--dtype {served.dtype}"]
    if served.arguments and not served.is_harmony:
        options.append(f"--default-chat-template-kwargs {shlex.quote(json.dumps(dict(served.arguments)))}")
    if renderer.findings.tags == COMMON_TAGS and renderer.findings.prompt_ends != "closes thinking":
        options.append("--reasoning-parser deepseek_r1")
    return [*options, *(["--trust-remote-code"] if served.trusts_remote_code else [])]


def _command(model: str, options: list[str]) -> list[str]:
    """A line for each option."""
    lines = [f"vllm serve {model}", *(f"    {option}" for option in options)]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _request(served: Served, renderer: Renderer) -> list[str]:
    body: dict[str, Any] = {"model": served.name, "messages": [{"role": "user", "content": "Hello"}]}
    if untold := _untold(renderer):
        body["stop_token_ids"] = untold
    lines = ["```bash", _REQUEST + shlex.quote(json.dumps(body)), "```"]
    if served.is_harmony:
        lines += ["", "vLLM renders the chats of gpt-oss with an encoder of its own, and not with the template."]
    elif "--reasoning-parser deepseek_r1" in _common(served, renderer):
        lines += [
            "",
            "`--reasoning-parser deepseek_r1` splits at the think tags; an answer without thinking it takes for "
            "thinking. Without it, `content` holds both.",
        ]
    return ["A request:", "", *lines]


def _vllm_refuses(config: Mapping[str, Any]) -> str | None:
    """Why vLLM does not load an adapter (vllm/lora/peft_helper.py)."""
    start = config.get("init_lora_weights")
    problems = {
        "since it holds modules of the base model (modules_to_save)": bool(config.get("modules_to_save")),
        "since it is a DoRA adapter": bool(config.get("use_dora")),
        "since it has biases": bool(config.get("lora_bias")),
        f"since it started from {start}": isinstance(start, str) and start.lower() not in _PLAIN_STARTS,
        f"whose rank is {_rank(config)}": _rank(config) > _VLLM_RANKS[-1],
    }
    return next((problem for problem, holds in problems.items() if holds), None)


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _path(path: str) -> str:
    """A local path, which no server takes for a Hub id."""
    return shlex.quote(f"./{path}")
