"""Trees and the processes that measure them: what is imported, what is said when it goes wrong, what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmrl_core.errors import PerfError
from mmrl_core.perf import machine, trees
from mmrl_core.perf.session import CannotRunError, Session
from mmrl_core.perf.trees import Tree, commit_tree, default_base, working_tree

FAKE = """
import json, pathlib, socket, sys
import mmrl_core
folder = pathlib.Path(sys.argv[1]).parent
PROTOCOL, CORE = 1, str(pathlib.Path(mmrl_core.__file__).resolve().parent)
{before}
line = socket.socket(socket.AF_UNIX)
line.connect(str(folder / "perf.sock"))
file = line.makefile("rw")
def send(**message):
    file.write(json.dumps(message) + "\\n")
    file.flush()
send(ready={{"protocol": PROTOCOL, "core": CORE, "arguments": sys.argv[2:]}})
for text in file:
    wish = json.loads(text)
    {step}
    peaks = [{{"all": 7}} if wish["memory"] else {{}}]
    send(step=wish["step"], metrics={{"timing/all": 0.5}}, memory=peaks, flops=None)
(folder / "left").write_text("in order")
"""


def tree(folder: Path, *, before: str = "", step: str = "pass") -> Tree:
    """A folder with an mmrl_core that measures nothing."""
    package = folder / "tree" / "mmrl_core" / "perf"
    package.mkdir(parents=True)
    for module in (package.parent, package):
        (module / "__init__.py").touch()
    code = textwrap.dedent(FAKE).format(before=textwrap.dedent(before), step=step)
    (package / "process.py").write_text(code)
    return Tree(name="fake", folder=folder / "tree")


def session(folder: Path, fake: Tree) -> Session:
    run = folder / "run"
    run.mkdir()
    return Session(fake, run / "perf.json", ["a=1"])


def test_a_process_takes_steps_and_leaves(tmp_path: Path) -> None:
    with session(tmp_path, tree(tmp_path)) as process:
        assert process.ready()["arguments"] == ["a=1"]
        assert process.step().memory == [{}]
        numbers = process.step(memory=True)
        assert (numbers.metrics, numbers.memory) == ({"timing/all": 0.5}, [{"all": 7}])
    assert (tmp_path / "run" / "left").read_text() == "in order"


def test_its_own_words_say_why_it_cannot_run(tmp_path: Path) -> None:
    before = """
        print("mmrl: WARNING: something else", flush=True)
        print("mmrl: rollout: hf samples tokens", "two lines", sep="\\n", flush=True)
        print("mmrl: rank 0 of 2 failed", flush=True)
        sys.exit(1)
    """
    with session(tmp_path, tree(tmp_path, before=before)) as process, pytest.raises(CannotRunError) as caught:
        process.ready()
    assert str(caught.value) == "rollout: hf samples tokens\ntwo lines"


def test_a_crash_shows_the_end_of_its_output(tmp_path: Path) -> None:
    fake = tree(tmp_path, step="raise ValueError('in a step')")
    with session(tmp_path, fake) as process:
        process.ready()
        with pytest.raises(CannotRunError, match=r"(?s)ended with status 1: .*ValueError: in a step"):
            process.step()


@pytest.mark.parametrize(
    ("before", "said"),
    [("PROTOCOL = 99", "fake measures by protocol 99"), ("CORE = '/elsewhere'", "imported /elsewhere instead of")],
)
def test_other_code_than_asked_for_is_not_measured(tmp_path: Path, before: str, said: str) -> None:
    with session(tmp_path, tree(tmp_path, before=before)) as process, pytest.raises(PerfError, match=said):
        process.ready()


def test_an_interrupted_driver_leaves_no_process(tmp_path: Path) -> None:
    process = session(tmp_path, tree(tmp_path, step="import time; time.sleep(600)"))

    def interrupted() -> None:
        with process:
            process.ready()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert process._process.returncode is not None


# ------------------------------------------------------------------------------------------------------------ trees


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: the first without mmrl perf, the second with a marker in its place."""
    folder = tmp_path / "checkout"
    (folder / "mmrl_core" / "perf").mkdir(parents=True)
    (folder / "mmrl_core" / "__init__.py").touch()
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    (folder / "mmrl_core" / "perf" / "process.py").write_text("old")
    (folder / "plugins" / "mmrl-core" / "src").mkdir(parents=True)
    (folder / "plugins" / "mmrl-core" / "src" / "x").touch()
    (folder / "plugins" / "never-installed" / "src").mkdir(parents=True)
    (folder / "plugins" / "never-installed" / "src" / "x").touch()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "second")
    monkeypatch.setattr(machine, "REPOSITORY", folder)
    monkeypatch.setattr(trees.machine.commit, "__defaults__", (folder,))
    return folder


def test_a_commit_stands_in_a_folder_of_its_own(repository: Path, tmp_path: Path) -> None:
    (repository / "mmrl_core" / "perf" / "process.py").write_text("changed")
    head = git(repository, "rev-parse", "--short=12", "HEAD").strip()
    assert working_tree().name == f"{head}+changes"
    with commit_tree("HEAD", tmp_path) as base:
        assert base.name == head
        assert (base.folder / "mmrl_core" / "perf" / "process.py").read_text() == "old"
        path = base.variables()["PYTHONPATH"].split(os.pathsep)
        assert path[:2] == [str(base.folder), str(base.folder / "plugins" / "mmrl-core" / "src")]
        assert not any("never-installed" in entry for entry in path)
    assert not base.folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert (repository / "mmrl_core" / "perf" / "process.py").read_text() == "changed"


def test_a_worktree_is_removed_when_measuring_fails(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), commit_tree("HEAD", tmp_path):
        raise KeyboardInterrupt
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_commits_that_cannot_be_measured_are_refused(repository: Path, tmp_path: Path) -> None:
    for revision, said in (("HEAD~1", "older than mmrl perf"), ("nowhere", "is no commit"), ("--all", "is no commit")):
        with pytest.raises(PerfError, match=said), commit_tree(revision, tmp_path):
            pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_by_default_a_change_is_compared_with_what_it_changes(repository: Path) -> None:
    assert default_base() == "HEAD~1"
    (repository / "mmrl_core" / "__init__.py").write_text("x = 1")
    assert default_base() == "HEAD"


def test_an_installed_package_has_no_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even inside somebody's repository, as a virtual environment often is."""
    git(tmp_path, "init", "-q")
    (tmp_path / "theirs").touch()
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "theirs")
    (tmp_path / "mmrl_core").mkdir()
    (tmp_path / "mmrl_core" / "__init__.py").touch()
    assert machine.commit(tmp_path) == machine.NO_CHECKOUT
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    monkeypatch.setattr(machine.commit, "__defaults__", (tmp_path,))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert working_tree().variables()["PYTHONPATH"] == "", "site-packages must not come before the standard library"
    with pytest.raises(PerfError, match="is not a git checkout"), commit_tree("HEAD", tmp_path):
        pass


def test_a_fingerprint_tells_machines_apart() -> None:
    one = machine.fingerprint(1)
    assert one == machine.fingerprint(1)
    other = [
        machine.fingerprint(2),
        machine.fingerprint(1, device="gpu", chip="A"),
        machine.fingerprint(1, device="gpu"),
    ]
    assert len({f["id"] for f in (one, *other)}) == 4
    assert "chip" not in one


def test_listing_what_could_be_measured_imports_no_torch() -> None:
    code = (
        "import sys; from mmrl_core.cli.main import main; "
        "main(['perf', 'run', '--list', '--device', 'cpu']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
