"""Every node is asked whether ranks can run there, before any does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmrl_core.errors import PreflightError
from mmrl_core.launch.preflight import VERSIONED
from mmrl_core.recipe import Recipe
from mmrl_ray import node_inspection
from mmrl_ray.cluster import Node
from mmrl_ray.node_inspection import Wanted, inspect, problems

_LIMIT_S = 120.0
"""A node has to start a Python for this; on a shared file system that can take a while."""


def check_nodes(nodes: Sequence[Node], recipe: Recipe, working_dir: Path) -> None:
    """Raise PreflightError naming every node that lacks the run folder, a path of the recipe or a package version."""
    folder = working_dir / recipe.directory
    with _token(folder) as token:
        wanted = Wanted(
            packages=(*VERSIONED, "ray"),
            working_dir=str(working_dir),
            run_dir=str(recipe.directory),
            token_file=str(recipe.directory / token),
            paths=local_paths(recipe, working_dir),
        )
        here = inspect(wanted)
        ray.cloudpickle.register_pickle_by_value(node_inspection)
        try:
            remote = ray.remote(num_cpus=0, max_retries=0)(inspect)
            asked = [
                remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)).remote(
                    wanted
                )
                for node in nodes
            ]
        finally:
            ray.cloudpickle.unregister_pickle_by_value(node_inspection)
        lines = [
            line for node, answer in zip(nodes, asked, strict=True) for line in _problems(node, answer, here, wanted)
        ]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise PreflightError(
            f"launcher ray: the nodes are not alike:\n{shown}\n"
            "Every node needs the same packages, and the same paths on a file system that all of them share"
        )


def local_paths(recipe: Recipe, working_dir: Path) -> list[str]:
    """What the recipe names that is a file or folder: it exists here, or it can be nothing else than a path."""
    found: dict[str, None] = {}
    for text in _strings(recipe.model_dump(mode="json", exclude={"name", "run_dir", "launcher"})):
        if "\n" in text or len(text) > 1024:
            continue
        relative = ("/" in text or "." in text) and text.strip(".") != ""
        if text.startswith("/") or (relative and (working_dir / text).exists()):
            found[text] = None
    return [path for path in found if "*" not in path]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _problems(node: Node, answer: Any, here: dict[str, object], wanted: Wanted) -> list[str]:
    try:
        found = ray.get(answer, timeout=_LIMIT_S)
    except ray.exceptions.GetTimeoutError:
        return [f"node {node.address}: did not start a process within {_LIMIT_S:.0f} s"]
    except ray.exceptions.RayError as error:
        return [f"node {node.address}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    return problems(node.address, found, here, wanted)


@contextmanager
def _token(folder: Path) -> Iterator[str]:
    """A file with a secret in the run folder: only a node that sees this very folder can read it."""
    path = folder / f".launcher-{secrets.token_hex(4)}"
    try:
        path.write_text(secrets.token_hex(16), encoding="utf-8")
    except OSError as error:
        raise PreflightError(f"launcher ray: cannot write {path}: {error.strerror or error}") from error
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
