"""The run folder's copy of the recipe."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from mmrl_core.errors import PreflightError
from mmrl_core.recipe import Recipe
from mmrl_core.yaml_source import reads_as_string

RECIPE_FILE = "recipe.yaml"


def write_recipe(recipe: Recipe) -> Path:
    """Write `recipe` to `recipe.directory/recipe.yaml`, atomically. Reading that file gives an equal recipe.

    Raises PreflightError when the run folder cannot be written.
    """
    path = recipe.directory / RECIPE_FILE
    write_recipe_to(recipe, path)
    return path


def write_recipe_to(recipe: Recipe, path: Path) -> None:
    """Write `recipe` to `path`: beside it first, flushed to the disk, then renamed."""
    text = recipe_yaml(recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o644)  # mkstemp's 0600 would hide the recipe from colleagues
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise PreflightError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another folder with run_dir"
        ) from error


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, in the order of its fields."""
    data = recipe.model_dump(mode="json")
    return yaml.dump(data, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes strings that a recipe would read as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        """Anchors would only puzzle the reader of a small file."""
        return True


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    if reads_as_string(value):
        style = None
    elif value.isprintable():
        style = "'"
    elif all(line.isprintable() for line in value.split("\n")):
        style = "|"
    else:
        style = '"'  # control characters and exotic line breaks, escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_RecipeDumper.add_representer(str, _represent_str)
