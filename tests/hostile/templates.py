"""Chat templates: that fail, hang, grow, forget what they are given, steer a terminal or reach for the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.hostile import Attempt, Ended, Place, Prepare, after, command, done, either, json_lines, refused
from support.paths import QUICKSTART
from support.rows import conversation_row

from hostile.tokenizers import files, folder_for, gone, link

PLAIN = (QUICKSTART / "base" / "chat_template.jinja").read_text()
EACH = "{%- for message in messages -%}"
PROMPT = "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"


def template(text: str | bytes, name: str = "train", *arguments: object, **sections: Any) -> Prepare:
    """A command with this chat template."""

    def prepare(place: Place) -> Sequence[object]:
        place.base()
        place.write("base/chat_template.jinja", text)
        model = {"name_or_path": "{place}/base", **sections.pop("model", {})}
        return command(name, *arguments, model=model, **sections)(place)

    return prepare


def fails(name: str, text: str | bytes, *says: str, **keys: Any) -> Attempt:
    """A template that cannot be used: the model's folder is named, and why."""
    return refused(name, template(text), "base", "template", *says, **keys)


def lost(name: str, text: str, *says: str, **sections: Any) -> Attempt:
    """A template under which no turn can be trained, with the reason."""
    return refused(name, template(text, **sections), "data.train", "no turn", *says)


