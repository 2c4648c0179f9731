"""Reading recipes: positions, overrides, messages, and the written copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrl_core.errors import PreflightError, RecipeError
from mmrl_core.launch.runfolder import recipe_yaml, write_recipe
from mmrl_core.recipe import Choice, Positive, Recipe, RewardChoice, Spec, load_recipe
from mmrl_core.yaml_source import RecipeSource

MINIMAL = """\
model:
  path: some/model
data: arithmetic
rewards:
  - exact
algorithm:
  steps: 3
  prompts_per_step: 4
  samples_per_prompt: 2
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "trial.yaml"
        path.write_text(text)
        return path

    return write_file


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_minimal_recipe_and_component_forms(write: Any) -> None:
    text = MINIMAL.replace("  - exact", "  - exact\n  - {name: pkg:format, weight: 0.5, strict: true}")
    recipe, _ = load_recipe(write(text))
    assert recipe.data == Choice(name="arithmetic")
    assert recipe.rewards[1].name == "pkg:format"
    assert recipe.rewards[1].weight == 0.5
    assert recipe.rewards[1].options == {"strict": True}
    assert recipe.directory == Path("runs/run")


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("steps: 3", "steps: many", 7, ["algorithm.steps", "'many'", "valid integer"]),
        ("steps: 3", "steps: 0", 7, ["algorithm.steps", "greater than or equal to 1", "0"]),
        ("steps: 3", "steps: true", 7, ["algorithm.steps", "true and false"]),
        ("steps: 3", "stpes: 3", 7, ["algorithm.stpes", "unknown field", "Did you mean 'steps'?"]),
        ("steps: 3", "loss: {name: gpso}\n  steps: 3", 7, ["algorithm.loss.name", "'gpso'", "Did you mean 'gspo'?"]),
        ("  samples_per_prompt: 2", "", 6, ["algorithm.samples_per_prompt", "required"]),
        ("  - exact", "  - {name: exact, wieght: 2, run: inlin}", 5, ["rewards.0.run", "'inlin'", "'inline'"]),
        ("  - exact", "  - {name: exact, run: inline, deadline_s: 3}", 5, ["rewards.0", "cannot enforce deadline_s"]),
        ("  - exact", "  - {weight: 2}", 5, ["rewards.0.name", "required"]),
        ("  - exact", "  []", 4, ["rewards", "at least 1"]),
        ("  path: some/model", "  path: 5", 2, ["model.path", "valid string", "5"]),
        ("  path: some/model", "  path: a\n  path: b", 3, ["model.path", "given twice", "line 2"]),
        ("  path: some/model", "  path: [a", 3, ["not valid YAML"]),
        ("  path: some/model", "  path: a\n  lora: {dropout: 0.1}", 3, ["model.lora.dropout"]),
        ("  path: some/model", "  path: &a [*a]", 2, ["contains itself"]),
        ("steps: 3", "steps: 3\n  minibatches: 9", 6, ["algorithm", "minibatches (9) exceed prompts_per_step (4)"]),
        (
            "steps: 3",
            "steps: 3\n  minibatches: 3\n  minibatch_split: samples",
            6,
            ["algorithm", "minibatches (3) exceed samples_per_prompt (2)"],
        ),
        (
            "steps: 3",
            "steps: 3\n  kl: {coef: 0.1, where: reward}\n  advantage: {combine: advantages}",
            6,
            ["kl.where: reward", "advantage.combine: advantages never forms", "use kl.where: loss"],
        ),
        (
            "  - exact",
            "  - exact\n  - length\n  - {name: exact, weight: 2}",
            4,
            ["rewards.0 (exact) and rewards.2 (exact) are both called 'exact'", "`label`"],
        ),
        (
            "  - exact",
            "  - exact\n  - {name: length, label: exact}",
            4,
            ["rewards.0 (exact) and rewards.1 (length) are both called 'exact'"],
        ),
        ("  - exact", "  - {name: exact, label: a/b}", 5, ["rewards.0.label", "'a/b'"]),
    ],
)
def test_mistakes_are_named_with_their_line(write: Any, old: str, new: str, line: int, said: list[str]) -> None:
    path = write(MINIMAL.replace(old, new))
    message = failure(path)
    assert f"{path}:{line}: " in message
    for words in said:
        assert words in message


def test_minibatches_of_samples_may_be_more_than_the_prompts(write: Any) -> None:
    text = MINIMAL.replace("prompts_per_step: 4", "prompts_per_step: 1\n  minibatches: 2\n  minibatch_split: samples")
    recipe, _ = load_recipe(write(text))
    assert recipe.algorithm.updates_per_rollout == 2


def test_a_label_names_a_reward_that_is_used_twice(write: Any) -> None:
    text = MINIMAL.replace("  - exact", "  - exact\n  - {name: exact, label: strict, strict: true, weight: 0}")
    recipe, _ = load_recipe(write(text))
    assert [r.shown_name for r in recipe.rewards] == ["exact", "strict"]
    assert recipe.rewards[1].options == {"strict": True}
    again, _ = load_recipe(write(recipe_yaml(recipe)))
    assert again == recipe


