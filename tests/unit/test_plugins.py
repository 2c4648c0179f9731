"""Discovery and selection of plugins, each case in a process of its own with fake installed distributions."""

from __future__ import annotations

import json
from typing import Any

import pytest

GOOD = """
from mmrl_core import Component, hookimpl
mmrl_api = 1
@hookimpl
def mmrl_rewards():
    return [Component(name="{name}", summary="s", target="somewhere:thing")]
"""


def rows(site: Any, **environment: str) -> list[dict[str, Any]]:
    done = site.mmrl("plugins", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed


def row(listed: list[dict[str, Any]], distribution: str) -> dict[str, Any]:
    (found,) = [r for r in listed if r["distribution"] == distribution]
    return found


def test_component_is_attributed_to_its_distribution(site: Any) -> None:
    site.install("good-one", GOOD.format(name="fine"), version="2.5")
    found = row(rows(site), "good-one")
    assert (found["version"], found["kind"], found["name"], found["status"]) == ("2.5", "reward", "fine", "available")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module_at_all\n", ["ModuleNotFoundError", "no_such_module_at_all"]),
        ("raise SystemExit('bye')\n", ["SystemExit", "bye"]),
        (GOOD.format(name="x").replace("mmrl_api = 1", ""), ["mmrl_api = None", "Cure"]),
        (GOOD.format(name="x").replace("mmrl_api = 1", "mmrl_api = 99"), ["mmrl_api = 99", "Cure"]),
        (GOOD.format(name="x").replace("def mmrl_rewards", "def mmrl_reward"), ["mmrl_reward", "'mmrl_rewards'"]),
        (
            GOOD.format(name="x") + "@hookimpl\ndef mmrl_step_end(step, metric): ...\n",
            ["mmrl_step_end(step, metric)", "no 'metric'", "'metrics'", "step, metrics, samples"],
        ),
        (GOOD.format(name="x").replace("@hookimpl", ""), ["mmrl_rewards is not marked", "@hookimpl"]),
        (GOOD.format(name="Bad Name"), ["'Bad Name'", "must match"]),
        (
            GOOD.format(name="x").replace("somewhere:thing", "somewhere.thing"),
            ["'somewhere.thing'", "package.module:name"],
        ),
        (GOOD.format(name="x").replace("return [", "return 3; ["), ["returned int", "list of Component"]),
        (GOOD.format(name="x").replace("return [", "return ['a'] + ["), ["a str in its list"]),
        (GOOD.format(name="x").replace('thing")]', 'thing")] * 2'), ["'x' more than once"]),
        (GOOD.format(name="x").replace("return", "raise KeyError('oops')\n    return"), ["KeyError", "oops"]),
    ],
)
def test_broken_plugin_hides_nothing_and_says_why(site: Any, code: str, said: list[str]) -> None:
    site.install("bad-one", code)
    site.install("good-one", GOOD.format(name="fine"))
    listed = rows(site)
    bad = row(listed, "bad-one")
    assert bad["status"] == "broken"
    assert bad["name"] is None
    for words in said:
        assert words in bad["reason"]
    assert row(listed, "good-one")["status"] == "available"


def test_unsatisfied_requirement_is_broken_before_import(site: Any) -> None:
    site.install("bad-one", "raise RuntimeError('was imported')", requires=["mmrl-core>=99"])
    reason = row(rows(site), "bad-one")["reason"]
    assert "requires mmrl-core>=99" in reason
    assert "pip install --upgrade bad-one mmrl-core" in reason


def test_requirement_of_an_extra_does_not_count(site: Any) -> None:
    site.install("good-one", GOOD.format(name="fine"), requires=["mmrl-core>=99; extra == 'dev'", "mmrl_core>=0.1"])
    assert row(rows(site), "good-one")["status"] == "available"


