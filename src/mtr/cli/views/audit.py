"""The report of `mtr audit` in words: what the template does, sample conversations, the data, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtr.chat.completion import PARTS
from mtr.chat.findings import Findings, Stop, spelled
from mtr.checks.audit import Report, Trial
from mtr.checks.data_report import DataReport, Lengths
from mtr.cli.views.tables import count, plain_table
from mtr.console import printable


def show_audit(report: Report, out: Console) -> None:
    """Print what `mtr.checks.audit.audit` found."""
    out.print(f"[bold]{escape(printable(report.name))}[/]")
    _show_pairs(explain(report), out)
    out.print("")
    _show_trials(report.trials, out)
    if report.data is not None:
        out.print("")
        _show_data(report.data, out)
    out.print("")
    what = "common conversations" if report.data is None else "this data"
    verdict = f"training would lose {'parts' if report.losses else 'nothing'} of {what}"
    out.print(f"[{'red' if report.losses else 'green'}]{verdict}[/]")


def _show_trials(trials: Iterable[Trial], out: Console) -> None:
    columns = ["conversation", "turns\ntrained", "remarks"]
    table = plain_table("sample conversations, as training would use them", columns, left=["conversation", "remarks"])
    table.columns[-1].no_wrap = False
    for trial in trials:
        remarks = "; ".join((*trial.reasons, *trial.notes, *trial.chosen))
        table.add_row(trial.kind, f"{trial.trained} of {trial.turns}", escape(printable(remarks)))
    out.print(table, soft_wrap=False)


def _show_data(data: DataReport, out: Console) -> None:
    rows = f"{data.rows:,} rows of a stream" if data.of_rows is None else f"{data.rows:,} of {data.of_rows:,} rows"
    out.print(f"[bold]data[/]  {rows}: {data.trained:,} of {data.turns:,} turns are trained")
    lines = [
        (what, number, text)
        for what, counts in (("refused", data.refused), ("excluded", data.chosen), ("note", data.notes))
        for text, number in counts.items()
    ]
    pairs = [(what, f"{count(n, 'turn')}: {text} (first: {data.examples[text]})") for what, n, text in lines]
    pairs += [("unreadable", f"{count(number, 'row')}: {text}") for text, number in data.unreadable.items()]
    pairs += [("filtered", f"{count(number, 'row')}: {text}") for text, number in data.filtered.items()]
    pairs += [
        ("remark", f"{count(n, 'row')}: {text} (first: {data.examples[text]})") for text, n in data.remarks.items()
    ]
    pairs += [("lengths", _in_words(data.lengths))] if data.lengths else []
    pairs += [("ends the run", f"{setting}, first at {where}") for setting, where in data.stops.items()]
    _show_pairs(pairs, out)


def _in_words(lengths: Lengths) -> str:
    def tokens(number: int | None) -> str:
        return f"more than {lengths.max_length:,}" if number is None else f"{number:,}"

    return (
        f"median {tokens(lengths.median)}, 95 % {tokens(lengths.percentile_95)}, longest {tokens(lengths.longest)} "
        f"tokens (max_length {lengths.max_length}: {lengths.longer:,} of {count(lengths.turns, 'turn')} "
        f"{'is' if lengths.longer == 1 else 'are'} longer)"
    )


def _show_pairs(pairs: Iterable[tuple[str, str]], out: Console) -> None:
    """Topic and text side by side; a topic is shown on the first of its rows only."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = None
    for topic, text in pairs:
        table.add_row("" if topic == last else topic, escape(printable(text)))
        last = topic
    out.print(table, soft_wrap=False)


# --- the findings in words --------------------------------------------------------------------------------------------


def explain(report: Report) -> Iterator[tuple[str, str]]:
    """Topic and sentence, in the order in which a reader asks."""
    found = report.findings
    if report.arguments:
        yield "arguments", ", ".join(f"{key}: {spelled(value)}" for key, value in report.arguments.items())
    yield from _explain_thinking(found)
    yield from _explain_prompt(found)
    yield from _explain_end(found)
    yield from _explain_text(found)
    yield from _explain_tools(found)
    yield "system message", _SURVIVES[found.system]
    if found.dated:
        yield "date", f"the template writes the date: {report.date} in this run; set by date in the recipe"
    yield from _explain_bos(found)
    trials = [trial for trial in report.trials if trial.usual and trial.trained > 1]
    for forks, meaning in (
        (True, "turns fork, at each fork a response is copied"),
        (False, "each turn continues the one before, nothing is copied"),
    ):
        if kinds := [trial.kind for trial in trials if trial.forks == forks]:
            yield "layout", f"{meaning}: {', '.join(kinds)}"


def _explain_thinking(found: Findings) -> Iterator[tuple[str, str]]:
    if found.tags is None or found.tags_from is None:
        yield "thinking tags", "none found; name them in the recipe if the model thinks: thinking: {open: …, close: …}"
    else:
        yield "thinking tags", f"{found.tags[0]} … {found.tags[1]}, {_TAGS_FROM[found.tags_from]}"
    fields = " or ".join(found.fields)
    in_content = "inline" in (*found.answers_read, *found.calls_read)
    if fields:
        yield "thinking is read", f"from {fields}{', or inline in the content' if in_content else ''}"
    elif in_content:
        yield "thinking is read", "only inline, as part of the content"
    else:
        yield "thinking is read", "from nowhere"
    yield "in its own turn", _own_thinking(found)
    if found.history != found.history_inline and fields:
        field, inline = _HISTORY[found.history], _HISTORY[found.history_inline]
        yield "in later prompts", f"thinking in a field is {field}; inline it is {inline}"
        return
    inline = "" if found.history == found.history_inline else "inline "
    kept = f"{inline}thinking is {_HISTORY[found.history_inline]}"
    if found.fields == (PARTS,):
        kept += ", but not from a field; thinking: {history: respell} moves it"
    yield "in later prompts", kept


