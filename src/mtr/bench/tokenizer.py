"""A synthetic tokenizer: one token per word. Its chat template drops the thinking of earlier turns, as those of
reasoning models do.
"""

from __future__ import annotations

from typing import Any

TEMPLATE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|> ' + m.role + ' ' -}}
{%- if m.reasoning_content and loop.index0 > ns.last -%}
{{- '<think> ' + m.reasoning_content + ' </think> ' -}}
{%- endif -%}
{{- m.content + ' <|im_end|> ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|> assistant ' -}}{%- endif -%}
"""
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
_ROLES = ("user", "assistant")
_THINK = ("<think>", "</think>")


def make_words(vocabulary: int) -> list[str]:
    """Words that fit into a vocabulary of this size beside the template's own tokens; at most 4,096 entries in all."""
    return [f"w{i}" for i in range(min(vocabulary, 4096) - len(SPECIAL) - len(_ROLES) - len(_THINK))]


def make_tokenizer(words: list[str]) -> Any:
    """A tokenizer with one token per word, and the template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL, *_THINK, *_ROLES, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(_THINK))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = TEMPLATE
    return fast
