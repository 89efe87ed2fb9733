"""Small chat templates, one for each way in which real ones treat thinking, tools and the end of a turn.

Each has, in Python, the expected completion (`says`), so that tests can check the renderer independently of it, and
the expected findings of the audit. `says` is itself tested: where `straight` is set, the template renders a turn as its
prompt followed by exactly that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from support.paths import QUICKSTART

Says = Callable[[str, str, str], str]
"""Thinking, response, calls as text -> completion, end-of-turn token included."""

PROMPT = "{{- '<|im_start|>assistant\\n' -}}"
END = "{{- '<|im_end|>\\n' -}}"
CONTENT = "{{- message.content or '' -}}"
STRIPPED = "{{- (message.content or '').split('</think>')[-1].lstrip('\\n') -}}"
CALLS = (
    "{%- for call in message.tool_calls or [] -%}{{- '<call>' + (call.function | tojson) + '</call>' -}}{%- endfor -%}"
)


def opening(text: str) -> str:
    """A generation prompt followed by a text."""
    return "{{- '<|im_start|>assistant\\n" + text + "' -}}"


def thinking(key: str = "reasoning_content", when: str = "true", spaced: bool = True) -> str:
    """Thinking in its tags, on some condition."""
    start, end = ("'<think>\\n'", "'\\n</think>\\n\\n'") if spaced else ("'<think>'", "'</think>'")
    return f"{{%- if message.{key} and ({when}) -%}}{{{{- {start} + message.{key} + {end} -}}}}{{%- endif -%}}"


def template(
    assistant: str,
    prompt: str = PROMPT,
    end: str = END,
    head: str = "",
    other: str = CONTENT,
    header: str = "{{- '<|im_start|>' + message.role + '\\n' -}}",
) -> str:
    """Every message under its header; `at.user` and `at.answer` are the last ones."""
    return (
        "{%- set at = namespace(user=-1, answer=-1) -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}"
        "{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set at.answer = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
        + head
        + "{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}{%- endif -%}"
        + "{%- for message in messages -%}"
        + header
        + f"{{%- if message.role == 'assistant' -%}}{assistant}{{%- else -%}}{other}{{%- endif -%}}"
        + end
        + "{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}"
    )


def spaced(thought: str, response: str, calls: str) -> str:
    """A think block with each tag on its own line, and the response."""
    block = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    return f"{block}{response}{calls}<|im_end|>"


def opened(thought: str, response: str, calls: str) -> str:
    """The same after a prompt that ends in <think> and a newline; without thinking it has to be closed."""
    return f"{thought}\n</think>\n\n{response}{calls}<|im_end|>"


def tight(thought: str, response: str, calls: str) -> str:
    block = f"<think>{thought}</think>" if thought else ""
    return f"{block}{response}{calls}<|im_end|>"


def opened_tight(thought: str, response: str, calls: str) -> str:
    return f"{thought}</think>{response}{calls}<|im_end|>"


def always_block(thought: str, response: str, calls: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{response}{calls}<|im_end|>"


def plain(_: str, response: str, calls: str) -> str:
    return f"{response}{calls}<|im_end|>"


@dataclass(frozen=True)
class Behaviour:
    text: str
    says: Says
    found: dict[str, Any] = field(default_factory=dict)
    """Fields of Findings."""
    straight: bool = True
    """Whether a turn is rendered as its prompt followed by its completion."""
    thinks: bool = True
    """Whether turns with thinking can be trained."""
    tools: bool = True
    tokens: tuple[str, ...] = ()
    """Special tokens besides those of ChatML."""
    plain_tokens: tuple[str, ...] = ()
    """Added tokens that are not special."""
    stops: tuple[str, ...] = ()
    """Stop tokens of the generation config; without any, the tokenizer's eos, <|im_end|>."""
    bos: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, str] | None = None
    """As the recipe names them."""


LAST = thinking(when="loop.last")
BLOCK = (
    "{%- if loop.last -%}{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' -}}{%- endif -%}"
)
NEVER = {"answers_read": (), "calls_read": ()}
CHANNELS = (
    "{%- set thought = message.thinking or (message.content or '' if message.tool_calls else '') -%}"
    "{%- if message.tool_calls -%}"
    "{%- if thought and at.answer < loop.index0 -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant to=' + message.tool_calls[0].function.name + '<|channel|>commentary<|message|>' -}}"
    "{{- (message.tool_calls[0].function.arguments | tojson) + '<|call|>' -}}"
    "{%- else -%}"
    "{%- if thought and loop.last -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}"
    "{{- '<|return|>' if loop.last else '<|end|>' -}}"
    "{%- endif -%}"
)


