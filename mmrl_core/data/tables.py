"""Prompts from files: JSONL (or a JSON array) and Parquet, verl's layout included."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.data.options import TableOptions
from mmrl_core.data.order import EpochOrder
from mmrl_core.data.placeholders import fill, placeholder_names
from mmrl_core.data.table_files import MissingColumn, Parquet, Row, Table, column_value, matching_files, open_json
from mmrl_core.data.templates import Template, load_template
from mmrl_core.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

Messages = tuple[Mapping[str, str], ...]


class TableSource(PromptSource):
    """Rows of files as prompts. Every row is checked in `prepare`, so that a bad one stops a run before its first step
    and not in its tenth hour."""

    options: TableOptions

    def __init__(self, options: TableOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._tables: list[Table] = []
        self._starts: list[int] = []
        self._template: Template | None = None
        self._order: EpochOrder | None = None

    @abstractmethod
    def _open(self, path: str) -> Table:
        """One file. Raises DataError."""

    def prepare(self) -> None:
        """Open the files and check every row that will be used.

        Raises DataError naming the file, the row, the column and the columns that exist.
        """
        options = self.options
        if options.template not in ("chat", "raw"):
            self._template = load_template(options.template)
        self._tables = [self._open(path) for path in matching_files(options.paths())]
        for table in self._tables:
            if not len(table):
                raise DataError(f"{table.path}: the file holds no rows")
        ends = list(itertools.accumulate(len(table) for table in self._tables))
        self._starts = [0, *ends[:-1]]
        stop = ends[-1] if options.limit is None else min(ends[-1], options.skip + options.limit)
        if options.skip >= stop:
            raise DataError(f"{', '.join(options.paths())}: skip {options.skip} leaves nothing of {ends[-1]} rows")
        try:
            for table, start in zip(self._tables, self._starts, strict=True):
                self._check(table, max(options.skip - start, 0), min(stop - start, len(table)))
        except MissingColumn as error:
            if error.column != options.answer_column:
                raise
            raise DataError(f"{error}. Set answer_column to one of them, or to null for data without answers") from None
        self._order = EpochOrder(stop - options.skip, self.seed, shuffle=options.shuffle)
        self._prompt(options.skip, 0)  # renders once: a template that cannot be rendered fails here

    def __len__(self) -> int:
        return self._order.length if self._order is not None else 0

    def prompt(self, index: int) -> Prompt:
        """The `index`-th prompt of the run. Raises DataError when the template refuses the row's conversation."""
        assert self._order is not None, "prepare() comes first"
        return self._prompt(self.options.skip + self._order.row(index), index)

    def digest(self) -> str:
        """Of the files' contents in order (not of where they are), the template's text, the options and the seed."""
        assert self._order is not None, "prepare() comes first"
        described = [
            [table.sha256 for table in self._tables],
            self.options.model_dump(mode="json", exclude={"path", "template"}),
            self._template.source if self._template else self.options.template,
            self.seed,
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def checked_columns(self) -> list[str]:
        """The dotted columns that must exist in every row."""
        options = self.options
        names = [options.prompt_column, *(options.columns or [])]
        names += [name for name in placeholder_names(options.user_template or "") if name != "prompt"]
        if options.answer_column is not None:
            names.append(options.answer_column)
        return list(dict.fromkeys(names))

    def _check(self, table: Table, start: int, stop: int) -> None:
        """Read every row start..stop of one file as `prompt` would, templates aside."""
        for number, row in enumerate(table.rows(start, stop, self.checked_columns()), start=start):
            where = table.where(number)
            self._conversation(row, where)
            self._answer(row, where)
            self._columns(row, where)

    def _prompt(self, number: int, index: int) -> Prompt:
        """Row `number` of all files as the `index`-th prompt."""
        table_number = bisect.bisect_right(self._starts, number) - 1
        table, number = self._tables[table_number], number - self._starts[table_number]
        row, where = table.row(number), table.where(number)
        conversation = self._conversation(row, where)
        text = None if isinstance(conversation, tuple) else conversation
        messages = conversation if isinstance(conversation, tuple) else None
        if self._template is not None and messages is not None:
            try:
                text, messages = self._template.render(messages), None
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return Prompt(
            index=index,
            messages=messages,
            text=text,
            answer=self._answer(row, where),
            columns=self._columns(row, where),
            origin=where,
        )

    def _conversation(self, row: Row, where: str) -> Messages | str:
        """The row's chat messages, or, with the template `raw`, its text."""
        options = self.options
        value = column_value(row, options.prompt_column, where)
        place = f"{where}: column {options.prompt_column!r}"
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"{place}: the prompt is empty")
            text = self._user_text(row, value, where)
            if options.template == "raw":
                return text
            messages: Messages = ({"role": "user", "content": text},)
        elif options.template == "raw":
            raise DataError(f"{place}: template raw needs a string, not {type(value).__name__}")
        elif isinstance(value, list):
            messages = self._chat(row, value, where, place)
        else:
            raise DataError(f"{place}: a prompt is a string or a list of messages, not {_kind(value)}")
        if options.system is not None:
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            messages = ({"role": "system", "content": options.system}, *rest)
        return messages

    def _chat(self, row: Row, value: list[Any], where: str, place: str) -> Messages:
        """A list of messages, checked; `user_template` rewrites the last user message."""
        messages: list[dict[str, str]] = []
        for number, message in enumerate(value):
            at = f"{place}: message {number}"
            if not isinstance(message, dict):
                raise DataError(f"{at} is {_kind(message)}, not an object with role and content")
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise DataError(f"{at}: {key} must be a string, not {_kind(message.get(key))}")
            if message["role"] not in ROLES:
                raise DataError(f"{at}: role {message['role']!r} is not one of {', '.join(ROLES)}")
            extra = {k: v for k, v in message.items() if v is not None}  # Parquet fills absent fields with null
            wrong = next((k for k, v in extra.items() if not isinstance(v, str)), None)
            if wrong is not None:
                raise DataError(f"{at}: {wrong} must be a string, not {_kind(extra[wrong])}")
            messages.append(extra)
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            last = f"ends with role {messages[-1]['role']!r}" if messages else "is empty"
            raise DataError(f"{place}: the conversation {last}; it must end with what the model answers")
        asked = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if asked is None or not asked["content"].strip():
            raise DataError(f"{place}: the conversation has no user message, or an empty one")
        asked["content"] = self._user_text(row, asked["content"], where)
        return tuple(messages)

    def _user_text(self, row: Row, prompt: str, where: str) -> str:
        template = self.options.user_template
        if template is None:
            return prompt

        def value_of(name: str) -> Any:
            value = prompt if name == "prompt" else column_value(row, name, where)
            if not isinstance(value, str | int | float):
                raise DataError(f"{where}: column {name!r} in user_template is {_kind(value)}, not text or a number")
            return value

        return fill(template, value_of)

    def _answer(self, row: Row, where: str) -> Any:
        name = self.options.answer_column
        if name is None:
            return None
        value = column_value(row, name, where)
        if value is None:
            raise DataError(f"{where}: column {name!r} is null: a reward would have nothing to compare with")
        return value

    def _columns(self, row: Row, where: str) -> dict[str, Any]:
        wanted = self.options.columns
        if wanted is None:
            return {name: value for name, value in row.items() if name != self.options.prompt_column}
        return {name: column_value(row, name, where) for name in wanted}


class JsonlSource(TableSource):
    """JSONL files, read a line at a time, and JSON arrays, held in memory."""

    def _open(self, path: str) -> Table:
        return open_json(path)


class ParquetSource(TableSource):
    """Parquet files, verl's layout included (`prompt` a list of messages, `reward_model.ground_truth`)."""

    def _open(self, path: str) -> Table:
        return Parquet(path, None if self.options.columns is None else self.checked_columns())


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
