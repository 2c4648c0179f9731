"""`mmrl perf`: measure combinations, compare measurements, and stop a change that makes one slower or larger."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from mmrl_core.cli.arguments import positive
from mmrl_core.errors import MmrlError, PerfError
from mmrl_core.perf.jobs import DEFAULT_TOKENS, SIZES
from mmrl_core.perf.matrix import Matrix, discover
from mmrl_core.plugins import load_plugins

if TYPE_CHECKING:
    from mmrl_core.perf.gate import Verdict

DEFAULT_OUTPUT = Path("runs/perf/perf.json")
DEFAULT_PAGE = Path("runs/perf/report.html")
DEFAULT_BASELINES = Path("perf/baselines")
DEFAULT_ROUNDS = 3
FIRED, TROUBLE = 1, 2
"""Exit statuses of the gate beside 0."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and those below it."""
    parser = subparsers.add_parser(
        "perf", help="measure combinations, compare measurements, gate changes", description=__doc__
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(below)
    _add_compare(below)
    _add_gate(below)
    _add_report(below)


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
        "--rounds", type=positive, default=DEFAULT_ROUNDS, metavar="N", help="processes of each combination (default 3)"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help=f"JSON (default {DEFAULT_OUTPUT})"
    )
    parser.add_argument("--list", action="store_true", help="list the combinations and measure nothing")
    parser.set_defaults(func=run)


def _add_compare(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = below.add_parser(
        "compare",
        help="two results of mmrl perf run, combination by combination",
        description="Ratios of medians, B to A, with the band within which equal code differs. Results of different "
        "machines are refused.",
    )
    parser.add_argument("first", type=Path, metavar="A.json", help="what is compared with")
    parser.add_argument("second", type=Path, metavar="B.json", help="what is compared")
    parser.add_argument(
        "--across", action="store_true", help="of different machines: peak memory and shares of the step, no seconds"
    )
    parser.set_defaults(func=run_compare)


def _add_gate(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = below.add_parser(
        "gate",
        help="fail when a phase of a combination got slower or larger",
        description="Compare this checkout with baselines of this machine, or, where there are none, with another "
        "commit: two processes, one of each, take turns step by step.",
        epilog="Exit status: 0 silent, 1 fired (the combination and the phase are named), 2 could not be compared.",
    )
    _matrix_arguments(parser)
    parser.add_argument(
        "--base", metavar="COMMIT", help="compare with this commit, in turns, even where there are baselines"
    )
    parser.add_argument(
        "--baselines",
        type=Path,
        default=DEFAULT_BASELINES,
        metavar="FOLDER",
        help=f"results of mmrl perf run (default {DEFAULT_BASELINES})",
    )
    parser.add_argument(
        "--pairs", type=positive, metavar="N", help="in turns: least steps of each process (tiny 24, else 8)"
    )
    parser.set_defaults(func=run_gate)


def _add_report(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = below.add_parser(
        "report",
        help="results as one HTML page",
        description="Write one HTML page that needs no server and loads nothing: the newest result as a table and "
        "charts, the others of the same machine as its history.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results of mmrl perf run")
    parser.add_argument(
        "--peers", nargs="*", type=Path, default=[], metavar="FILE", help="comparisons written by perf/peers"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_PAGE, metavar="FILE", help=f"the page (default {DEFAULT_PAGE})"
    )
    parser.set_defaults(func=run_report)


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


def run_compare(arguments: argparse.Namespace) -> int:
    """0: the comparison is for people, it passes no judgement."""
    from mmrl_core.perf.compare import comparison_table
    from mmrl_core.perf.results import Result

    print(comparison_table(Result.load(arguments.first), Result.load(arguments.second), across=arguments.across))
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """0 when the page was written."""
    from mmrl_core.perf.report import Peer, report_page
    from mmrl_core.perf.results import Result

    page = report_page([Result.load(path) for path in arguments.results], [Peer.load(path) for path in arguments.peers])
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PerfError(f"{arguments.output}: cannot be written: {error.strerror or error}") from error
    print(arguments.output, flush=True)
    return 0


def run_gate(arguments: argparse.Namespace) -> int:
    """0 silent, 1 fired; 2 when nothing could be compared."""
    try:
        verdict = _gate(arguments)
    except PerfError:
        raise
    except MmrlError as error:
        raise PerfError(str(error)) from error
    except Exception:  # noqa: BLE001 - a bug must not look like the status that says `fired`
        traceback.print_exc()
        return TROUBLE
    from mmrl_core.perf.gate import verdict_table

    print(verdict_table(verdict), flush=True)
    if not verdict.findings:
        return TROUBLE
    return FIRED if verdict.fired else 0


def _gate(arguments: argparse.Namespace) -> Verdict:
    from mmrl_core.perf import gate
    from mmrl_core.perf.measure import Effort
    from mmrl_core.perf.side_by_side import Turns
    from mmrl_core.perf.trees import commit_tree, default_base, working_tree

    matrix, head = _matrix(arguments), working_tree()
    if arguments.base is None:
        baselines = gate.load_baselines(arguments.baselines)
        known = {b.fingerprint.get("id") for b in baselines}
        if baselines and gate.this_machine(matrix, head) in known:
            effort = Effort.of(matrix.size, steps=None, rounds=DEFAULT_ROUNDS)
            return gate.gate_baselines(matrix, head, effort, baselines, _say)
        _say(f"no baseline of this machine in {arguments.baselines}; comparing commits in turns")
    turns = Turns.of(matrix.size, arguments.pairs)
    with (
        tempfile.TemporaryDirectory(prefix="mmrl-perf-") as scratch,
        commit_tree(arguments.base or default_base(), Path(scratch)) as base,
    ):
        return gate.gate_side_by_side(matrix, base, head, turns, _say)


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