def _own_thinking(found: Findings) -> str:
    assembled = "assembled from the tags"
    if found.answers_read and (found.calls_read or found.calls != "rendered"):
        return "rendered by the template"
    if found.answers_read:
        return f"rendered in an answer; with a tool call, {assembled}"
    if found.calls_read:
        return f"rendered with a tool call; in an answer, {assembled}"
    if found.tags is None:
        return "never rendered, and no tags are known: turns with thinking are refused"
    return f"never rendered by the template: completions are {assembled}"


def _explain_prompt(found: Findings) -> Iterator[tuple[str, str]]:
    yield "generation prompt", f"{json.dumps(found.generation_prompt, ensure_ascii=False)} {_PROMPT[found.prompt_ends]}"
    for switch in found.switches:
        yield "switch", f"template: {{{switch.argument}: {spelled(switch.value)}}} {', '.join(switch.effects)}"


def _explain_end(found: Findings) -> Iterator[tuple[str, str]]:
    yield "an answer ends in", _stop(found.answer_stop)
    if found.call_stop is not None and found.call_stop != found.answer_stop:
        yield "a call ends in", _stop(found.call_stop)
    if found.after_stop.strip():
        yield "after an answer", f"{json.dumps(found.after_stop, ensure_ascii=False)} is written and not trained"
    if found.answer_stop is not None and found.history_end != found.answer_stop.text:
        yield "in later prompts", f"the answer ends in {found.history_end or 'nothing'}"


def _stop(stop: Stop | None) -> str:
    if stop is None:
        return "nothing that is known: turns are refused"
    warning = "" if stop.stops_inference else "; inference must be configured to stop at it (eos_token_id)"
    return f"{stop.text}, {_STOP_FROM[stop.source]}{warning}"


def _explain_text(found: Findings) -> Iterator[tuple[str, str]]:
    if found.whitespace != "kept":
        what = "newlines" if found.whitespace == "newlines trimmed" else "whitespace"
        yield "an answer's text", f"{what} around it is trimmed"
    if found.close_tag_in_response != "rendered" and found.tags is not None:
        yield "an answer's text", f"{found.tags[1]} in it cuts it short: such turns are refused"


def _explain_tools(found: Findings) -> Iterator[tuple[str, str]]:
    parts = {"schemas": found.tools, "calls": found.calls, "results": found.results}
    if found.calls == "rendered":
        parts |= {"parallel calls": found.parallel_calls, "text beside a call": found.text_beside_calls}
        if found.text_beside_calls_with_thinking != found.text_beside_calls:
            parts["text beside a call with thinking"] = found.text_beside_calls_with_thinking
    groups: dict[str, list[str]] = {}
    for part, survival in parts.items():
        groups.setdefault(_SURVIVES[survival], []).append(part)
    yield "tools", "; ".join(f"{', '.join(names)} {how}" for how, names in groups.items())
    if found.calls == "rendered" and found.arguments == "string":
        yield "tool arguments", "the template expects JSON text, so objects are written as JSON"
    elif found.calls == "rendered" and found.string_arguments != "rendered":
        how = "quotes twice" if found.string_arguments == "lost" else "refuses"
        yield "tool arguments", f"JSON text, which the template {how}, is parsed first"


def _explain_bos(found: Findings) -> Iterator[tuple[str, str]]:
    if found.bos == "twice":
        yield "BOS", "the template writes it twice"
    elif found.bos == "template":
        second = "; encoding with special tokens would add a second one, so mtr encodes without"
        yield "BOS", f"the template writes it{second if found.bos_on_encode else ''}"
    elif found.bos_on_encode:
        yield "BOS", "neither the template nor an inference server adds one, so none is trained"


_TAGS_FROM = {
    "recipe": "named in the recipe",
    "rendering": "found around rendered thinking",
    "template": "spelled out in the template",
    "tokenizer": "found among the added tokens",
}
_HISTORY = {
    "always": "kept in every prompt",
    "since the last user message": "kept since the last user message, dropped before it",
    "until answered": "kept in a tool loop until it is answered, then dropped",
    "only the final message": "dropped, also within a tool loop",
    "never": "dropped",
}
_PROMPT = {
    "nothing": "leaves the thinking to the model",
    "opens thinking": "opens the thinking",
    "closes thinking": "closes the thinking: turns that have some are refused",
}
_SURVIVES = {"rendered": "rendered", "lost": "silently LEFT OUT", "refused": "refused by the template"}
_STOP_FROM = {
    "template": "written by the template",
    "next message": "the first token of the message that follows",
    "generation config": "from the generation config; the template writes none",
    "tokenizer": "the tokenizer's eos token; the template writes none",
}
