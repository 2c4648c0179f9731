"""What pages tell people to write is accepted, what they tell people to run exists, and the site builds on its own."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrl_core.cli import main as cli
from mmrl_core.errors import RecipeError
from mmrl_core.hookspecs import Component
from mmrl_core.metrics import names
from mmrl_core.plugin_checks import declared
from mmrl_core.plugins import KINDS, Plugin, Plugins, import_string, load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[3]
COMPLETE = {"model", "data", "rewards", "algorithm"}
"""A snippet with all of these is a recipe; any other is a part, put into recipes/quickstart.yaml."""

SAMPLE_PACKAGES = {
    "README.md": ("", "my_rewards"),
    "docs/tutorial/your-own-task.md": ("mytask", "mytask"),
    "docs/how-to/reward-plugin.md": ("src", "mmrl_politeness.plugin"),
    "docs/how-to/other-plugins.md#prompts": ("", "capitals"),
    "docs/how-to/other-plugins.md#writer": ("", "csv_writer"),
    "docs/how-to/other-plugins.md#weights": ("", "npz_weights"),
}
"""Plugins that the pages themselves write: (folder below the page's, module with the hooks)."""


@pytest.fixture(scope="module")
def written(pages: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that the pages show, by their titles, importable; and what contrib/ holds."""
    root = tmp_path_factory.mktemp("written")
    for block in pages.blocks("python", "yaml", "toml"):
        title = block.title or ("my_rewards.py" if block.page == "README.md" and block.language == "python" else None)
        if title is not None and block.page != "contrib":
            file = root / title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    (root / "src" / "mmrl_politeness" / "__init__.py").touch()
    before = sys.path[:]
    sys.path[:0] = [str(root), str(root / "src"), str(root / "mytask"), *map(str, ROOT.glob("contrib/*/src"))]
    importlib.invalidate_caches()
    yield root
    sys.path[:] = before


@pytest.fixture(scope="module")
def plugins(written: Path) -> Plugins:
    """The installed plugins and those that the pages write."""
    installed = load_plugins()
    modules = [module for _, module in SAMPLE_PACKAGES.values()]
    modules += ["mmrl_reward_brevity.plugin", "mmrl_changeme.plugin"]
    extra = []
    for name in modules:
        module = importlib.import_module(name)
        assert module.mmrl_api == 1
        components = {kind: declared(module, hook, name, Component) for kind, hook in KINDS.items()}
        assert any(components.values()), f"{name} declares nothing"
        extra.append(Plugin(name=name, distribution=name, version="0", module=name, components=components))
    return Plugins(manager=installed.manager, plugins=[*installed.plugins, *extra])


def merged(base: Any, part: Any) -> Any:
    """`part` laid over `base`; a component of another name replaces the base's."""
    if not isinstance(base, dict) or not isinstance(part, dict):
        return part
    if "name" in part and part["name"] != base.get("name"):
        return part
    return {**base, **{key: merged(base.get(key), value) for key, value in part.items()}}


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_repository_is_right(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "check", str(path)]) == 0, capsys.readouterr().err


def test_every_snippet_is_a_right_recipe(pages: Any, plugins: Plugins, tmp_path: Path) -> None:
    text, image = (
        yaml.safe_load((ROOT / "recipes" / name).read_text(encoding="utf-8"))
        for name in ("quickstart.yaml", "quickstart_image.yaml")
    )
    blocks = pages.blocks("yaml")
    assert len(blocks) > 20
    for block in blocks:
        given = yaml.safe_load(block.text)
        assert isinstance(given, dict), block
        base = image if given.get("rollout") == "flow" else text
        whole = given if set(given) >= COMPLETE else merged(base, given)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(whole), encoding="utf-8")
        try:
            recipe, source = load_recipe(file)
            resolve(recipe, source, plugins)
        except RecipeError as error:
            pytest.fail(f"{block}: {error}")


# ------------------------------------------------------------------------------------------------------------- commands