def channels(thought: str, response: str, calls: str) -> str:
    if calls:
        thought = thought or response
    block = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if calls:
        name, arguments = (
            json.loads(calls.split("<call>")[1].split("</call>")[0])[key] for key in ("name", "arguments")
        )
        return f"{block} to={name}<|channel|>commentary<|message|>{json.dumps(arguments, ensure_ascii=False)}<|call|>"
    return f"{block}<|channel|>final<|message|>{response}<|return|>"


BEHAVIOURS: dict[str, Behaviour] = {
    "history thinking is stripped": Behaviour(
        template(LAST + CONTENT + CALLS),
        spaced,
        {
            "history": "only the final message",
            "prompt_ends": "nothing",
            "tags_from": "rendering",
            "fields": ("reasoning_content",),
        },
    ),
    "history thinking is kept": Behaviour(template(thinking() + CONTENT + CALLS), spaced, {"history": "always"}),
    "kept since the last user message": Behaviour(
        template(thinking(when="loop.index0 > at.user") + CONTENT + CALLS),
        spaced,
        {"history": "since the last user message"},
    ),
    "kept until the loop is answered": Behaviour(
        template(thinking(when="at.answer < loop.index0 or loop.last") + CONTENT + CALLS),
        spaced,
        {"history": "until answered"},
        straight=False,
    ),
    "an empty block where there is no thinking, on the last turn only": Behaviour(
        template(BLOCK + CONTENT + CALLS),
        always_block,
        {"answer_opening": "<think>\n\n</think>\n\n"},
    ),
    "its own thinking is never rendered": Behaviour(
        template(STRIPPED + CALLS + "{#- <think> -#}"),
        spaced,
        NEVER | {"tags_from": "template"},
        straight=False,
    ),
    "never rendered, the prompt opens it": Behaviour(
        template(STRIPPED + CALLS, opening("<think>\\n")),
        opened,
        NEVER | {"prompt_ends": "opens thinking", "spacing": ("\n", "\n", "\n\n")},
        straight=False,
    ),
    "never rendered, the prompt opens it without a newline": Behaviour(
        template(STRIPPED + CALLS, opening("<think>")),
        opened_tight,
        NEVER | {"prompt_ends": "opens thinking", "spacing": ("", "", "")},
        straight=False,
    ),
    "rendered, the prompt opens it": Behaviour(
        template(
            BLOCK + CONTENT + CALLS,
            opening("<think>\\n"),
        ),
        opened,
        {"prompt_ends": "opens thinking", "answers_read": ("reasoning_content", "reasoning", "thinking")},
    ),
    "the prompt opens it, and an answer without is rendered inside": Behaviour(
        template("{%- if loop.last -%}{{- '<think>\\n' -}}{%- endif -%}" + CONTENT + CALLS, opening("<think>\\n")),
        opened,
        NEVER | {"prompt_ends": "opens thinking"},
        straight=False,
    ),
    "a switch closes it": Behaviour(
        template(
            LAST + CONTENT + CALLS,
            PROMPT + "{%- if enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
        ),
        spaced,
        {"prompt_ends": "nothing", "switches": [("enable_thinking", False, "closes the thinking")]},
    ),
    "closed, and a switch opens it": Behaviour(
        template(
            LAST + CONTENT + CALLS,
            "{%- if deliberate == 'yes' -%}"
            + opening("<think>\\n")
            + "{%- else -%}"
            + opening("<think>\\n\\n</think>\\n\\n")
            + "{%- endif -%}",
        ),
        plain,
        {"prompt_ends": "closes thinking", "switches": [("deliberate", "yes", "opens the thinking")]},
        straight=False,
        thinks=False,
    ),
    "closed for good": Behaviour(
        template(LAST + CONTENT + CALLS, opening("</think>")),
        plain,
        {"prompt_ends": "closes thinking", "switches": []},
        straight=False,
        thinks=False,
    ),
    "a switch keeps it in history": Behaviour(
        template(thinking(when="loop.last or keep_all") + CONTENT + CALLS),
        spaced,
        {"switches": [("keep_all", True, "keeps thinking in history: always")]},
    ),
    "read inline only, stripped from history": Behaviour(
        template(
            "{%- if loop.last -%}{{- message.content or '' -}}"
            "{%- else -%}{{- (message.content or '').split('</think>')[-1].lstrip('\\n') -}}{%- endif -%}" + CALLS
        ),
        spaced,
        {"answers_read": ("inline",), "fields": (), "history_inline": "only the final message"},
    ),
    "inline thinking passes through": Behaviour(
        template(CONTENT + CALLS),
        spaced,
        {"answers_read": ("inline",), "fields": (), "history_inline": "always", "tags_from": "tokenizer"},
    ),
    "read from `thinking`": Behaviour(
        template(thinking("thinking", "loop.last") + CONTENT + CALLS), spaced, {"fields": ("thinking",)}
    ),
    "read from `reasoning`": Behaviour(
        template(thinking("reasoning", "loop.last", spaced=False) + CONTENT + CALLS),
        tight,
        {"fields": ("reasoning",), "spacing": ("", "", "")},
    ),
    "read from parts of the content": Behaviour(
        template(
            "{%- if message.content is string -%}" + CONTENT + "{%- else -%}"
            "{%- for part in message.content or [] -%}"
            "{%- if part.type == 'thinking' -%}"
            "{%- if loop.index0 == 0 -%}{{- '<think>' + part.thinking + '</think>' -}}{%- endif -%}"
            "{%- else -%}{{- part.text -}}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}" + CALLS
        ),
        tight,
        {
            "answers_read": ("content parts", "inline"),
            "calls_read": ("content parts", "inline"),
            "fields": ("content parts",),
            "spacing": ("", "", ""),
            "history": "always",
            "history_inline": "always",
        },
    ),
    "rendered with tool calls only": Behaviour(
        template(thinking(when="message.tool_calls and loop.last", spaced=False) + STRIPPED + CALLS),
        tight,
        {"answers_read": (), "calls_read": ("reasoning_content", "reasoning", "thinking"), "spacing": ("", "", "")},
        straight=False,
    ),
    "channels, with another end in history": Behaviour(
        template(
            CHANNELS,
            "{{- '<|start|>assistant' -}}",
            end="{%- if message.role != 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}",
            header="{%- if message.role != 'assistant' -%}"
            "{{- '<|start|>' + message.role + '<|message|>' -}}{%- endif -%}",
        ),
        channels,
        {
            "tags": ("<|channel|>analysis<|message|>", "<|end|>"),
            "tags_from": "rendering",
            "history": "until answered",
            "history_end": "<|end|>",
            "parallel_calls": "lost",
            "text_beside_calls_with_thinking": "lost",
        },
        straight=False,
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "no end of turn after the last answer": Behaviour(
        template(
            LAST + CONTENT + CALLS,
            end="{%- if message.role != 'assistant' or not loop.last -%}" + END + "{%- endif -%}",
        ),
        spaced,
        {"answer_stop": ("<|im_end|>", "next message", True)},
        straight=False,
    ),
    "no end of turn at all": Behaviour(
        template(
            LAST + CONTENT + CALLS,
            end="{%- if message.role != 'assistant' -%}" + END + "{%- endif -%}",
        ),
        lambda *words: spaced(*words).replace("<|im_end|>", "<|endoftext|>"),
        {"answer_stop": ("<|endoftext|>", "generation config", True)},
        straight=False,
        stops=("<|endoftext|>",),
    ),
    "the next message ends the turn": Behaviour(
        template(
            LAST + CONTENT + CALLS,
            prompt="{{- '<|assistant|>' -}}",
            end="",
            header="{{- '<|' + message.role + '|>' -}}",
        ),
        lambda t, r, c: spaced(t, r, c).replace("<|im_end|>", "<|tool|>" if c else "<|user|>"),
        {"answer_stop": ("<|user|>", "next message", True), "call_stop": ("<|tool|>", "next message", True)},
        straight=False,
        tokens=("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"),
        stops=("<|endoftext|>", "<|user|>", "<|tool|>"),
    ),
    "text and an eos after the stop token": Behaviour(
        template(LAST + CONTENT + CALLS) + "{%- if not add_generation_prompt -%}{{- '<|endoftext|>' -}}{%- endif -%}",
        spaced,
        {"answer_stop": ("<|im_end|>", "template", True), "after_stop": "\n<|endoftext|>"},
        straight=False,
        stops=("<|endoftext|>", "<|im_end|>"),
    ),
    "a stop token that is not special, and that inference has to be told": Behaviour(
        template(LAST + CONTENT + CALLS, end="{{- '<stop>\\n' -}}"),
        lambda *words: spaced(*words).replace("<|im_end|>", "<stop>"),
        {"answer_stop": ("<stop>", "template", False)},
        plain_tokens=("<stop>",),
        stops=("<|endoftext|>",),
        tools=False,
    ),
    "white space is trimmed": Behaviour(
        template(LAST + "{{- (message.content or '').strip() -}}" + CALLS), spaced, {"whitespace": "trimmed"}
    ),
    "an answer is cut at its closing tag": Behaviour(
        template(LAST + "{{- (message.content or '').split('</think>')[-1] -}}" + CALLS),
        spaced,
        {"close_tag_in_response": "lost"},
    ),
    "tool arguments must be text": Behaviour(
        template(
            LAST + CONTENT + "{%- for call in message.tool_calls or [] -%}"
            "{{- '<call>{\"name\": \"' + call.function.name + '\", ' -}}"
            "{{- '\"arguments\": ' + call.function.arguments + '}</call>' -}}"
            "{%- endfor -%}"
        ),
        spaced,
        {"arguments": "string", "string_arguments": "rendered"},
    ),
    "a call must have a content": Behaviour(
        template(LAST + "{{- message.content + '' -}}" + CALLS),
        spaced,
        {"call_content": "empty", "string_arguments": "lost"},
    ),
    "the date is printed": Behaviour(
        template(LAST + CONTENT + CALLS, head="{%- set form = '%d %b %Y' -%}{{- strftime_now(form) + '\\n' -}}"),
        spaced,
        {"dated": True},
    ),
    "BOS is written": Behaviour(
        template(LAST + CONTENT + CALLS, head="{{- bos_token -}}"),
        spaced,
        {"bos": "template"},
        tokens=("<s>",),
        bos="<s>",
    ),
    "words open and close the thinking": Behaviour(
        template(
            "{%- if message.reasoning_content and loop.last -%}"
            "{{- message.reasoning_content + '\\n[FINAL]\\n' -}}{%- endif -%}" + CONTENT + CALLS,
            opening("Here are my thoughts:\\n"),
        ),
        lambda t, r, c: f"{t}\n[FINAL]\n{r}{c}<|im_end|>",
        {"tags": ("Here are my thoughts:", "[FINAL]"), "prompt_ends": "opens thinking"},
        straight=False,
    ),
    "no generation prompt, and the system message only before the last user message": Behaviour(
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        "{{- '[ASK]' + (messages[0].content + '\\n' if loop.last and messages[0].role == 'system' else '') -}}"
        "{{- message.content + '[/ASK]' -}}"
        "{%- elif message.role == 'assistant' -%}" + CONTENT + CALLS + "{{- '<|im_end|>' -}}"
        "{%- elif message.role == 'tool' -%}{{- '[GIVEN]' + message.content + '[/GIVEN]' -}}{%- endif -%}"
        "{%- endfor -%}",
        spaced,
        {"generation_prompt": "", "answers_read": ("inline",), "tools": "lost"},
        straight=False,
        tokens=("[ASK]", "[/ASK]"),
    ),
    "the tags are named in the recipe": Behaviour(
        template(CONTENT.replace("message.content", "(message.content or '').split('[/why]')[-1]") + CALLS),
        lambda t, r, c: (f"[why]\n{t}\n[/why]\n\n" if t else "") + f"{r}{c}<|im_end|>",
        NEVER | {"tags": ("[why]", "[/why]"), "tags_from": "recipe"},
        straight=False,
        tags=("[why]", "[/why]"),
    ),
}


@functools.cache
def tokenizer(name: str) -> Any:
    """The quickstart's tokenizer with a behaviour's template and tokens."""
    behaviour = BEHAVIOURS[name]
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    added = [(behaviour.tokens, True), (behaviour.plain_tokens, False)]
    loaded.add_tokens([transformers.AddedToken(t, special=s, normalized=False) for texts, s in added for t in texts])
    if behaviour.bos:
        loaded.bos_token = behaviour.bos
    loaded.chat_template = behaviour.text
    return loaded


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
