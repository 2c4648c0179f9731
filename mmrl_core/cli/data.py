"""`mmrl data`: make prompt files. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

MAX_DEFAULT_WORKERS = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` and its commands; each sets `func`, a callable `(args) -> exit status`."""
    data = subparsers.add_parser("data", help="make prompt files", description="Make prompt files for `mmrl train`.")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    deepscaler = commands.add_parser(
        "deepscaler",
        help="DeepScaleR (or any file of problems and answers) to a Parquet file of prompts",
        description="Render every problem with a chat template, drop the prompts that are too long and the rows "
        "without an answer, and write a Parquet file for the prompt source `parquet` with template: raw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    deepscaler.add_argument("input", metavar="INPUT", help="deepscaler.json; a JSONL or Parquet file works as well")
    deepscaler.add_argument("output", metavar="OUTPUT", type=Path, help="the Parquet file to write")
    deepscaler.add_argument("--tokenizer", required=True, metavar="PATH", help="model folder or hub id")
    deepscaler.add_argument(
        "--template",
        default="qwen_r1",
        help="a built-in template, `chat` (the tokenizer's own), or a path to a .jinja file",
    )
    deepscaler.add_argument(
        "--max-prompt-tokens", type=_positive, default=2048, metavar="N", help="prompts with more tokens are dropped"
    )
    workers = min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    deepscaler.add_argument("--workers", type=_positive, default=workers, metavar="N", help="processes")
    deepscaler.add_argument("--problem-column", default="problem", metavar="NAME", help="column with the question")
    deepscaler.add_argument("--answer-column", default="answer", metavar="NAME", help="column with the answer")
    deepscaler.add_argument("--system", default=None, metavar="TEXT", help="system message instead of the template's")
    deepscaler.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    deepscaler.set_defaults(func=run_deepscaler)


def run_deepscaler(args: argparse.Namespace) -> int:
    """`mmrl data deepscaler`. Raises DataError or ModelError, with nothing written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmrl_core.data.preprocess import Job, preprocess

    job = Job(
        input=args.input,
        output=args.output,
        tokenizer=args.tokenizer,
        template=args.template,
        max_prompt_tokens=args.max_prompt_tokens,
        workers=args.workers,
        problem_column=args.problem_column,
        answer_column=args.answer_column,
        system=args.system,
        overwrite=args.overwrite,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[dropped]} dropped"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=None, dropped=0)

        def show(done: int, total: int, dropped: int) -> None:
            bar.update(task, description="rendering", completed=done, total=total, dropped=dropped)

        summary = preprocess(job, show)
    for label, count in (
        ("rows read", summary.rows),
        ("kept", summary.kept),
        (f"dropped, longer than {job.max_prompt_tokens} tokens", summary.too_long),
        ("dropped, without an answer", summary.without_answer),
        ("dropped, without a problem", summary.without_problem),
        ("longest prompt kept, in tokens", summary.longest),
    ):
        print(f"{label:<36} {count:>10,}")
    print(f"wrote {job.output}. In a recipe: data: {{name: parquet, path: {job.output}, template: raw}}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
