"""Plugins as a user meets them: built as wheels, installed beside mmrl-core's wheel, found by name.

Those of this repository (plugins/) and those of strangers (contrib/).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"mmrl-reward-brevity": "mmrl_reward_brevity", "template": "mmrl_changeme"}
"""Folders below contrib/, and the modules in them."""
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
"""Folders below plugins/, named as the distributions in them."""
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
"""What a build front-end calls, once its checks are done."""
HEAVY = ("torch", "torch_npu", "transformers", "megatron", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Use:
    """A recipe that uses a plugin, and how it says that an option is wrong."""

    component: str
    recipe: str
    overrides: tuple[str, ...] = ()
    wrong: str
    said: str


USES = {
    "mmrl-hpsv2": Use(
        component="hpsv2",
        recipe="flux_dancegrpo.yaml",
        wrong="rewards.0.every=0",
        said="rewards.0.every",
    ),
    "mmrl-hpsv3": Use(
        component="hpsv3",
        recipe="wan22_dancegrpo.yaml",
        wrong="rewards.0.dtype=float16",
        said="rewards.0.dtype",
    ),
    "mmrl-mindspeed": Use(
        component="megatron",
        recipe="quickstart.yaml",
        overrides=("backend={name: megatron, tensor_parallel: 2}",),
        wrong="backend.tensor_paralel=2",
        said="tensor_parallel",
    ),
    "mmrl-npu": Use(
        component="npu",
        recipe="quickstart.yaml",
        overrides=("device=npu", "launcher.environment=device"),
        wrong="device=np",
        said="no device called 'np'",
    ),
}
"""Of every plugin; a new one adds its own."""


def environment() -> dict[str, str]:
    """This one without the variables that lead back to it."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "MMRL_PLUGINS")}


def run(*command: str | Path, cwd: Path) -> str:
    """Its standard output; fails with both streams."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every wheel, built from copies, so that the checkout stays clean and no stale build folder is packed."""
    place = tmp_path_factory.mktemp("wheels")
    sources = place / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    (sources / "core").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources / "core" / name)
    shutil.copytree(ROOT / "mmrl_core", sources / "core" / "mmrl_core", ignore=ignored)
    for package in PACKAGES:
        shutil.copytree(ROOT / "contrib" / package, sources / package, ignore=ignored)
    for plugin in PLUGINS:
        shutil.copytree(ROOT / "plugins" / plugin, sources / plugin, ignore=ignored)
    for source in ("core", *PACKAGES, *PLUGINS):
        run(sys.executable, "-c", BUILD, place, cwd=sources / source)
    shutil.rmtree(sources)
    return place


