"""The commands within a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from mtr.console import labelled, shorten
from mtr.errors import UserError
from mtr.files import write_json
from mtr.talk.session import Answer, Session

COMMANDS = {
    "help": ("", "show this list"),
    "think": ("", "show the thinking, or fold it to one line"),
    "retry": ("", "ask the last question again"),
    "undo": ("", "take back the last question and its answer"),
    "reset": ("", "begin anew; the system prompt stays"),
    "system": ("TEXT", "set the system prompt for what follows; 'off' removes it"),
    "tokens": ("", "what the model saw: tokens of prompt and answer, context left"),
    "save": ("FILE", "write the conversation as a row that mtr trains on (.jsonl)"),
    "quit": ("", "leave, as Ctrl-D does"),
}
"""Of each command: its argument, and what it does."""
KEYS = (
    ("Ctrl-C", "stop the answer"),
    ("... \\", "a line that ends in a backslash goes on in the next one"),
    ("(space)/...", "with a space before it, a slash begins a message"),
)


@dataclass(frozen=True)
class Command:
    name: str
    argument: str = ""


def parse_command(line: str) -> Command | None:
    """None if the line is a message.

    Raises:
        UserError: there is no such command; names the nearest.
    """
    if not line.startswith("/"):
        return None
    name, _, argument = line[1:].strip().partition(" ")
    if name in COMMANDS:
        return Command(name, argument.strip())
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them"
    raise UserError(f"/{shorten(name, 40)} is no command; {hint}")


def help_lines() -> list[str]:
    commands = [(f"/{name} {argument}".rstrip(), what) for name, (argument, what) in COMMANDS.items()]
    return [f"{key:<14}{what}" for key, what in (*commands, *KEYS)]


def carry_out(session: Session, command: Command) -> list[str]:
    """Do what a command asks of the session; the lines to be shown.

    Raises:
        UserError: it cannot be done; nothing has changed.
    """
    if command.name == "undo":
        question = session.undo()
        return ["there is nothing to take back" if question is None else f"taken back: {shorten(question, 60)}"]
    if command.name == "reset":
        session.reset()
        return ["a new conversation" + (", with the same system prompt" if session.system else "")]
    if command.name == "system":
        return [_system(session, command.argument)]
    if command.name == "tokens":
        return _tokens(session)
    if command.name == "save":
        return [_save(session, command.argument)]
    raise AssertionError(command.name)


def _system(session: Session, text: str) -> str:
    if text:
        session.system = None if text == "off" else text
        return f"system prompt {'removed' if text == 'off' else 'set'}; it counts from the next question on"
    return f"system prompt: {session.system}" if session.system else "there is no system prompt"


def _tokens(session: Session) -> list[str]:
    several = len(session.answers) > 1
    lines = [line for answer in session.answers for line in [*([answer.voice] if several else []), *_of_answer(answer)]]
    context, limit = session.context(), session.speakers.positions
    left = f"; {max(limit - context, 0):,} of {limit:,} left" if limit is not None else ""
    return [*lines, labelled("next prompt", f"{context:,} tokens before your message{left}")]


def _of_answer(answer: Answer) -> list[str]:
    thinking = f", {answer.thinking_tokens:,} of them thinking" if answer.thinking else ""
    speed = f" ({answer.completion_tokens / answer.seconds:,.0f} tokens/s)" if answer.seconds else ""
    return [
        labelled("prompt", f"{answer.prompt_tokens:,} tokens, as the template renders the messages"),
        labelled("answer", f"{answer.completion_tokens:,} tokens{thinking}, in {answer.seconds:.1f} s{speed}"),
    ]


def _save(session: Session, name: str) -> str:
    """Into a new file."""
    if not name:
        raise UserError("/save needs the name of a file")
    if not session.questions:
        raise UserError("/save: nothing has been said yet")
    file, turns = Path(os.path.expanduser(name)), len(session.questions)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(write_json(None, session.row()) + "\n")
    except FileExistsError:
        raise UserError(f"/save: {name} exists, and is not replaced; give another name") from None
    except (OSError, ValueError) as error:
        raise UserError(f"/save: {name} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return f"saved: {file}, a row with {turns} turn{'' if turns == 1 else 's'}"