def shell_lines(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments and here-documents."""
    end: str | None = None
    for line in text.replace("\\\n", " ").splitlines():
        if end is not None:
            end = None if line.strip() == end else end
            continue
        heredoc = re.search(r"<<'(\w+)'", line)
        end = heredoc[1] if heredoc else None
        for command in re.split(r"\s&&\s|\s\|\s", line):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def test_every_command_exists(pages: Any, generator: Any, written: Path, plugins: Plugins) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([a-z-]+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    seen = set()
    for block in pages.blocks("sh"):
        for words in shell_lines(block.text):
            seen.add(words[0])
            where = f"{block}: {shlex.join(words)}"
            if words[0] == "torchrun":
                position = words.index("mmrl")
                assert "--no-python" in words[:position], where
                words = words[position:]
            if words[0] == "mmrl":
                check_mmrl(words[1:], generator, written, plugins, where)
            elif words[0] == "make":
                for word in words[1:]:
                    name, assigned, _ = word.partition("=")
                    wanted = rf"^{name} \?=" if assigned else rf"^{name}:"
                    assert re.search(wanted, makefile, re.MULTILINE), where
            elif words[0] == "pip":
                assert words[1] in ("install", "uninstall"), where
                for extra in re.findall(r"(?:mmrl-core|\.)\[([^\]]+)\]", " ".join(words)):
                    assert set(extra.split(",")) <= extras, where
            elif words[:2] == ["hf", "download"]:
                assert "--local-dir" in words, f"{where}: a recipe names the folder"
            elif words[0] == "ray":
                assert words[1] in ("start", "status", "get-auth-token", "debug"), where
            elif words[:2] == ["python", "-c"]:
                compile(words[2], where, "exec")
            elif words[:2] == ["python", "-m"]:
                assert words[2] in ("venv", "pytest", "build"), where
            else:
                assert words[0] in ("cd", "export", "mkdir", "cat", "curl", "git", "tensorboard", "."), where
    assert {"mmrl", "make", "pip", "torchrun"} <= seen


def check_mmrl(arguments: list[str], generator: Any, written: Path, plugins: Plugins, where: str) -> None:
    """The arguments parse; where they name a recipe that exists, it is right with its overrides."""
    try:
        parsed = generator.full_parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(where)
    recipe = getattr(parsed, "recipe", None)
    file = next((root / recipe for root in (ROOT, written) if recipe and (root / recipe).is_file()), None)
    if file is None:
        assert recipe in (None, "recipe.yaml"), f"{where}: no such recipe"
        return
    resolve(*load_recipe(file, parsed.overrides), plugins)


def test_commands_named_in_the_text_exist(pages: Any, generator: Any) -> None:
    known = {words for words, _ in generator.commands()}
    for page, span in pages.inline():
        found = re.match(r"mmrl((?: [a-z]+)+)(?![\w.-])", span)
        if found:
            words = found[0].split()
            assert any(" ".join(words[:n]) in known for n in range(2, len(words) + 1)), f"{page}: {span}"


def test_shown_answers_are_what_is_answered(
    pages: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shown = [block for block in pages.blocks("text") if block.text.startswith("$ mmrl ")]
    assert shown
    for block in shown:
        command, _, answer = block.text.partition("\n")
        cli.main(shlex.split(command)[2:])
        captured = capsys.readouterr()
        assert (captured.out + captured.err).strip() == answer.strip(), block


# ---------------------------------------------------------------------------------------------------------------- names


def test_fields_named_in_the_text_exist(pages: Any, generator: Any) -> None:
    known = set()
    for path, model in generator.recipe_sections():
        known |= {f"{path}.{name}".lstrip(".") for name in model.model_fields}
    prefixes = {kind: f"{kind}." for kind in ("device", "backend", "rollout", "launcher")} | {"policy": "model.policy."}
    for kind, prefix in prefixes.items():
        for found in load_plugins().found(kind):
            if found.component.options is not None:
                known |= {prefix + n for n in import_string(found.component.options, found.name).model_fields}
            if found.component.sampling is not None:
                known |= {"sampling." + n for n in import_string(found.component.sampling, found.name).model_fields}
    sections = "|".join(n for n in Recipe.model_fields if n not in ("name", "data", "rewards"))
    pattern = re.compile(rf"(?:{sections})(?:\.[a-z_]+)+")
    count = 0
    for page, span in pages.inline():
        found = re.fullmatch(rf"{pattern.pattern}(?:[:=].*)?", span) and not span.endswith(".py")
        for name in re.findall(pattern, span if found else ""):
            assert name in known, f"{page}: {name}"
            count += 1
    assert count > 10


def test_metrics_named_in_the_text_exist(pages: Any) -> None:
    first = {metric.name.split("/")[0] for metric in names.METRICS if "/" in metric.name}
    count = 0
    for page, span in pages.inline():
        if re.fullmatch(rf"(?:{'|'.join(first)})/[A-Za-z0-9_/]+", span) and not (ROOT / span).exists():
            assert names.find(span) is not None, f"{page}: {span}"
            count += 1
    assert count > 10


def test_files_named_in_the_text_exist(pages: Any) -> None:
    for page, span in pages.inline():
        first = "mmrl_core|contrib|plugins|recipes|tests|docs|perf|src|licenses"
        if names.find(span) is None and re.fullmatch(rf"(?:{first})/[\w/.-]+", span):
            assert any((root / span).exists() for root in (ROOT, (ROOT / page).parent)), f"{page}: {span}"


def test_links_of_the_readme_lead_somewhere(pages: Any) -> None:
    for target in re.findall(r"\]\(([^)#]+)", pages.texts["README.md"]):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_environment_variable_is_documented(pages: Any) -> None:
    text = pages.texts["docs/reference/environment.md"]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "mmrl_core").rglob("*.py")]
    used = {name for source in code for name in re.findall(r"\"(MMRL_[A-Z_]+)\"", source)}
    assert "MMRL_PLUGINS" in used
    assert {name for name in used if f"`{name}`" not in text} == set()


# ---------------------------------------------------------------------------------------------------- code of the pages


def test_python_of_the_pages_compiles(pages: Any) -> None:
    blocks = pages.blocks("python")
    assert len(blocks) > 8
    for block in blocks:
        compile(block.text, str(block), "exec")


def test_the_weight_format_of_the_pages_goes_there_and_back(plugins: Plugins, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from mmrl_core.checkpoint.hf_format import HuggingFaceSource

    own = {"a.weight": torch.randn(3, 4), "b": torch.zeros(2)}
    save_file(own, tmp_path / "model.safetensors")
    npz = plugins.get("weight format", "npz").load()
    assert not npz.detect(tmp_path)
    source = HuggingFaceSource(tmp_path, where="here", complete=True)
    npz(None).write(source, tmp_path, model=None, progress=lambda done, total: None)
    assert npz.detect(tmp_path)
    again = npz.open(tmp_path, where="there", model=None)
    assert {n: again.shape(n) for n in again.names()} == {n: tuple(t.shape) for n, t in own.items()}
    assert all(torch.equal(again.read(n), t) for n, t in own.items())


def test_rewards_of_the_pages_score(plugins: Plugins) -> None:
    from mmrl_core import RewardResult, Sample
    from mmrl_core.contracts import Prompt
    from mmrl_core.plugins import Selected

    prompt = Prompt(index=0, text="Which planet is the largest?", answer="Jupiter")
    sample = Sample(sample_id=0, group_id=0, prompt=prompt, text="Jupiter. It is large.")
    task = Selected(found=plugins.get("reward", "one_sentence"), options=None).create()
    expected = RewardResult(value=0.5, scores={"right": 1.0, "short": 0.0})
    assert task.score([sample]) == [expected]
    brief = Selected(found=plugins.get("reward", "brief"), options=None).create()
    assert brief.score([sample]) == [RewardResult(value=1.0)]


def test_prompt_source_and_writer_of_the_pages_work(plugins: Plugins, tmp_path: Path) -> None:
    from mmrl_core.plugins import Selected

    source = Selected(found=plugins.get("prompt source", "capitals"), options=None).create(1)
    source.prepare()
    assert [source.prompt(i).answer for i in range(len(source) + 1)] == ["Tokyo", "Nairobi", "Paris", "Tokyo"]
    writer = Selected(found=plugins.get("writer", "csv"), options=None).create()
    writer.mmrl_run_start(run_dir=str(tmp_path))
    writer.mmrl_step_end(step=3, metrics={"grpo/score/mean": 0.5})
    assert (tmp_path / "rewards.csv").read_text() == "3,0.5\n"


def test_tests_of_the_reward_page_pass(written: Path) -> None:
    """In a process that finds the package by its entry point, as after `pip install`."""
    installed = written / "src" / "mmrl_politeness-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mmrl-politeness\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[mmrl]\npoliteness = mmrl_politeness.plugin\n")
    tests = ["tests/test_politeness.py", "tests/test_conformance.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests],
        cwd=written,
        env={"PYTHONPATH": str(written / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_sub_scores", "TestPolite::test_declaration_every_option_is_documented"):
        assert re.search(rf"{name} PASSED", done.stdout), done.stdout


def test_conformance_classes_of_the_pages_exist(pages: Any) -> None:
    imports = re.findall(r"from (mmrl_core\.testing\.\w+) import (\w+)", "".join(pages.texts.values()))
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------------------------------------- the site


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_module = pytest.importorskip("mkdocs.config", reason="pip install 'mmrl-core[docs]'")
    from mkdocs.commands.build import build

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = config_module.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    html = sorted((tmp_path / "site").rglob("*.html"))
    assert len(html) > 25
    for file in html:
        text = file.read_text(encoding="utf-8")
        outside = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(https?://[^\" >]+)", text)
        assert [u for u in outside if "canonical" not in u] == [], file
        assert "fonts.googleapis" not in text, file
