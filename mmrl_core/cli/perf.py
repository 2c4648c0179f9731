"""`mmrl perf`: measure combinations, compare measurements, and stop a change that makes one slower or larger."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmrl_core.cli.arguments import positive
from mmrl_core.perf.jobs import DEFAULT_TOKENS, SIZES
from mmrl_core.perf.matrix import Matrix, discover
from mmrl_core.plugins import load_plugins

DEFAULT_OUTPUT = Path("runs/perf/perf.json")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and those below it."""
    parser = subparsers.add_parser(
        "perf", help="measure combinations, compare measurements, gate changes", description=__doc__
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(below)


def _add_run(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = below.add_parser(
        "run",
        help="measure every combination that runs here",
        description="Measure every installed training backend with every rollout engine that goes with it, on text and "
        "on images: time by phase, throughput, peak memory. What cannot run is listed with its reason.",
    )
    _matrix_arguments(parser)
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="steps of a process that count (tiny 20, smollm2 5)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="processes of each combination (default 3)"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help=f"JSON (default {DEFAULT_OUTPUT})"
    )
    parser.add_argument("--list", action="store_true", help="list the combinations and measure nothing")
    parser.set_defaults(func=run)


def _matrix_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every recipe: launcher.processes=2")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="of the models (default tiny)")
    parser.add_argument(
        "--tokens", type=positive, default=DEFAULT_TOKENS, metavar="N", help="new tokens of a text sample (default 16)"
    )
    parser.add_argument(
        "--device", default="auto", metavar="WORD", help="a device; by default an accelerator, else cpu"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="combinations whose name fits, such as 'cpu+fsdp2+*'; may be given several times",
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when something was measured (or listed)."""
    from mmrl_core.perf.measure import Effort, measure
    from mmrl_core.perf.tables import result_table
    from mmrl_core.perf.trees import working_tree

    matrix = _matrix(arguments)
    if arguments.list:
        for combination in matrix.combinations:
            print(combination.name)
        for entry in matrix.unavailable:
            print(f"{entry.name}: {entry.reason}")
        return 0
    effort = Effort.of(matrix.size, steps=arguments.steps, rounds=arguments.rounds)
    result = measure(matrix, working_tree(), effort, _say)
    result.save(arguments.output)
    print(result_table(result))
    print(f"{arguments.output}: every step's numbers", flush=True)
    return 0 if result.measured else 2


def _matrix(arguments: argparse.Namespace) -> Matrix:
    return discover(
        load_plugins(),
        device=arguments.device,
        size=arguments.size,
        tokens=arguments.tokens,
        overrides=arguments.overrides,
        only=arguments.only,
    )


def _say(line: str) -> None:
    print(f"mmrl: {line}", file=sys.stderr, flush=True)
