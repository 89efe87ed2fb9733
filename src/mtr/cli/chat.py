"""`mtr chat`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from mtr.cli.session import errors, quiet_libraries
from mtr.console import console, printable
from mtr.errors import UserError
from mtr.files import write_json

if TYPE_CHECKING:
    from mtr.cli.views.chat import ColumnsView, StackedView
    from mtr.model.completions import Sampling
    from mtr.talk.commands import Command
    from mtr.talk.finding import Found
    from mtr.talk.loading import Speakers
    from mtr.talk.session import Answer, Session

EXAMPLES = """Examples:
  mtr chat runs/chats                      # /help lists the commands
  mtr chat runs/chats --compare            # the base model beside it
  mtr chat runs/chats/checkpoint-200 --fold
  mtr chat Qwen/Qwen3-0.6B --temperature 0.6 --top-p 0.95
  mtr chat runs/chats --prompt "Ana has 3." --prompt "And now?"
  mtr chat runs/chats --json < question.txt
"""
PROMPT = "> "
_INTERRUPTED = 130
"""The exit code of what Ctrl-C ended."""


def chat(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="output_dir of a run, one of its checkpoints, RUN/merged, an adapter, a model, or a Hub id.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Ask this, print the answer and exit; again: a next turn.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base model's answers beside the others.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Thinking as one line with its length.")] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0: no drawing; default: that of the model's generation config.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Draw from the likeliest tokens only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 2048,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the drawing; default: another each time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each turn of --prompt.")] = False,
) -> None:
    """Talk to what was trained, every answer in the context that inference gives it.

    The chat template renders the messages with the run's arguments, so earlier thinking is in the context or not as
    it was in training. Without a terminal, standard input is the question.
    """
    with errors():
        _check_drawing(temperature, top_p, seed)
        from mtr.talk.finding import find_voice
        from mtr.talk.typed import checked_text

        found = find_voice(run)
        questions = _given_questions(prompt)
        checked_text(system or "", "--system")
        if as_json and questions is None:
            raise UserError("--json needs --prompt, or a question on standard input")
        quiet_libraries()
        speakers = _load(found, compare)
        from mtr.talk.session import Limits, Session

        drawn = _sampling(speakers.sampling, temperature, top_p)
        session = Session(
            speakers, Limits(max_new_tokens, drawn, random.randrange(2**31) if seed is None else seed), system
        )
        if questions is not None:
            _play(session, questions, fold, as_json)
        else:
            _converse(session, found, fold)


def _check_drawing(temperature: float | None, top_p: float | None, seed: int | None) -> None:
    """
    Raises:
        UserError: a value is out of its range.
    """
    if temperature is not None and not 0 <= temperature <= 100:
        raise UserError(f"--temperature: {temperature:g} is not between 0 and 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p: {top_p:g} is not above 0 and at most 1")
    if seed is not None and not 0 <= seed < 2**62:
        raise UserError(f"--seed: {seed} is not between 0 and 2**62")


def _given_questions(prompt: list[str] | None) -> list[str] | None:
    """Questions to be asked without a conversation; None where somebody types them.

    Raises:
        UserError: there is none.
    """
    from mtr.talk.typed import checked_text

    if prompt:
        return [checked_text(question, "--prompt") for question in prompt]
    if sys.stdin.isatty():
        return None
    try:
        question = checked_text(sys.stdin.read(), "standard input").strip()
    except UnicodeDecodeError:
        raise UserError("standard input is not text in UTF-8; convert it") from None
    if not question:
        raise UserError("standard input is empty; give a question there or with --prompt, or use a terminal")
    return [question]


def _load(found: Found, compare: bool) -> Speakers:
    from mtr.model.device import pick_device
    from mtr.talk.loading import load_speakers

    err = console()
    with err.status(f"loading {printable(found.name)} ..."):
        return load_speakers(found, pick_device(), compare)


def _sampling(own: Sampling, temperature: float | None, top_p: float | None) -> Sampling:
    """The model's own sampling, changed as asked for; a top-p alone asks for drawing."""
    if temperature is None:
        temperature = 1.0 if top_p is not None and own.is_greedy else own.temperature
    return replace(own, temperature=temperature, top_p=own.top_p if top_p is None else top_p)


