"""`mmrl data`: make prompt files and text embeddings. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmrl_core.cli import data_embed
from mmrl_core.cli.arguments import positive

MAX_DEFAULT_WORKERS = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` and its commands; each sets `func`, a callable `(args) -> exit status`."""
    data = subparsers.add_parser(
        "data",
        help="prepare prompts",
        description="Make prompt files and text embeddings for `mmrl train`.",
    )
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
        "--max-prompt-tokens", type=positive, default=2048, metavar="N", help="prompts with more tokens are dropped"
    )
    workers = min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    deepscaler.add_argument("--workers", type=positive, default=workers, metavar="N", help="processes")
    deepscaler.add_argument("--problem-column", default="problem", metavar="NAME", help="column with the question")
    deepscaler.add_argument("--answer-column", default="answer", metavar="NAME", help="column with the answer")
    deepscaler.add_argument("--system", default=None, metavar="TEXT", help="system message instead of the template's")
    deepscaler.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    deepscaler.set_defaults(func=run_deepscaler)
    _add_prompts_parser(commands)
    data_embed.add_parser(commands)


def _add_prompts_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prompts = commands.add_parser(
        "prompts",
        help="a text file with one prompt a line to a Parquet file",
        description="Write a Parquet file with the columns `prompt` and `index` from a text file (UTF-8) with one "
        "prompt a line. Blank lines are left out and counted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    prompts.add_argument("input", metavar="INPUT", help="the text file")
    prompts.add_argument("output", metavar="OUTPUT", type=Path, help="the Parquet file to write")
    prompts.add_argument("--unique", action="store_true", help="keep only the first of equal lines")
    prompts.add_argument(
        "--test-fraction",
        type=_fraction,
        default=None,
        metavar="F",
        help="share of the prompts that go to --test-output instead; where a prompt goes depends on its text alone",
    )
    prompts.add_argument(
        "--test-output", type=Path, default=None, metavar="FILE", help="the Parquet file of prompts kept apart"
    )
    prompts.add_argument("--overwrite", action="store_true", help="replace the outputs if they exist")
    prompts.set_defaults(func=run_prompts)


def run_prompts(args: argparse.Namespace) -> int:
    """`mmrl data prompts`. Raises DataError, with nothing written."""
    from mmrl_core.data.prompt_file import PromptJob, write_prompts
    from mmrl_core.errors import DataError

    if (args.test_fraction is None) != (args.test_output is None):
        raise DataError("--test-fraction and --test-output belong together: give both, or neither")
    job = PromptJob(
        input=args.input,
        output=args.output,
        unique=args.unique,
        test_fraction=args.test_fraction or 0.0,
        test_output=args.test_output,
        overwrite=args.overwrite,
    )
    counts = write_prompts(job)
    _print_counts(
        ("lines read", counts.lines),
        ("blank, left out", counts.blank),
        ("repeated, left out" if job.unique else "repeated, kept (see --unique)", counts.repeated),
        (f"written to {job.output}", counts.written),
        *([(f"written to {job.test_output}", counts.test)] if job.test_output else []),
    )
    recipe = "name: parquet, path: {}, template: raw, answer_column: null"
    print(f"In a recipe: data: {{{recipe.format(job.output)}}}")
    if job.test_output:
        print(f"and in eval: data: {{{recipe.format(job.test_output)}}}")
    return 0


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
    _print_counts(
        ("rows read", summary.rows),
        ("kept", summary.kept),
        (f"dropped, longer than {job.max_prompt_tokens} tokens", summary.too_long),
        ("dropped, without an answer", summary.without_answer),
        ("dropped, without a problem", summary.without_problem),
        ("longest prompt kept, in tokens", summary.longest),
    )
    print(f"wrote {job.output}. In a recipe: data: {{name: parquet, path: {job.output}, template: raw}}")
    return 0


def _print_counts(*rows: tuple[str, int]) -> None:
    for label, count in rows:
        print(f"{label:<36} {count:>10,}")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
