"""Rows of chats to rows of trees, for `datasets.Dataset.map`.

    {"messages": [...]}  ->  Conversation  ->  [Turn]  ->  [View]  ->  [Layout]  ->  {"input_ids": [...], "parent": ...}

Each row becomes one tree, or several where it would exceed `max_tokens`. All of it is done by the functions that
`mtr train` calls, so the trees are the same.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa

from mtr import __version__
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.turn import CHOSEN
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.lines import parse_line
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.tables import without_none
from mtr.errors import RowError, UserError
from mtr.integrations.columns import COLUMNS, as_row
from mtr.integrations.options import recipe_of
from mtr.prepare.builder import Builder, count_views
from mtr.prepare.counts import Counts
from mtr.prepare.views import weigh
from mtr.recipe.sections import Format, Recipe
from mtr.tree.packing import build_layouts

log = logging.getLogger("mtr")

_UNNAMED = "the tokenizer"
"""No folder and no Hub id, so no generation config is looked for."""
TABLE_ORDER = (
    "its tool calls or tools are objects, whose keys are in the order of the table and may not be in that of the file; "
    "datasets.load_dataset('text', data_files=...) and columns of datasets.Json() keep them as they are"
)
"""A table has one order of keys for all rows, and a null for each that a row does not have."""


class TreeBuilder:
    """Makes trees of rows: `dataset.map(builder, batched=True, remove_columns=dataset.column_names)`.

    The options are those of a recipe, without the names of their sections. It can be pickled (`num_proc`), and its
    fingerprint depends on the tokenizer and the options, so `datasets` finds its cache again.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        revision: str | None = None,
        format: Format = "auto",
        messages: str = "messages",
        tools: str = "tools",
        columns: Mapping[str, str | None] | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        template: Mapping[str, Any] | None = None,
        thinking: tuple[str, str] | None = None,
        history: Literal["as_data", "respell"] = "as_data",
        train_on: Literal["all", "last"] = "all",
        date: str | None = None,
        weighting: Literal["token", "turn", "conversation"] = "token",
        max_length: int = 4096,
        max_tokens: int | Literal["auto"] = "auto",
        overlong: Literal["drop", "truncate", "error"] = "drop",
    ) -> None:
        """
        Args:
            tokenizer: a folder, a Hub id, or a transformers tokenizer with a chat template.
            template: arguments for the chat template.
            thinking: the tags around thinking; found with the template if not given.
            max_length: tokens of the longest turn, prompt included.
            max_tokens: of one tree; a larger one is cut into several rows that repeat the shared prefix.
            overlong: what happens to a turn longer than max_length.

        Raises:
            UserError: an option is wrong, or the tokenizer has no chat template.
        """
        named = isinstance(tokenizer, str | os.PathLike)
        name = os.path.expanduser(tokenizer) if named else _name(tokenizer)
        self._recipe = recipe_of(
            "mtr.TreeBuilder",
            model={"name_or_path": name, "revision": revision},
            template=dict(template or {}),
            thinking={"history": history, "open": thinking and thinking[0], "close": thinking and thinking[1]},
            train_on=train_on,
            date=date,
            data={
                "format": format,
                "messages": messages,
                "tools": tools,
                "columns": dict(columns or {}),
                "on_bad_row": on_bad_row,
            },
            sequence={"max_length": max_length, "max_tokens": max_tokens, "overlong": overlong},
            loss={"weighting": weighting},
        )
        self.tokenizer: Any = load_tokenizer(self._recipe) if named else tokenizer
        self._told: set[str] = set()
        renderer = self._builder.renderer
        if date is None and "strftime_now" in renderer.template.text:  # one day for all processes, and in the cache
            self._recipe = self._recipe.model_copy(update={"date": renderer.day.isoformat()})

    def __getstate__(self) -> dict[str, Any]:
        """All that the trees depend on, of which `datasets` makes a fingerprint."""
        return {"mtr": __version__, "recipe": self._recipe.model_dump(mode="json"), "tokenizer": self.tokenizer}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._recipe, self.tokenizer = Recipe.model_validate(state["recipe"]), state["tokenizer"]
        self._told = set()

    @cached_property
    def _builder(self) -> Builder:
        return Builder(self._recipe, load_renderer(self._recipe, self.tokenizer))

    @cached_property
    def _reader(self) -> Reader:
        data = self._recipe.data
        shape = None if data.format == "auto" else data.format
        return Reader(shape, data.messages, data.tools, {str(k): v for k, v in data.columns.items()})

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """
        Args:
            rows: a batch of rows, column by column; or a column `text` alone, each a line of JSON.
            indices: of the rows, for messages: `map(..., with_indices=True)`.

        Returns:
            The columns of `mtr.integrations.columns`, with at least one row for each that came, blank lines aside.

        Raises:
            UserError: a row is bad (see on_bad_row), or this is no batch.
        """
        kept = _kept(rows)
        listed = _rows(rows, self._recipe.data.messages, kept)
        places = [f"row {i} of a batch" if indices is None else f"row {indices[i]}" for i in range(len(listed))]
        as_text = list(rows.keys()) == ["text"] and all(isinstance(text, str | None) for text in rows["text"])
        if as_text:
            listed = [_parsed(row.get("text", ""), where) for row, where in zip(listed, places, strict=True)]
        reader = self._reader if self._reader.shape else self._reader.with_shape_of(listed)
        in_order = as_text or {self._reader.messages, self._reader.tools} & set(rows.keys()) <= kept
        policy = Policy(skip_bad=self._recipe.data.on_bad_row == "skip")
        made: list[dict[str, Any]] = []
        for number, (row, where) in enumerate(zip(listed, places, strict=True)):
            if row is not None:
                made += self._trees(policy.take(reader.read, row, where, number), in_order)
        return {name: [row[name] for row in made] for name in COLUMNS}

    def _trees(self, row: Conversation | SkippedRow, in_order: bool) -> Iterator[dict[str, Any]]:
        """The first tree of a row has what is known of all of it.

        Args:
            in_order: its keys are in the order of the data.
        """
        if isinstance(row, SkippedRow):
            self._tell(row.reason, f"not trained: {row.where}: {row.problem or row.reason}")
            yield as_row(None, Counts(skipped_rows=Counter([row.reason])))
            return
        turns = self._builder.turns(row)
        views = weigh(turns, self._recipe.loss.weighting, row.where)
        layouts = build_layouts(views, "single_pass", self._recipe.sequence.budget)
        counts = count_views(turns, views)
        counts.remarks.update(row.remarks)
        if not in_order and _has_objects(row.row, self._reader):
            counts.remarks[TABLE_ORDER] += 1
            self._tell(TABLE_ORDER, f"{row.where}: {TABLE_ORDER}")
        counts.trees, counts.tokens = len(layouts), sum(layout.num_tokens for layout in layouts)
        for turn in turns:
            if turn.reason is not None and turn.reason not in CHOSEN:
                self._tell(turn.reason, f"not trained: {row.where}, message {turn.message_index}: {turn.reason}")
        for number, layout in enumerate(layouts or [None]):
            yield as_row(layout, Counts() if number else counts)

    def _tell(self, reason: str, text: str) -> None:
        """Each reason once a process, where it is met first."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s (told once; mtr.count_turns counts them)", text)


def _name(tokenizer: Any) -> str:
    if not hasattr(tokenizer, "apply_chat_template") or not hasattr(tokenizer, "added_tokens_decoder"):
        raise UserError(
            f"mtr.TreeBuilder: {type(tokenizer).__name__} is no tokenizer; give a folder, a Hub id or a tokenizer of "
            "transformers"
        )
    return str(tokenizer.name_or_path) or _UNNAMED


def _kept(columns: Mapping[str, Sequence[Any]]) -> set[str]:
    """Columns whose values are as in the data: their table has them as text or `datasets.Json()`, not as objects with
    keys of its own. Of batches that come from no table nothing is known."""
    table = getattr(columns, "pa_table", None)
    return set() if table is None else {column.name for column in table.schema if not _has_keys(column.type)}


def _has_keys(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or any(_has_keys(kind.field(i).type) for i in range(kind.num_fields))


def _rows(columns: Mapping[str, Sequence[Any]], messages: str, kept: set[str]) -> list[Any]:
    """The rows of a batch, without the nulls that `datasets` adds because other rows have these keys.

    Args:
        kept: columns without such nulls.

    Raises:
        UserError: it is a single row.
    """
    names = list(columns.keys())
    values = [columns[name] for name in names]
    listed = columns[messages] if messages in names else values[0] if values else []
    if not isinstance(listed, list | tuple) or (messages in names and listed and isinstance(listed[0], Mapping)):
        raise UserError("mtr.TreeBuilder takes batches: dataset.map(builder, batched=True, ...)")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    return [{name: v if name in kept else without_none(v) for name, v in row.items() if v is not None} for row in rows]


def _parsed(line: str, where: str) -> Any:
    """The row of a line, or the error that it is; None for a blank one."""
    try:
        return parse_line(line.encode(errors="surrogatepass"), where) if line.strip() else None
    except RowError as error:
        return error


def _has_objects(row: Mapping[str, Any], reader: Reader) -> bool:
    """Whether what a template spells out key by key is there as objects."""
    tools, messages = row.get(reader.tools), row.get(reader.messages)
    lists = [m.get("tool_calls") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    calls = [call for listed in lists if isinstance(listed, list) for call in listed]
    arguments = [call.get("function", call).get("arguments") for call in calls]
    return bool(isinstance(tools, list) and tools) or any(isinstance(given, Mapping) and given for given in arguments)