def _play(session: Session, questions: list[str], fold: bool, as_json: bool) -> None:
    """Ask one after the other and print the answers. Ctrl-C ends the answer, and no more is asked."""
    view = None if as_json else _view(session, fold, loose=False)
    for question in questions:
        answers = _ask(session, view, question) if view else session.ask(question)
        if view is None:
            voices = {answer.voice: asdict(answer) for answer in answers}
            for voice in voices.values():
                del voice["voice"]
            print(write_json(None, {"question": question, "seed": session.limits.seed, **voices}), flush=True)
        if any(answer.finish == "interrupted" for answer in answers):
            raise typer.Exit(_INTERRUPTED)
        for answer in answers:
            if not answer.is_kept:
                is_cut = answer.completion_tokens >= session.limits.max_new_tokens
                mend = "raise --max-new-tokens" if is_cut else "the context is full; ask for less"
                raise UserError(f"no answer after {answer.completion_tokens:,} tokens, only thinking: {mend}")


def _view(session: Session, fold: bool, loose: bool) -> StackedView | ColumnsView:
    from mtr.cli.views.chat import WIDE, ColumnsView, StackedView, standard_output, width_of

    out, several = standard_output(), len(session.talks) > 1
    if several and width_of(out) >= WIDE:
        return ColumnsView(out, fold)
    return StackedView(out, fold, named=several, loose=loose)


def _converse(session: Session, found: Found, fold: bool) -> None:
    """Until /quit or the end of the input."""
    from mtr.cli.views.chat import introduction
    from mtr.talk.typed import edit_lines, more_waits, read_message, type_line

    err, view = console(), _view(session, fold, loose=True)
    _say(introduction(session, found))
    waits: Callable[[], bool] = more_waits if edit_lines() is None else lambda: False
    while True:
        try:
            line = read_message(type_line, PROMPT, waits)
        except KeyboardInterrupt:
            err.print()
            _say(["(Ctrl-D or /quit leaves)"])
            continue
        except UserError as error:
            _say([str(error)])
            continue
        if line is None:
            err.print()
            return
        try:
            if line.strip() and not _react(session, view, line):
                return
        except UserError as error:
            _say([str(error)])
        except KeyboardInterrupt:  # a second one, while the first was being heeded
            _say(["(stopped)"])


def _react(session: Session, view: StackedView | ColumnsView, line: str) -> bool:
    """To a line that was typed; false if it asks to leave.

    Raises:
        UserError: it cannot be done.
    """
    from mtr.talk.commands import carry_out, help_lines, parse_command

    command: Command | None = parse_command(line)
    if command is None:
        _ask(session, view, line.lstrip() if line.lstrip().startswith("/") else line)
    elif command.name == "quit":
        return False
    elif command.name == "help":
        _say(help_lines())
    elif command.name == "think":
        view.fold = not view.fold
        _say(["thinking is folded" if view.fold else "thinking is shown"])
        if not view.fold:
            view.show_thinking(session.answers)
    elif command.name == "retry":
        question = session.take_again()
        if question is None:
            _say(["there is no question to ask again"])
        else:
            _ask(session, view, question)
    else:
        _say(carry_out(session, command))
    return True


def _ask(session: Session, view: StackedView | ColumnsView, question: str) -> list[Answer]:
    """What arrives is shown, and shown to its end whatever happens.

    Raises:
        UserError: it cannot be answered.
    """
    has_begun = False

    def watch(answer: Answer) -> None:
        nonlocal has_begun
        has_begun = True
        view.watch(answer)

    try:
        return session.ask(question, watch)
    finally:
        if has_begun:
            view.end()


def _say(lines: list[str]) -> None:
    """Beside the conversation."""
    from mtr.cli.views.chat import show_aside

    show_aside(lines, console())
