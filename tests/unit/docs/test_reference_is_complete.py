"""What has no documentation does not exist: the code is compared with the generated reference."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from mmrl_core import contracts, errors, hookspecs
from mmrl_core.cli import main as cli
from mmrl_core.metrics.names import METRICS
from mmrl_core.plugin_checks import CORE_DISTRIBUTION
from mmrl_core.plugins import KINDS, import_string, load_plugins
from mmrl_core.recipe import Recipe


def section(page: str, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}(?: \{{#[^}}]*\}})?$", page, re.MULTILINE)
    assert found, f"no heading {heading}"
    rest = page[found.end() :]
    following = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def rows(text: str) -> dict[str, str]:
    """First cell (a code span) -> last cell of every table row."""
    cells = [
        re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", lambda m: m[0].replace("|", "\0"), line))
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {c[1].strip().strip("`"): c[-2].strip() for c in cells}


@pytest.mark.parametrize("holder", [hookspecs.DeclaringHooks, hookspecs.LifecycleHooks])
def test_every_hook_is_documented(generated: dict[str, str], holder: type) -> None:
    names = [name for name in vars(holder) if name.startswith("mmrl_")]
    assert names
    for name in names:
        text = section(generated["hooks.md"], f"`{name}`")
        assert f"def {name}(" in text
        assert len(text.split("```")[2].split()) >= 4, f"{name} has no docstring"


def test_every_kind_of_component_has_its_hook(generated: dict[str, str]) -> None:
    for hook in KINDS.values():
        assert f"### `{hook}`" in generated["hooks.md"]


def test_every_contract_method_is_documented(generated: dict[str, str]) -> None:
    page = generated["contracts.md"]
    classes = [c for _, c in inspect.getmembers(contracts, inspect.isclass) if c.__module__ == contracts.__name__]
    assert {contracts.Policy, contracts.TrainingBackend, contracts.RolloutEngine} <= set(classes)
    for cls in classes:
        assert inspect.getdoc(cls), cls
        text = section(page, f"`{cls.__name__}`")
        for name, member in vars(cls).items():
            if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            below = section(text, f"`{cls.__name__}.{name}`")
            words = below.split("```")[2].split()
            assert len(words) >= 2, f"{cls.__name__}.{name} has no docstring"


def test_every_contract_field_is_documented(generated: dict[str, str]) -> None:
    page = generated["contracts.md"]
    for cls in [c for _, c in inspect.getmembers(contracts, inspect.isclass) if c.__module__ == contracts.__name__]:
        fields = [n for n in inspect.get_annotations(cls) if not n.startswith("_")]
        shown = rows(section(page, f"`{cls.__name__}`").split("\n### ")[0]) if fields else {}
        assert set(fields) == set(shown)
        bare = {name for name in fields if not shown[name]}
        assert not bare, f"{cls.__name__}: no docstring below {bare}"


def test_every_recipe_field_is_documented(generated: dict[str, str], generator: Any) -> None:
    page = generated["recipe.md"]
    sections = dict(generator.recipe_sections())
    schema = Recipe.model_json_schema()
    models = {model.__name__ for model in sections.values()}
    assert models == {Recipe.__name__, *schema["$defs"]} - {"Choice"}
    for path, model in sections.items():
        shown = rows(section(page, f"`{path}`" if path else "The file"))
        properties = model.model_json_schema(by_alias=False)["properties"]
        wanted = set(properties) - ({"options"} if "options" in properties else set())
        assert wanted == set(shown), path
        assert all(shown.values()), f"{path}: {[n for n, text in shown.items() if not text]}"
        assert inspect.getdoc(model)


def test_every_built_in_component_and_option_is_documented(generated: dict[str, str]) -> None:
    page = generated["components.md"]
    count = 0
    for kind in KINDS:
        for found in load_plugins().found(kind):
            if found.distribution != CORE_DISTRIBUTION:
                continue
            text = section(page, f"{kind}: `{found.name}`")
            assert found.component.summary in text
            shown = rows(text)
            for dotted in (found.component.options, found.component.sampling):
                if dotted is None:
                    continue
                for name in import_string(dotted, found.name).model_fields:
                    assert shown.get(name), f"{kind} {found.name}: {name} is not documented"
                    count += 1
    assert count > 50


def test_every_metric_is_documented(generated: dict[str, str]) -> None:
    shown = rows(generated["metrics.md"])
    assert set(shown) == {metric.name for metric in METRICS}
    assert all(len(text.split()) >= 2 for text in shown.values())


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_and_option_is_documented(
    generated: dict[str, str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    page = generated["cli.md"]

    def check(words: list[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        text = capsys.readouterr().out
        shown = section(page, f"`mmrl {' '.join(words)}`")
        for option in set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}:
            assert re.search(rf"^\| `{option}[ `,][^|]*\| [^|]{{6,}}", shown, re.MULTILINE), f"{words}: {option}"
        usage = " ".join(text.partition("\n\n")[0].split())
        if usage.endswith(("COMMAND ...", "ACTION ...")):
            below = re.findall(r"^    ([a-z]+)(?:  |$)", text, re.MULTILINE)
            assert below, text
            for name in below:
                check([*words, name])

    check([command])


def test_every_error_is_documented(generated: dict[str, str]) -> None:
    shown = rows(generated["errors.md"])
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert {c.__name__ for c in classes} == set(shown)
    assert all(shown.values())