ENDLESS = (
    fails("a loop of 10^9", "{% for i in range(10**9) %}{% endfor %}" + PLAIN),
    fails(
        "loops in each other",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
        "long",
        slow=True,
        seconds=60,
    ),
    fails(
        "a loop over what it makes itself",
        "{% set x = namespace(a=[1]) %}{% for i in range(64) %}{% set x.a = x.a + x.a %}{% endfor %}",
        seconds=40,
    ),
    fails(
        "a text that doubles",
        "{% set x = namespace(a='ab') %}{% for i in range(64) %}{% set x.a = x.a + x.a %}{% endfor %}{{ x.a }}",
        seconds=40,
    ),
    fails("a text times 10^11", "{{ 'a' * 10**11 }}", seconds=40),
    fails("a list times 10^11", "{{ ([1] * 10**11) | length }}", seconds=40),
    fails("a text padded to 10^11", "{{ '%100000000000d' % 1 }}", seconds=40),
    fails("a text centred in 10^11", "{{ 'a' | center(100000000000) }}", seconds=40),
    fails("a text indented by 10^11", "{{ 'a' | indent(100000000000, true) }}", seconds=40),
    fails("a power of powers", "{{ 9 ** (9 ** 9) }}", slow=True, seconds=60),
    fails("a macro that calls itself", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
    fails(
        "two macros that call each other",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    ),
    fails("a loop that goes into itself", "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}"),
    fails("5,000 brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    fails("2,000 conditions in each other", "{% if x %}" * 2000 + "{% endif %}" * 2000),
    fails("20 MB of output for one message", EACH + "{{ 'word ' * 4000000 }}{%- endfor -%}" + PROMPT, seconds=40),
    either("3 MB of comment", template("{# " + "x" * 3_000_000 + " #}" + PLAIN), seconds=10),
)

BROKEN = (
    fails("empty", "", "no chat template"),
    fails("an open tag", "{% for message in messages"),
    fails("an end without its beginning", "{% endfor %}" + PLAIN),
    fails("a filter that is none", "{{ messages | shout }}"),
    fails("a test that is none", "{% if messages is lovely %}{% endif %}" + PLAIN),
    fails("a tag that is none", "{% train messages %}" + PLAIN),
    fails("a key that no message has", EACH + "{{ message.body.text }}{% endfor %}"),
    fails("a division by zero", "{{ 1 / 0 }}" + PLAIN),
    fails("a message of its own", "{{ raise_exception('only for Tuesdays') }}", "only for Tuesdays"),
    fails("escape codes in its message", "{{ raise_exception('\x1b[2J\x1b]0;owned\x07') }}"),
    fails("a message in many lines", "{{ raise_exception('one\ntwo\nerror: three') }}", "two"),
    fails("a message of 1 MB", "{{ raise_exception('no' * 500000) }}"),
    fails("a message that reorders what is read", "{{ raise_exception('\u202egnp.exe') }}"),
    refused("Latin-1", template("{# höflich #}".encode("latin-1") + PLAIN.encode()), "base", "utf-8"),
    refused("UTF-16", template(PLAIN.encode("utf-16")), "base", "utf-8"),
    fails("an import of a module", "{% import 'os' as os %}" + PLAIN),
    fails("an include of a file", "{% include '/etc/passwd' %}" + PLAIN),
    fails("a base template", "{% extends 'base.jinja' %}"),
    fails("a way to Python's classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + PLAIN),
    fails("a way through a function's globals", "{{ raise_exception.__globals__['os'].system('touch harm') }}" + PLAIN),
    fails("a way through the format method", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}" + PLAIN),
    fails("an attribute of the loop", "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}" + PLAIN),
    fails("a change of the messages", "{% for m in messages %}{{ messages.append(m) }}{% endfor %}" + PLAIN),
    fails("a change of a message", EACH + "{{ message.update({'content': 'x'}) }}{% endfor %}" + PLAIN),
)

FORGETFUL = (
    lost("white space", " \n\t "),
    lost("NUL bytes", "\0" * 512),
    lost("nothing of the messages", "hello" + PROMPT),
    lost("nothing at all but the prompt", PROMPT),
    lost("the same for all", "{{ messages | length }}" + PROMPT),
    lost(
        "no answers", EACH + "{% if message.role != 'assistant' %}{{ message.content }}{% endif %}{% endfor %}" + PROMPT
    ),
    lost(
        "answers in capitals",
        EACH + "<|im_start|>{{ message.role }}\n{{ message.content | upper }}<|im_end|>\n{% endfor %}" + PROMPT,
    ),
    lost(
        "half of each answer",
        EACH + "<|im_start|>{{ message.role }}\n{{ message.content[:9] }}<|im_end|>\n{% endfor %}" + PROMPT,
    ),
    lost(
        "answers backwards",
        EACH + "<|im_start|>{{ message.role }}\n{{ message.content | reverse }}<|im_end|>\n{% endfor %}" + PROMPT,
    ),
    lost(
        "a prompt that is not what comes before the answer",
        EACH
        + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>tool\n{% endif %}",
    ),
)


def trained_as_written(_: Place, ended: Ended) -> None:
    turns = [turn for row in json_lines(ended) for turn in row["turns"]]
    assert turns
    assert all(turn["trained"] or turn["reason"] for turn in turns)


ODD = (
    done("a comment in another script", template("{# учтиво #}" + PLAIN, "inspect", "--all"), holds=trained_as_written),
    done(
        "a variable that nobody sets", template("{{ nothing }}" + PLAIN, "inspect", "--all"), holds=trained_as_written
    ),
    done(
        "text that looks like a template",
        template("{% raw %}{{ x }}{% endraw %}" + PLAIN, "inspect", "--all"),
        holds=trained_as_written,
    ),
    done(
        "loop controls",
        template("{% for m in messages %}{% break %}{% endfor %}" + PLAIN, "inspect", "--all"),
        holds=trained_as_written,
    ),
    refused(
        "no template",
        files(gone("chat_template.jinja")),
        "base",
        "no chat template",
    ),
    refused(
        "a folder for the template",
        files(folder_for("chat_template.jinja")),
        "base",
    ),
    refused(
        "a dangling link for the template",
        files(link("none", "chat_template.jinja")),
        "base",
    ),
    refused(
        "an argument that breaks the template",
        template("{{ 1 + depth }}" + PLAIN, template={"depth": "x"}),
        "base",
        "template",
    ),
    refused("audit: a loop of 10^9", template("{% for i in range(10**9) %}{% endfor %}" + PLAIN, "audit"), "base"),
    refused(
        "audit: a macro that calls itself", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "audit"), "base"
    ),
    refused("inspect: escape codes in its message", template("{{ raise_exception('\x1b[2J') }}", "inspect"), "base"),
    refused("verify: it fails", template("{{ messages.x.y }}", "verify"), "base"),
    refused(
        "a loop only for long conversations",
        after(
            lambda place: place.rows(conversation_row(turns=6)),
            template(
                EACH
                + "{% if loop.index0 > 9 %}{% for i in range(99999) %}{% for j in range(99999) %}"
                + "{% endfor %}{% endfor %}{% endif %}{%- endfor -%}"
                + PLAIN
            ),
        ),
        "rows.jsonl, line 1",
        "takes too long",
        slow=True,
        seconds=60,
    ),
    Attempt(
        "audit: answers in capitals",
        template(
            EACH + "<|im_start|>{{ message.role }}\n{{ message.content | upper }}<|im_end|>\n{% endfor %}" + PROMPT,
            "audit",
        ),
        (),
        codes=(1,),
    ),
)

ATTEMPTS = (*ENDLESS, *BROKEN, *FORGETFUL, *ODD)
