"""`mmrl data embed`. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

from mmrl_core.cli.arguments import positive

SHOWN = 5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command below `mmrl data`."""
    embed = commands.add_parser(
        "embed",
        help="prompts through a model's text encoders, once",
        description="Run an image or video model's text encoders over prompts and store the embeddings, so that "
        "training loads no text encoder. A command that was killed goes on where it was when it is started again. With "
        "--shard, or under torchrun, several processes share the work.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    embed.add_argument("prompts", metavar="PROMPTS", help=".txt with one prompt a line, or .parquet, .jsonl, .json")
    embed.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write, or to go on with")
    embed.add_argument("--model", required=True, metavar="PATH", help="diffusers folder or hub id")
    embed.add_argument(
        "--family",
        choices=["auto", "flux", "sd3", "wan", "dit"],
        default="auto",
        help="model family; auto: as the model's folder says",
    )
    embed.add_argument("--column", default="prompt", metavar="NAME", help="column with the prompt")
    embed.add_argument(
        "--device", default="auto", metavar="NAME", help="as in a recipe; auto: the first accelerator, else cpu"
    )
    embed.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts encoded at once")
    embed.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="precision of the encoders and of what is stored",
    )
    embed.add_argument(
        "--max-text-tokens",
        type=positive,
        default=None,
        metavar="N",
        help="longer prompts are cut; the family's own limit when not given, as model.policy.max_text_tokens",
    )
    embed.add_argument("--shard-size", type=positive, default=256, metavar="N", help="prompts a file")
    embed.add_argument(
        "--shard",
        type=_part,
        default=None,
        metavar="I/N",
        help="do every N-th file only, starting with number I (0 <= I < N); start N such processes. Under torchrun "
        "each process takes its own share without being told",
    )
    embed.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="embedded as well, for classifier-free guidance"
    )
    embed.add_argument("--overwrite", action="store_true", help="replace other embeddings in OUTPUT")
    embed.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write the shards that are missing. Raises DataError, ModelError, DeviceError or PluginError."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmrl_core.errors import DataError
    from mmrl_core.launch.embed_prompts import EmbedJob, default_part, embed_prompts
    from mmrl_core.packaged_models import local_path

    part = args.shard or default_part()
    if args.overwrite and part[1] > 1:
        raise DataError("--overwrite with several processes: each would remove the others' files. Remove OUTPUT first")
    rank = os.environ.get("LOCAL_RANK", "")
    job = EmbedJob(
        prompts=args.prompts,
        output=args.output,
        model=local_path(args.model),
        family=args.family,
        column=args.column,
        device=args.device,
        local_rank=int(rank) if rank.isdigit() else 0,
        batch_size=args.batch_size,
        dtype=args.dtype,
        max_text_tokens=args.max_text_tokens,
        shard_size=args.shard_size,
        part=part,
        negative_prompt=args.negative_prompt,
        overwrite=args.overwrite,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), disable=job.local_rank > 0) as bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="embedding", completed=done, total=total)

        summary = embed_prompts(job, show)
    seconds = time.monotonic() - started
    share = "" if part == (0, 1) else f" (share {part[0]} of {part[1]})"
    print(
        f"{job.output}: {summary.embedded:,} prompts embedded in {seconds:.1f} s, {summary.found:,} there "
        f"before{share}; {summary.prompts:,} in all, {summary.shards} files, {summary.family}, {job.dtype}, "
        f"on {summary.device}"
    )
    if summary.cut:
        limit = "the family's limit" if job.max_text_tokens is None else f"{job.max_text_tokens} tokens"
        print(f"{summary.cut:,} prompts were cut to {limit} (--max-text-tokens); the first is {summary.first_cut}")
    if summary.missing:
        some = ", ".join(summary.missing[:SHOWN]) + (" ..." if len(summary.missing) > SHOWN else "")
        print(f"{len(summary.missing)} files are left to the other processes: {some}")
    else:
        print(f"complete. In a recipe: data: {{name: embedded_captions, path: {job.output}}}")
    return 0


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if part[0] >= part[1]:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 0 <= I < N")
    return part
