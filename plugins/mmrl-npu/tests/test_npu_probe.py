"""Whether an NPU can be used here: from files and variables, with the cure of what is missing first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ascend_machines import TOOLKIT, Site
from mmrl_npu import chips
from mmrl_npu.machine import Machine
from mmrl_npu.probe import examine
from mmrl_npu.versions import CANN_OF_TORCH_NPU, cann_match, torch_match

from mmrl_core.testing.tiny import tiny_recipe, write_recipe_file


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_healthy_machine(site: Site) -> None:
    answer = examine(site.machine)
    assert answer.available
    assert answer.reason == "3 NPU(s), torch 2.7.1+cpu, torch_npu 2.7.1.post2, CANN 8.5.0"
    assert site.machine.npus() == [0, 1, 10]


def no_npus(site: Site) -> None:
    for node in ("0", "1", "10"):
        site.remove(f"/dev/davinci{node}")


def not_sourced(site: Site) -> None:
    del site.environment["ASCEND_HOME_PATH"]


def not_installed(site: Site) -> None:
    not_sourced(site)
    site.remove(f"{TOOLKIT}/set_env.sh")


BROKEN: list[tuple[Callable[[Site], object], str, str]] = [
    (no_npus, "no NPU device node", "docker run --device=/dev/davinci0 --device=/dev/davinci_manager"),
    (lambda s: s.remove("/dev/hisi_hdc"), "no device node /dev/hisi_hdc", "--device=/dev/hisi_hdc"),
    (lambda s: s.environment.update(ASCEND_RT_VISIBLE_DEVICES=""), "hides every NPU", "unset ASCEND_RT_VISIBLE"),
    (not_sourced, "environment is not set", f"source {TOOLKIT}/set_env.sh"),
    (not_installed, "CANN is not installed", "install the CANN toolkit"),
    (lambda s: s.environment.update(ASCEND_HOME_PATH="/nowhere"), "does not exist", f"source {TOOLKIT}/set_env.sh"),
    (lambda s: s.packages.pop("torch-npu"), "torch_npu is not installed", "pip install 'mmrl-npu[ascend]'"),
    (lambda s: s.packages.update(torch="2.9.0"), "made for torch 2.7.1, and torch 2.9.0", "pip install torch==2.7.1"),
]


@pytest.mark.parametrize(("breaking", "reason", "cure"), BROKEN)
def test_what_is_missing_first_and_its_cure(
    site: Site, breaking: Callable[[Site], object], reason: str, cure: str
) -> None:
    breaking(site)
    answer = examine(site.machine)
    assert not answer.available
    assert reason in answer.reason
    assert cure in answer.cure


def test_any_other_machine_has_nothing_of_ascend(tmp_path: Path) -> None:
    machine = Machine(root=tmp_path, environment={"PATH": "/usr/bin"}, distributions={"torch": "2.13.0"})
    answer = examine(machine)
    assert (answer.available, machine.sign_of_ascend()) == (False, None)
    assert "nothing of Ascend" in answer.reason


def test_the_toolkit_is_found_in_the_home_folder_too(tmp_path: Path) -> None:
    script = tmp_path / "home/me/Ascend/ascend-toolkit/set_env.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    machine = Machine(root=tmp_path, environment={"HOME": "/home/me"}, distributions={})
    assert machine.toolkit_script() == "/home/me/Ascend/ascend-toolkit/set_env.sh"


@pytest.mark.parametrize("torch_npu", [*CANN_OF_TORCH_NPU, "2.99.0"])
def test_pairs_of_the_table_fit(site: Site, torch_npu: str) -> None:
    wanted = CANN_OF_TORCH_NPU.get(torch_npu, "8.0.0")
    site.packages = {"torch-npu": torch_npu, "torch": torch_npu.partition("rc")[0].partition(".post")[0]}
    site.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", f"version={wanted}\n")
    assert torch_match(site.machine).fits
    assert cann_match(site.machine).fits


def test_an_older_cann_is_named_but_refuses_nothing(site: Site) -> None:
    site.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", "version=8.3.RC1\n")
    answer = examine(site.machine)
    assert answer.available
    assert "CANN 8.3.RC1 is older than CANN 8.5.0" in answer.reason
    match = cann_match(site.machine)
    assert (match.fits, match.cure) == (False, "install CANN 8.5.0, or one of torch-npu 2.7.1, 2.8.0")


@pytest.mark.parametrize("cann", ["9.0.0", "8.5.0.alpha001", "8.2.RC1.alpha003"])
def test_a_newer_cann_and_one_with_an_odd_name_are_no_error(site: Site, cann: str) -> None:
    site.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", f"version={cann}\n")
    assert cann_match(site.machine).fits
    assert cann in cann_match(site.machine).found


# --------------------------------------------------------------------------------------------------------------- chips

CHIP = """[version]
SoC_version=Ascend910B2
[SoCInfo]
ai_core_cnt=24
{cores}
support_bf16={bf16}
[AICoreSpec]
cube_freq=1800
cube_m_size=16
cube_n_size=16
cube_k_size=16
"""


def chip(folder: Path, cores: str = "cube_core_cnt=24", bf16: int = 1) -> Path:
    file = folder / "aarch64-linux/data/platform_config/Ascend910B2.ini"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(CHIP.format(cores=cores, bf16=bf16))
    return folder


def test_peak_of_a_chip_that_cann_describes(tmp_path: Path) -> None:
    """24 cores of 16 x 16 x 16 products and sums at 1.8 GHz."""
    for half in ("float16", "bfloat16"):
        assert chips.peak_flops(chip(tmp_path), "Ascend910B2", half) == pytest.approx(353.8944e12, rel=1e-12)
    assert chips.peak_flops(chip(tmp_path, cores=""), "Ascend910B2", "float16") == pytest.approx(353.8944e12)


def test_unknown_is_unknown(tmp_path: Path) -> None:
    assert chips.peak_flops(chip(tmp_path), "Ascend910B2", "float32") is None
    assert chips.peak_flops(chip(tmp_path, bf16=0), "Ascend910B2", "bfloat16") is None
    assert chips.peak_flops(chip(tmp_path), "Ascend910B3", "float16") is None
    assert chips.peak_flops(chip(tmp_path), "../Ascend910B2", "float16") is None
    assert chips.peak_flops(chip(tmp_path, cores="cube_core_cnt=many"), "Ascend910B2", "float16") is None


# ------------------------------------------------------------------------------------------------------------ harmless

IMPORTED = """
import contextlib, importlib.metadata, io, json, sys

