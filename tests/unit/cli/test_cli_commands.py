"""The command line: errors, `mmrl plugins`, `doctor`, `recipe` and `train` up to the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrl_core.cli import main as cli
from mmrl_core.errors import RecipeError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `mmrl probe` do something."""

    def install(function: Any) -> None:
        module = type(sys)("mmrl_test_command")

        def add_parser(subparsers: Any) -> None:
            subparsers.add_parser("probe").set_defaults(func=function)

        module.add_parser = add_parser  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mmrl_test_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("mmrl_test_command", "a test"))

    return install


def raising(error: BaseException) -> Any:
    def function(_: Any) -> int:
        raise error

    return function


def test_user_errors_are_a_message_and_a_status(command: Any, capsys: Any) -> None:
    command(raising(RecipeError("line one\nline two")))
    assert cli.main(["probe"]) == RecipeError.exit_code
    assert capsys.readouterr().err == "mmrl: line one\nline two\n"


@pytest.mark.parametrize("arguments", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback(command: Any, capsys: Any, arguments: list[str]) -> None:
    command(raising(RecipeError("who")))
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("mmrl: who\n")


def test_debug_by_environment(command: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMRL_DEBUG", "1")
    command(raising(RecipeError("who")))
    assert cli.main(["probe"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_and_bugs(command: Any) -> None:
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_status_is_the_commands(command: Any) -> None:
    command(lambda _: 7)
    assert cli.main(["probe"]) == 7


def test_help_lists_every_command_and_imports_none(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)


def test_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m mmrl_core.cli.main recipe schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_plugins_table(lab: Any) -> None:
    lab.install("broken-one", "import no_such_module_at_all")
    done = lab.mmrl("plugins", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0
    lines = {tuple(line.split()[:5]): line for line in done.stdout.splitlines()}
    assert ("lab", "1.0", "backend", "toy", "available") in lines
    never = lines[("lab", "1.0", "reward", "never", "unavailable")]
    assert never.endswith("no such luck. Cure: pip install luck")
    broken = next(line for line in lines.values() if line.startswith("broken-one"))
    assert "no_such_module_at_all" in broken


def test_doctor_reports_and_judges(lab: Any) -> None:
    healthy = lab.mmrl("doctor", "trial.yaml", "--json")
    assert healthy.returncode == 0, healthy.stderr
    report = json.loads(healthy.stdout)
    assert report["recipe"] == {"path": "trial.yaml", "problems": []}
    assert report["software"]["torch"].count("build") == 1
    assert report["machine"]["cores"] == os.cpu_count()
    never = next(c for c in report["components"] if c["name"] == "never")
    assert (never["available"], never["reason"], never["cure"]) == (False, "no such luck", "pip install luck")

    unable = lab.mmrl("doctor", "trial.yaml", "rewards.0=never")
    assert unable.returncode == 1
    assert "reward 'never' (lab) cannot run here: no such luck. Cure: pip install luck" in unable.stdout

    wrong = lab.mmrl("doctor", "trial.yaml", "backend=tyo")
    assert wrong.returncode == 1
    assert "Did you mean 'toy'?" in wrong.stdout

    lab.install("broken-one", "import no_such_module_at_all")
    broken = lab.mmrl("doctor")
    assert broken.returncode == 1
    assert "Traceback" in broken.stdout
    assert "broken-one" in broken.stdout
    assert lab.mmrl("doctor", environment={"MMRL_DISABLE_PLUGINS": "broken-one"}).returncode == 0


def test_recipe_check(lab: Any) -> None:
    done = lab.mmrl("recipe", "check", "trial.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: trial.yaml: trial, some/model, 2 steps of 4 x 2 samples, run folder runs/trial")
    assert "backend=lab:toy" in done.stdout
    assert "launcher=mmrl-core:local" in done.stdout

    wrong = lab.mmrl("recipe", "check", "trial.yaml", "sampling.max_new_tokens=0", "data.pth=x", "rollout=dcie")
    assert wrong.returncode == 2
    for words in ("override 'sampling.max_new_tokens=0'", "'path'", "'dice'"):
        assert words in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_recipe_show_is_complete_and_stable(lab: Any) -> None:
    done = lab.mmrl("recipe", "show", "trial.yaml", "device=cpu", "eval={data: {name: list, path: held.jsonl}}")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["device"] == {"name": "cpu"}
    assert shown["launcher"] == {"name": "local", "processes": 1, "threads_per_process": None, "environment": "inherit"}
    assert shown["backend"] == {"name": "toy", "shards": 2, "offload": False, "inner": {"depth": 3}}
    assert shown["sampling"] == {"max_new_tokens": 8, "temperature": 1.0}
    assert shown["eval"]["sampling"] == {"max_new_tokens": 8, "temperature": 0.0}
    assert shown["rewards"][0]["on_failure"] == "drop_sample"
    work = lab.folder.parent / "work"
    (work / "shown.yaml").write_text(done.stdout)
    assert lab.mmrl("recipe", "show", "shown.yaml").stdout == done.stdout


def test_recipe_schema_covers_components(lab: Any) -> None:
    schema = json.loads(lab.mmrl("recipe", "schema").stdout)
    definitions = schema["$defs"]
    assert "Choice" not in definitions
    assert "RewardChoice" not in definitions
    toy = definitions["backend.lab.toy"]
    assert set(toy["properties"]) == {"name", "shards", "offload", "inner"}
    assert toy["properties"]["shards"]["description"] == "How many."
    assert {"name", "weight", "run"} <= set(definitions["reward.lab.brief"]["properties"])
    assert definitions["prompt_source.lab.list"]["required"] == ["name", "path"]
    assert "auto" in definitions["device"]["anyOf"][0]["enum"]

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [r for v in node.values() for r in references(v)]
        return [r for v in node for r in references(v)] if isinstance(node, list) else []

    assert all(r.removeprefix("#/$defs/") in definitions for r in references(schema))


def test_train_refuses_what_cannot_run(lab: Any) -> None:
    done = lab.mmrl("train", "trial.yaml", "rewards.0=never")
    assert done.returncode == 1
    assert "reward 'never' (lab) cannot run here: no such luck. Cure: pip install luck" in done.stderr
    assert not (lab.folder.parent / "work" / "runs").exists()


def test_train_hands_the_complete_recipe_to_the_launcher(lab: Any) -> None:
    launcher = """
    from mmrl_core import Component, hookimpl
    from mmrl_core.contracts import Launcher
    mmrl_api = 1
    @hookimpl
    def mmrl_launchers():
        return [Component(name="fake", summary="s", target="carrier_plugin:Fake")]
    class Fake(Launcher):
        def launch(self, recipe):
            print(recipe.model_dump_json())
            return 5
    """
    lab.install("carrier", launcher)
    done = lab.mmrl("train", "trial.yaml", "launcher=fake", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 5, done.stderr
    given = json.loads(done.stdout)
    assert given["device"] == {"name": "cpu"}
    assert given["backend"]["shards"] == 2
    assert Path(given["run_dir"]) == Path("runs/trial")
