"""Rows of problems and answers -> a Parquet file of prompts that fit, made by several processes.

The output does not depend on the number of processes, and appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.data.parquet_output import ParquetOutput
from mmrl_core.data.table_files import MissingColumn, Parquet, Table, matching_files, open_json
from mmrl_core.data.templates import load_template
from mmrl_core.errors import DataError, ModelError

BATCH_ROWS = 256

Progress = Callable[[int, int, int], None]
"""Called with (rows done, rows in all, rows dropped so far)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to make of what."""

    input: str
    """A JSON array, a JSONL or a Parquet file."""
    output: Path
    """The Parquet file to write."""
    tokenizer: str
    """A local folder or hub id; counts the tokens."""
    template: str
    """`chat` (the tokenizer's own), a built-in name, or a path to a .jinja file."""
    max_prompt_tokens: int
    """Longer prompts are dropped."""
    workers: int = 1
    """Processes."""
    problem_column: str = "problem"
    """Column with the question."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    system: str | None = None
    """System message, or None: the template's default."""
    overwrite: bool = False
    """Replace an existing output."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of the rows; `rows` is the sum of the other counts."""

    rows: int
    kept: int
    too_long: int
    without_answer: int
    without_problem: int
    longest: int
    """Tokens of the longest prompt kept."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    source_row: int
    problem: str
    answer: str


def preprocess(job: Job, progress: Progress = lambda done, total, dropped: None) -> Summary:
    """Render, count, filter and write.

    Columns of the output: `prompt` (the text the model sees), `answer`, `prompt_tokens`, `source_row` (from 0).

    Raises DataError (bad input, output exists, nothing left, cannot write) and ModelError (tokenizer). Whatever is
    raised, nothing is left behind and an existing output is untouched.
    """
    assert job.max_prompt_tokens >= 1
    assert job.workers >= 1
    if job.output.exists() and not job.overwrite:  # before anything slow
        raise DataError(f"{job.output}: exists already. Remove it, choose another name, or add --overwrite")
    if job.template != "chat":
        load_template(job.template)
    [path] = matching_files([job.input])
    table = _open(path)
    if not len(table):
        raise DataError(f"{path}: the file holds no rows")
    renderer = Renderer(job.tokenizer, job.template, job.system)  # here first: its errors name the cause plainly
    items, without_problem, without_answer = _usable(table, job)
    batches = [items[start : start + BATCH_ROWS] for start in range(0, len(items), BATCH_ROWS)]
    done = without_problem + without_answer
    kept = too_long = longest = 0
    written = ParquetOutput(job.output, _schema(job, table.sha256), overwrite=job.overwrite)
    with written as output, closing(_rendered(batches, job, renderer)) as results:
        progress(done, len(table), done)
        for batch, counted in zip(batches, results, strict=True):
            fitting = [
                (text, item.answer, tokens, item.source_row)
                for item, (text, tokens) in zip(batch, counted, strict=True)
                if tokens <= job.max_prompt_tokens
            ]
            output.write(fitting)
            kept += len(fitting)
            too_long += len(batch) - len(fitting)
            longest = max([longest, *(row[2] for row in fitting)])
            done += len(batch)
            progress(done, len(table), without_problem + without_answer + too_long)
        if not kept:
            raise DataError(
                f"{path}: nothing is left of {len(table)} rows ({too_long} longer than {job.max_prompt_tokens} tokens, "
                f"{without_answer} without an answer, {without_problem} without a problem); nothing was written"
            )
        output.publish()
    return Summary(
        rows=len(table),
        kept=kept,
        too_long=too_long,
        without_answer=without_answer,
        without_problem=without_problem,
        longest=longest,
    )


class Renderer:
    """Turns a problem into (prompt text, number of tokens)."""

    def __init__(self, tokenizer: str, template: str, system: str | None) -> None:
        """Raises ModelError when the tokenizer cannot be loaded, DataError for the template."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:  # transformers raises many types; the message carries the cause
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"tokenizer {tokenizer!r} cannot be loaded: {cause}") from error
        self._template = None if template == "chat" else load_template(template)
        self._system = system
        if template == "chat" and not self._tokenizer.chat_template:
            raise ModelError(f"tokenizer {tokenizer!r} has no chat template; choose one with --template")

    def render(self, problem: str) -> tuple[str, int]:
        """Special tokens that the text already begins with are not added a second time."""
        messages = [{"role": "user", "content": problem}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        if self._template is not None:
            text = self._template.render(messages)
        else:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begin = self._tokenizer.bos_token
        add = not (begin and text.startswith(begin))
        return text, len(self._tokenizer(text, add_special_tokens=add).input_ids)


def _open(path: str) -> Table:
    return Parquet(path) if path.endswith(".parquet") else open_json(path)


def _usable(table: Table, job: Job) -> tuple[list[_Item], int, int]:
    """The rows with a problem and an answer, and how many lack the one or the other."""
    items: list[_Item] = []
    without_problem = without_answer = 0
    columns: dict[str, None] = {}
    for number, row in enumerate(table.rows(0, len(table))):
        columns.update(dict.fromkeys(row))
        problem, answer = row.get(job.problem_column), row.get(job.answer_column)
        if not isinstance(problem, str | None):
            raise DataError(
                f"{table.where(number)}: column {job.problem_column!r} must be a string, not {type(problem).__name__}"
            )
        if not isinstance(answer, str | int | float | None):
            raise DataError(
                f"{table.where(number)}: column {job.answer_column!r} must be a string or a number, not "
                f"{type(answer).__name__}"
            )
        if problem is None or not problem.strip():
            without_problem += 1
        elif answer is None or not str(answer).strip():
            without_answer += 1
        else:
            items.append(_Item(source_row=number, problem=problem, answer=str(answer)))
    for name in (job.problem_column, job.answer_column):
        if name not in columns:
            raise MissingColumn(f"{table.path} (every row)", name, list(columns))
    return items, without_problem, without_answer


# ----------------------------------------------------------------------------------------------------------- processes


def _rendered(batches: list[list[_Item]], job: Job, renderer: Renderer) -> Generator[list[tuple[str, int]], None, None]:
    """Each batch's (text, tokens), in order, by `job.workers` processes."""
    workers = min(job.workers, len(batches))
    if workers <= 1:
        for batch in batches:
            yield [renderer.render(item.problem) for item in batch]
        return
    executor = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job.tokenizer, job.template, job.system),
    )
    # A few batches ahead only, so that memory does not grow with the file.
    waiting: deque[Future[list[tuple[str, int]]]] = deque()
    try:
        for batch in batches:
            waiting.append(executor.submit(_render_batch, [item.problem for item in batch]))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        _unblock(executor)
        raise DataError(
            "a preprocessing worker died (killed for lack of memory?); nothing was written. Try fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _unblock(executor: ProcessPoolExecutor) -> None:
    """CPython before 3.11.7 waits for ever for its thread that writes to workers (python/cpython#94777)."""
    if sys.version_info < (3, 11, 7):
        executor._call_queue._reader.close()  # type: ignore[attr-defined]


_renderer: Renderer | None = None
"""A worker process's own."""


def _start_worker(tokenizer: str, template: str, system: str | None) -> None:
    global _renderer
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _renderer = Renderer(tokenizer, template, system)


def _die_with_parent() -> None:
    """A pool's workers wait for ever when their parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render_batch(problems: list[str]) -> list[tuple[str, int]]:
    assert _renderer is not None
    return [_renderer.render(problem) for problem in problems]


# -------------------------------------------------------------------------------------------------------------- output


def _schema(job: Job, input_sha256: str) -> Any:
    import pyarrow

    made = {
        "input_sha256": input_sha256,
        "template": job.template,
        "system": job.system,
        "max_prompt_tokens": job.max_prompt_tokens,
    }
    return pyarrow.schema(
        [
            ("prompt", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("prompt_tokens", pyarrow.int32()),
            ("source_row", pyarrow.int64()),
        ],
        metadata={"mmrl": json.dumps(made)},
    )