hidden, recipe = sys.argv[1:]
find = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **what: [e for e in find(**what) if e.value != hidden]
from mmrl_core.cli.main import main

seen, said = {}, {}
for command in (["--help"], ["plugins"], ["recipe", "check", recipe], ["doctor"]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), contextlib.suppress(SystemExit):
        main(command)
    seen[command[0]] = sorted({name.partition(".")[0] for name in sys.modules})
    said[command[0]] = output.getvalue()
print(json.dumps([seen, said]))
"""


def test_installed_here_it_changes_no_third_party_import(tmp_path: Path) -> None:
    """On a machine without CANN: `mmrl --help`, listing, checking a recipe and diagnosing, which imports torch, load no
    package with the plugin's entry point that they do not load without it; the plugin's own comes on top."""
    recipe = write_recipe_file(tmp_path / "recipe.yaml", {**tiny_recipe("model", "run"), "device": "auto"})
    kept = {k: v for k, v in os.environ.items() if k not in ("MMRL_PLUGINS", "MMRL_DISABLE_PLUGINS")}
    answers = []
    for hidden in ("nothing", "mmrl_npu.plugin"):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTED, hidden, str(recipe)],
            env=kept,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    (with_it, said), (without, said_without) = answers
    for moment in ("--help", "plugins", "recipe", "doctor"):
        more = set(with_it[moment]) - set(without[moment])
        assert more == (set() if moment == "--help" else {"mmrl_npu"}), moment
        assert not set(without[moment]) - set(with_it[moment])
        assert "torch_npu" not in with_it[moment]
        assert "torch" not in with_it[moment] or moment == "doctor"
    assert "\nmmrl-npu " in said["plugins"]
    assert "\nmmrl-npu " not in said_without["plugins"], "other plugins' cures may name it"
    assert "ok" in said["recipe"].lower()