def test_entry_point_may_name_an_object(site: Any) -> None:
    code = """
    from mmrl_core import Component, hookimpl
    class Thing:
        mmrl_api = 1
        @hookimpl
        def mmrl_rewards(self):
            return [Component(name="fine", summary="s", target="somewhere:thing")]
    thing = Thing()
    """
    site.install("good-one", code, entry="good_one_plugin:thing")
    assert row(rows(site), "good-one")["name"] == "fine"


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"MMRL_DISABLE_PLUGINS": "Good_One"}, ["blocked", "available"]),
        ({"MMRL_PLUGINS": "other, good-two"}, ["blocked", "available"]),
        ({"MMRL_PLUGINS": "good-one", "MMRL_DISABLE_PLUGINS": "good-one"}, ["blocked", "blocked"]),
        ({"MMRL_PLUGINS": "", "MMRL_DISABLE_PLUGINS": "mmrl-core"}, ["available", "available"]),
    ],
)
def test_environment_blocks_plugins(site: Any, environment: dict[str, str], status: list[str]) -> None:
    site.install("good-one", GOOD.format(name="one"))
    site.install("good-two", GOOD.format(name="two"))
    listed = rows(site, **environment)
    assert [row(listed, d)["status"] for d in ("good-one", "good-two")] == status
    assert any(r["distribution"] == "mmrl-core" and r["name"] == "cpu" for r in listed)


def test_blocked_plugin_is_not_imported(site: Any) -> None:
    site.install("bad-one", "raise RuntimeError('was imported')")
    assert row(rows(site, MMRL_DISABLE_PLUGINS="bad-one"), "bad-one")["status"] == "blocked"


def test_mistyped_word_in_the_environment_is_said(site: Any) -> None:
    site.install("good-one", GOOD.format(name="one"))
    done = site.mmrl("plugins", environment={"MMRL_DISABLE_PLUGINS": "god-one"})
    assert "MMRL_DISABLE_PLUGINS names 'god-one'" in done.stderr
    assert "'good-one'" in done.stderr


def test_nothing_heavy_is_imported(lab: Any) -> None:
    code = (
        "import sys; from mmrl_core.cli.main import main; status = main({arguments}); "
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'rich', 'lab_parts') if m in sys.modules]; "
        "print('HEAVY', heavy); sys.exit(status)"
    )
    recipe = str(lab.folder.parent / "work" / "trial.yaml")
    for arguments in (["plugins"], ["recipe", "check", recipe], ["recipe", "show", recipe], ["recipe", "schema"]):
        done = lab.python("-c", code.format(arguments=arguments))
        assert done.returncode == 0, done.stderr
        assert "HEAVY []" in done.stdout, arguments


GET = """
from mmrl_core.plugins import load_plugins
from mmrl_core.errors import PluginError
plugins = load_plugins()
assert load_plugins() is plugins
try:
    found = plugins.get("reward", {word!r})
    print("FOUND", found.distribution, found.name)
except PluginError as error:
    print("ERROR", error)
"""


def get(site: Any, word: str) -> str:
    done = site.python("-c", GET.format(word=word))
    assert done.returncode == 0, done.stderr
    answer: str = done.stdout
    return answer


def test_two_distributions_with_one_name(site: Any) -> None:
    site.install("one", GOOD.format(name="same"), version="1.1")
    site.install("two", GOOD.format(name="same"), version="2.2")
    said = get(site, "same")
    for words in ("ERROR", "one 1.1", "two 2.2", "one:same", "two:same"):
        assert words in said
    assert "FOUND two same" in get(site, "two:same")


def test_unknown_word_names_the_nearest_and_the_broken_plugin(site: Any) -> None:
    site.install("one", GOOD.format(name="brevity"))
    site.install("broken-one", "import no_such_module_at_all")
    said = get(site, "brevty")
    assert "Did you mean 'brevity'?" in said
    assert "broken-one 1.0 failed to load" in said
    assert "Traceback" in said
    assert "no_such_module_at_all" in said


def test_create_understands_devices_reward_functions_and_classes() -> None:
    from mmrl_core import Component, Reward, reward
    from mmrl_core.plugins import Found, Selected

    @reward
    def one(sample: Any) -> float:
        return 1.0

    class Made:
        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments

    class Fixed(Found):
        target: Any

        def load(self) -> Any:
            return targets[self.kind]

    targets = {"device": Made, "reward": one, "writer": Made}

    def create(kind: str, *arguments: Any, options: Any = "options") -> Any:
        component = Component(name="n", summary="s", target="a:b")
        found = Fixed(kind=kind, component=component, distribution="d", version="1")
        return Selected(found=found, options=options).create(*arguments)

    assert create("device", options=None).arguments == ()
    assert create("device").arguments == ("options",)
    assert create("writer", 7).arguments == ("options", 7)
    assert isinstance(create("reward"), Reward)
