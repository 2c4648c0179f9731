"""Activating MindSpeed, with a stand-in written here: what order things happen in, and what each failure says.

The stand-in reads its options as MindSpeed 0.12.1 does, from the command line when its adaptor is imported. Whether the
real adaptor then does its work needs an Ascend machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mmrl_mindspeed.adaptor import arguments
from mmrl_mindspeed.options import MegatronOptions

from mmrl_core.errors import BackendError

VERSION = importlib.metadata.version("megatron-core")
ARGS_UTILS = """
import argparse
_ARGS = None

def get_mindspeed_args(get_defaults=False):
    global _ARGS
    if not get_defaults and _ARGS is not None:
        return _ARGS
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--use-fused-rmsnorm", action="store_true")
    parser.add_argument("--optimization-level", type=int, default=2)
    args, unknown = parser.parse_known_args([] if get_defaults else None)
    if not get_defaults:
        args.unknown = unknown
        _ARGS = args
    return args
"""
ADAPTOR = """
import sys
from mindspeed.args_utils import get_mindspeed_args
EARLY = [m for m in sys.modules if m.startswith("megatron.core")]
ARGS = vars(get_mindspeed_args())
"""


def stand_in(folder: Path, *, version: str | None = VERSION, adaptor: bool = True, npu: bool = True) -> Path:
    package = folder / "mindspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "args_utils.py").write_text(ARGS_UTILS)
    if adaptor:
        (package / "megatron_adaptor.py").write_text(ADAPTOR)
    if version is not None:
        info = folder / f"mindspeed-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mindspeed\nVersion: {version}\n")
    if npu:
        (folder / "torch_npu.py").write_text("")
    return folder


def run(folder: Path, code: str, *words: str) -> str:
    """Standard output of a program in a process of its own, or the message of its BackendError."""
    program = (
        "import json, sys\n"
        "from mmrl_core.errors import BackendError\n"
        "from mmrl_mindspeed.adaptor import activate\n"
        "from mmrl_mindspeed.options import MegatronOptions\n"
        "try:\n"
        + textwrap.indent(textwrap.dedent(code), "    ")
        + "\nexcept BackendError as error:\n    print(error)\n"
    )
    paths = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


OPTIONS = "MegatronOptions(tensor_parallel=2, sequence_parallel=True, mindspeed={'use_fused_rmsnorm': True})"


def test_options_come_from_the_recipe_and_the_command_line_stays(tmp_path: Path) -> None:
    out = run(
        stand_in(tmp_path),
        f"""
        assert activate("npu", {OPTIONS})
        assert activate("npu", {OPTIONS})  # again: nothing more
        from mindspeed import megatron_adaptor as adaptor
        print(json.dumps([adaptor.ARGS, adaptor.EARLY, sys.argv[1:]]))
        """,
        "train",
        "--optimization-level",
        "0",
    )
    args, early, argv = json.loads(out.splitlines()[0])
    assert args["use_fused_rmsnorm"] is True
    assert args["optimization_level"] == 2, "read from the user's command line"
    assert args["unknown"][:4] == ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]
    assert "--sequence-parallel" in args["unknown"]
    assert early == []
    assert argv == ["train", "--optimization-level", "0"]


def test_the_command_line_stays_when_the_adaptor_fails(tmp_path: Path) -> None:
    folder = stand_in(tmp_path)
    (folder / "mindspeed" / "megatron_adaptor.py").write_text("raise OSError('no driver')")
    code = f"""
    try:
        activate("npu", {OPTIONS})
    except OSError as error:
        print(error, sys.argv[1:])
    """
    assert run(folder, code, "mine") == "no driver ['mine']\n"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_devices_do_not_look(tmp_path: Path, device: str) -> None:
    code = f"print(activate({device!r}, {OPTIONS}), 'mindspeed' in sys.modules)"
    assert run(stand_in(tmp_path), code) == "False False\n"


def test_an_option_that_mindspeed_does_not_know_is_named(tmp_path: Path) -> None:
    code = "activate('npu', MegatronOptions(mindspeed={'use_fused_rmsnrm': True}))"
    out = run(stand_in(tmp_path), code)
    assert "mindspeed.use_fused_rmsnrm is no option of MindSpeed itself" in out
    assert "Did you mean 'use_fused_rmsnorm'?" in out


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"adaptor": False}, ["is a placeholder without mindspeed.megatron_adaptor", "git clone -b"]),
        ({"npu": False}, ["needs torch_npu, which is not installed"]),
        ({"version": "0.8.0"}, ["was made for megatron-core 0.8, but megatron-core"]),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, how: dict[str, object], said: list[str]) -> None:
    out = run(stand_in(tmp_path, **how), f"activate('npu', {OPTIONS})")  # type: ignore[arg-type]
    assert all(text in out for text in said), out


def test_missing(tmp_path: Path) -> None:
    out = run(tmp_path, f"activate('npu', {OPTIONS})")
    assert "backend megatron on npu needs MindSpeed, and MindSpeed is not installed" in out


def test_too_late_once_megatron_is_imported(tmp_path: Path) -> None:
    code = f"import types; sys.modules['megatron.core.enums'] = types.ModuleType('x'); activate('npu', {OPTIONS})"
    assert "megatron.core.enums was imported before MindSpeed's adaptor" in run(stand_in(tmp_path), code)


def test_activated_by_somebody_else(tmp_path: Path) -> None:
    code = f"import mindspeed.megatron_adaptor; activate('npu', {OPTIONS})"
    assert "was imported before, by other code" in run(stand_in(tmp_path), code)


def test_options_cannot_change_in_a_process(tmp_path: Path) -> None:
    code = f"activate('npu', {OPTIONS}); activate('npu', MegatronOptions())"
    assert "cannot change to" in run(stand_in(tmp_path), code)


def test_arguments() -> None:
    options = MegatronOptions(mindspeed={"a_b": [1, 2], "c": None, "d": False, "e": "x", "f": 0.5})
    assert arguments(options)[-7:] == ("--a-b", "1", "2", "--e", "x", "--f", "0.5")
    with pytest.raises(BackendError, match="follows from the backend's own options"):
        arguments(MegatronOptions(mindspeed={"tensor_model_parallel_size": 4}))
