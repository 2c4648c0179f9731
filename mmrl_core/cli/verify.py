"""`mmrl verify RECIPE`: one batch through two combinations, and a table of where they agree and where they do not."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mmrl_core.cli.arguments import positive
from mmrl_core.errors import MmrlError, VerifyError
from mmrl_core.launch.parent import PARENT_VARIABLE, die_with_parent
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.resolved import complete, require_available
from mmrl_core.verify.job import BATCH, Job

DIFFERENT, TROUBLE = 1, 2
"""Exit statuses beside 0: the combinations differ; they could not be compared."""

WORKER = "mmrl_core.verify.worker"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="show that two combinations compute the same, or where they first differ",
        description="Send one batch through two combinations of device, backend, topology, rollout engine, precision "
        "or options, and compare log-probs, entropy, loss, gradients and updated weights.",
        epilog="Exit status: 0 equal, 1 different, 2 could not be compared. Combinations on different machines: "
        "--record on each (the second with --rollouts), then --compare.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file: the first combination")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example launcher.processes=2")
    parser.add_argument(
        "--against", nargs="*", metavar="key=value", help="overrides on top of these: the second combination"
    )
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="record one combination into FOLDER, to compare")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FOLDER", help="compare two records")
    parser.add_argument(
        "--rollouts", type=Path, metavar="FOLDER", help="take the batch of this record instead of generating one"
    )
    parser.add_argument(
        "--prompts", type=positive, metavar="N", help="prompts in the batch; by default algorithm.prompts_per_step"
    )
    parser.add_argument(
        "--updates", type=positive, default=1, metavar="N", help="steps of two updates each on the batch (default 1)"
    )
    parser.add_argument(
        "--synthetic-advantages", action="store_true", help="fixed advantages instead of those of the recipe's rewards"
    )
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another tolerance, such as log_probs=1e-5; or a dtype, whose tolerances are taken",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole comparison as JSON")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where both records go; by default verify in the run folder"
    )
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """0 equal (or recorded), 1 different, 2 not compared."""
    try:
        return _run(arguments)
    except VerifyError:
        raise
    except MmrlError as error:
        raise VerifyError(str(error)) from error
    except Exception:  # noqa: BLE001 - a bug must not look like the status that says `different`
        traceback.print_exc()
        return TROUBLE


def _run(arguments: argparse.Namespace) -> int:
    modes = [name for name in ("against", "record", "compare") if getattr(arguments, name) is not None]
    if len(modes) != 1:
        raise VerifyError("give one of --against, --record and --compare; see mmrl verify --help")
    if modes == ["compare"]:
        if arguments.recipe is not None:
            raise VerifyError(f"--compare takes two folders and no recipe ({arguments.recipe})")
        return _compare(arguments.compare, arguments)
    if arguments.recipe is None:
        raise VerifyError(f"--{modes[0]} needs a recipe: mmrl verify RECIPE --{modes[0]} ...")
    return _record(arguments) if modes == ["record"] else _against(arguments)


def _against(arguments: argparse.Namespace) -> int:
    """Record both, each in a process of its own: they may differ in what a process can have only one of."""
    if "RANK" in os.environ:
        raise VerifyError(
            "--against starts both combinations itself, but another launcher has started this process already (RANK="
            f"{os.environ['RANK']}). Under it record one combination at a time: --record FOLDER, and for the second "
            "--rollouts FOLDER; then, without it, --compare"
        )
    strange = [word for word in arguments.against if "=" not in word]
    if strange:
        raise VerifyError(f"--against takes overrides (key=value), not {strange[0]!r}; name the recipe before it")
    second = [*arguments.overrides, *arguments.against]
    for overrides in (arguments.overrides, second):  # before anything is run
        _check(arguments.recipe, overrides)
    recipe, _ = load_recipe(arguments.recipe, arguments.overrides)
    folder = arguments.folder or recipe.directory / "verify"
    first_record, second_record = folder / "first", folder / "second"
    given = arguments.rollouts
    _start(arguments, arguments.overrides, first_record, given)
    _start(arguments, second, second_record, given or first_record)
    return _compare([first_record, second_record], arguments)


def _check(recipe_file: str, overrides: Sequence[str]) -> None:
    recipe, source = load_recipe(recipe_file, list(overrides))
    require_available(resolve(recipe, source))


def _start(arguments: argparse.Namespace, overrides: Sequence[str], folder: Path, rollouts: Path | None) -> None:
    """`mmrl verify --record` in a process of its own."""
    command = [sys.executable, "-m", "mmrl_core.cli.main", "verify", arguments.recipe, *overrides]
    command += ["--record", str(folder), "--updates", str(arguments.updates)]
    command += ["--rollouts", str(rollouts)] if rollouts is not None else []
    command += ["--prompts", str(arguments.prompts)] if arguments.prompts is not None else []
    command += ["--synthetic-advantages"] if arguments.synthetic_advantages else []
    said = " ".join(overrides) or "the recipe as it is"
    print(f"mmrl: recording {folder.name}: {said}", file=sys.stderr, flush=True)
    # its stdout is not the answer: that is the table
    done = subprocess.run(command, stdout=2, env={**os.environ, PARENT_VARIABLE: str(os.getpid())}, check=False)
    if done.returncode:
        raise VerifyError(
            f"the {folder.name} combination ({said}) failed with exit status {done.returncode}: see above"
        )


def _record(arguments: argparse.Namespace) -> int:
    """Run one combination through its own launcher."""
    die_with_parent()
    os.environ.pop(PARENT_VARIABLE, None)
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    require_available(selection)
    folder = arguments.record
    given = arguments.rollouts
    if given is not None and given.resolve() == folder.resolve():
        raise VerifyError(f"--record {folder} would replace the record whose rollouts are used; name another folder")
    if given is not None and not (given / BATCH).is_dir():
        raise VerifyError(
            f"--rollouts {given}: holds no batch. Name the folder of a record that generated its rollouts"
        )
    full = complete(recipe, selection, plugins)
    model = full.model.model_copy(update={"path": local_path(full.model.path)})
    full = full.model_copy(update={"model": model, "run_dir": str(folder)})
    if os.environ.get("RANK", "0") == "0":
        job = Job(
            prompts=arguments.prompts or recipe.algorithm.prompts_per_step,
            steps=arguments.updates,
            rollouts=str(given.resolve()) if given is not None else None,
            synthetic_advantages=arguments.synthetic_advantages,
        )
        job.prepare(folder)
    status: int = selection.launcher.create().launch(full, WORKER)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        print(f"{folder}: recorded; compare it with mmrl verify --compare", flush=True)
    return TROUBLE if status == DIFFERENT else status


def _compare(folders: Sequence[Path], arguments: argparse.Namespace) -> int:
    from mmrl_core.verify.compare import compare
    from mmrl_core.verify.report import as_json, table

    comparison = compare(folders[0], folders[1], arguments.tolerance)
    print(table(comparison))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(as_json(comparison), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise VerifyError(f"--json {arguments.json}: cannot be written: {error.strerror or error}") from error
    return 0 if comparison.first is None else DIFFERENT