@pytest.fixture(scope="module")
def clean_python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheels.

    Third-party libraries come from the surrounding environment through a plain path entry. Its own .pth files, and with
    them any editable installation of mmrl-core, are not processed there; its metadata of mmrl packages is shadowed.
    """
    place = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    libraries = sorted({p for p in sys.path if p.endswith("site-packages")})
    assert libraries
    target = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--quiet"),
        *sorted(wheels.glob("*.whl")),
        cwd=place,
    )
    (target / "surroundings.pth").write_text("\n".join(libraries) + "\n")
    return python


def test_nothing_comes_from_the_checkout(clean_python: Path) -> None:
    modules = ["mmrl_core", *PACKAGES.values(), *(name.replace("-", "_") for name in PLUGINS)]
    distributions = ["mmrl-core", "mmrl-reward-brevity", "mmrl-changeme", *PLUGINS]
    script = f"""
        import importlib, importlib.metadata, json
        files = [importlib.import_module(m).__file__ for m in {modules!r}]
        dists = [importlib.metadata.distribution(d) for d in {distributions!r}]
        print(json.dumps([files, [str(d.locate_file("")) for d in dists]]))
    """
    files, places = json.loads(run(clean_python, "-c", textwrap.dedent(script), cwd=clean_python.parent))
    environment = clean_python.parents[1]
    for path in (*files, *places):
        assert Path(path).resolve().is_relative_to(environment.resolve()), path


def test_the_wheel_holds_what_it_should(wheels: Path) -> None:
    (wheel,) = wheels.glob("mmrl_reward_brevity-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "mmrl_reward_brevity/py.typed" in names
    assert not [n for n in names if "test" in n]
    assert "[mmrl]\nreward-brevity = mmrl_reward_brevity.plugin" in points
    assert "Requires-Dist: mmrl-core<0.2,>=0.1" in metadata


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugins_wheel_is_its_source_and_no_more(wheels: Path, plugin: str) -> None:
    """Every file of the package, data and the type marker included; its licences; no tests."""
    package = plugin.replace("-", "_")
    source = ROOT / "plugins" / plugin / "src"
    written = [path for path in (source / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    (wheel,) = wheels.glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    assert packed == {path.relative_to(source).as_posix() for path in written}
    assert f"{package}/py.typed" in packed
    licences = sorted((ROOT / "plugins" / plugin).glob("licenses/*"))
    assert {f"licenses/licenses/{path.name}" for path in licences} <= about


def test_plugins_are_listed_with_their_distribution(clean_python: Path) -> None:
    assert set(PLUGINS) == set(USES), "say in USES which recipe uses the new plugin"
    rows = json.loads(run(clean_python, "-m", "mmrl_core.cli.main", "plugins", "--json", cwd=clean_python.parent))
    listed = {(row["distribution"], row["name"]) for row in rows}
    assert {(plugin, use.component) for plugin, use in USES.items()} <= listed


@pytest.mark.parametrize("plugin", PLUGINS)
def test_recipes_with_a_plugins_component_are_checked_without_its_libraries(
    clean_python: Path, plugin: str, tmp_path: Path
) -> None:
    """Right options are accepted and wrong ones named, where nothing heavy can be imported."""
    use = USES[plugin]
    shutil.copy(ROOT / "recipes" / use.recipe, tmp_path)
    check = f"""
        import importlib.abc, sys

        class Refused(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY!r}:
                    raise ImportError(name + " is not needed to check a recipe")

        sys.meta_path.insert(0, Refused())
        from mmrl_core.cli.main import main
        overrides = {[use.recipe, *use.overrides]!r}
        right, wrong = (main(["recipe", "check", *overrides, *more]) for more in ([], [{use.wrong!r}]))
        print("statuses", right, wrong)
    """
    command = [str(clean_python), "-c", textwrap.dedent(check)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert "statuses 0 2" in done.stdout, done.stdout + done.stderr
    assert use.said in done.stderr


def test_rewards_are_found_by_name_and_score_in_workers(clean_python: Path) -> None:
    script = """
        import json, sys
        from mmrl_core.contracts import Prompt, Sample
        from mmrl_core.plugins import Selected, import_string, load_plugins
        from mmrl_core.recipe import RewardChoice
        from mmrl_core.rewards.executor import RewardExecutor

        plugins = load_plugins()
        ours = ("mmrl-reward-brevity", "mmrl-changeme")  # the surroundings may hold others
        errors = {p.distribution: p.error for p in plugins.plugins if p.distribution in ours and p.error}
        options = {"brevity": {"half_life_words": 2}, "mmrl-changeme:changeme": {"word": "b"}, "distinct": None}
        chosen = []
        for name, values in options.items():
            found = plugins.get("reward", name)
            model = found.component.options
            made = None if model is None else import_string(model, name).model_validate(values)
            chosen.append(Selected(found=found, options=made))
        listed_without_torch = "torch" not in sys.modules
        sample = Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="q"), text="a b a b")
        with RewardExecutor([RewardChoice(name=n) for n in options], chosen, "cpu") as rewards:
            rewards.setup()
            (scored,) = rewards.score([sample])
        print(json.dumps([errors, listed_without_torch, scored.failure, dict(scored.per_reward)]))
    """
    errors, listed_without_torch, failure, values = json.loads(
        run(clean_python, "-c", textwrap.dedent(script), cwd=clean_python.parent)
    )
    assert (errors, listed_without_torch, failure) == ({}, True, None)
    assert values == {"brevity": 0.25, "mmrl-changeme:changeme": 1.0, "distinct": 1.0}


@pytest.mark.parametrize("package", PACKAGES)
def test_its_own_tests_pass_against_the_wheel(clean_python: Path, package: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "contrib" / package / "tests", tmp_path / "tests")
    output = run(clean_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    assert " passed" in output


def test_training_with_it_by_name(clean_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: with-brevity
device: cpu
model: {{path: {tiny_model}}}
sampling: {{max_new_tokens: 6}}
data: {{name: arithmetic}}
rewards:
  - {{name: brevity, half_life_words: 2}}
  - {{name: distinct, weight: 0.5}}
algorithm: {{steps: 2, prompts_per_step: 2, samples_per_prompt: 4}}
writers: [jsonl]
""",
        encoding="utf-8",
    )
    run(clean_python, "-m", "mmrl_core.cli.main", "train", recipe, cwd=tmp_path)
    lines = (tmp_path / "runs" / "with-brevity" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    for row in rows:
        assert row["rewards/failed_samples"] == 0
        assert row["grpo/score/mean"] == pytest.approx(
            row["reward/brevity/mean"] + 0.5 * row["reward/distinct/mean"], abs=1e-9
        )