def test_every_problem_is_listed(write: Any) -> None:
    message = failure(write(MINIMAL.replace("steps: 3", "steps: -1").replace("some/model", "{}") + "sed: 1\n"))
    assert len(message.splitlines()) == 3
    assert "Did you mean 'seed'?" in message


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "3"])
def test_a_file_that_is_no_mapping(write: Any, text: str) -> None:
    assert "a recipe is a mapping of fields" in failure(write(text))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such recipe file" in failure(tmp_path / "nope.yaml")
    assert "cannot read" in failure(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot read" in failure(tmp_path / "binary.yaml")


def test_overrides(write: Any) -> None:
    path = write(MINIMAL)
    overrides = [
        "algorithm.steps=10",
        "optimizer.lr=1e-5",
        "backend.shards=2",
        "launcher.processes=2",
        "rewards.0.weight=0.25",
        "rewards.1=format",
        "model.lora.rank=8",
        "sampling.stop=2024-01-01",
        "eval=null",
    ]
    recipe, _ = load_recipe(path, overrides)
    assert recipe.algorithm.steps == 10
    assert recipe.optimizer.lr == 1e-5
    assert recipe.backend == Choice(name="fsdp2", options={"shards": 2})
    assert recipe.launcher == Choice(name="auto", options={"processes": 2})
    assert [(r.name, r.weight) for r in recipe.rewards] == [("exact", 0.25), ("format", 1.0)]
    assert recipe.model.lora is not None
    assert recipe.model.lora.rank == 8
    assert recipe.sampling == {"stop": "2024-01-01"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.steps", ["write key=value"]),
        ("=3", ["write key=value"]),
        ("algorithm.steps=x", ["override 'algorithm.steps=x'", "algorithm.steps", "'x'"]),
        ("algorithm.stpes=3", ["override 'algorithm.stpes=3'", "Did you mean 'steps'?"]),
        ("rewards.7=x", ["rewards is a list of 1"]),
        ("rewards.x=3", ["rewards is a list of 1"]),
        ("rewards.4.weight=3", ["rewards.4 does not exist"]),
        ("seed.x=3", ["seed"]),
        ("algorithm.steps=[1", ["not valid YAML"]),
    ],
)
def test_bad_overrides(write: Any, override: str, said: list[str]) -> None:
    message = failure(write(MINIMAL), override)
    for words in said:
        assert words in message


def test_an_override_is_blamed_for_what_it_replaced(write: Any) -> None:
    message = failure(write(MINIMAL), "algorithm={steps: 1, prompts_per_step: x, samples_per_prompt: 2}")
    assert message.startswith("override 'algorithm=")
    assert "algorithm.prompts_per_step" in message


class Options(Spec):
    path: str
    """A file."""
    count: Positive | Literal["auto"] = 1
    """A number."""


def test_option_errors_name_field_and_line(write: Any) -> None:
    text = MINIMAL.replace("data: arithmetic", "data:\n  name: list\n  count: no")
    recipe, source = load_recipe(write(text))
    with pytest.raises(RecipeError) as caught:
        source.validate(Options, recipe.data.options, ("data",))
    message = str(caught.value)
    assert f"{source.path}:3: data.path: required field is missing" in message
    assert f"{source.path}:5: data.count: " in message


def test_missing_option_of_a_plain_word_is_named(write: Any) -> None:
    recipe, source = load_recipe(write(MINIMAL))
    with pytest.raises(RecipeError, match=r"trial.yaml:3: data.path: required field is missing"):
        source.validate(Options, recipe.data.options, ("data",))


def test_components_have_no_automatic_choice_except_device_and_launcher(write: Any) -> None:
    from mmrl_core.plugins import resolve

    recipe, source = load_recipe(write(MINIMAL), ["backend=auto"])
    with pytest.raises(RecipeError, match="no backend called 'auto'"):
        resolve(recipe, source)


# ------------------------------------------------------------------------------------------------- the written copy


def test_written_recipe_reads_back_equal(write: Any, tmp_path: Path) -> None:
    text = MINIMAL.replace("some/model", "'1e5'").replace("exact", "{name: exact, weight: 1e-7, word: '2024-01-01'}")
    recipe, _ = load_recipe(write(text), [f"run_dir={tmp_path}/run", "model.lora.rank=4", "optimizer.lr=3e-6"])
    path = write_recipe(recipe)
    assert path == tmp_path / "run" / "recipe.yaml"
    assert load_recipe(path)[0] == recipe
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]


texts = st.text(max_size=12) | st.sampled_from(
    [
        "1e5",
        "1E-3",
        "-.5e+3",
        "no",
        "null",
        "~",
        "0x1F",
        "1_000",
        "2024-01-01",
        "1:30",
        "<<",
        "=",
        "a: b",
        "#c",
        "é\n x ",
        "...",
        "---",
        "",
    ]
)
scalars = texts | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.dictionaries(texts.filter(lambda t: t not in {"name", *RewardChoice.model_fields}), values, max_size=4)
)
def test_any_option_survives_writing(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**yaml.safe_load(MINIMAL), "data": {"name": "x", **options}})
    path = tmp_path / "again.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert RecipeSource.read(path, []).validate(Recipe) == recipe


def test_unwritable_run_folder(write: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    recipe, _ = load_recipe(write(MINIMAL), [f"run_dir={tmp_path}/taken"])
    with pytest.raises(PreflightError, match=r"cannot write .*taken.*run_dir"):
        write_recipe(recipe)


@pytest.mark.parametrize("number", ["1e-5", "+2.5E+3", ".5e1", "3.e2"])
def test_exponents_without_a_point_are_numbers(write: Any, number: str) -> None:
    recipe, _ = load_recipe(write(MINIMAL + f"sampling: {{value: {number}, word: '{number}', id: 1e5f}}\n"))
    assert recipe.sampling == {"value": float(number), "word": number, "id": "1e5f"}
