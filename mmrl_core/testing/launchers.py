"""`LauncherConformance`: what the core relies on in a launcher, with real runs of a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

LIMIT_S = 180.0


class LauncherConformance(ComponentConformance):
    """Subclass it as `Test...`, name the `component`, and choose `options` that start two ranks."""

    kind = "launcher"
    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "mmrl_core.cli.main", "train")
    """What a user types, without the recipe; a launcher that is started by another program puts that in front."""
    device: ClassVar[str] = "cpu"
    """The device to run on."""
    ranks: ClassVar[int] = 2
    """How many ranks the options start."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny model folder."""
        cls.require_available()
        return tiny_language_model(tmp_path_factory.mktemp("conformance") / "model")

    def run(
        self, folder: Path, command: Sequence[str] | None = None, arguments: Sequence[str] = (), **sections: Any
    ) -> subprocess.CompletedProcess[str]:
        """`mmrl train` (or `command`) of a tiny recipe with this launcher, in a process of its own."""
        launcher = {"name": self.found().name, **self.options}
        recipe = tiny_recipe(sections.pop("path"), folder / "run", device=self.device, launcher=launcher, **sections)
        path = write_recipe_file(folder / "recipe.yaml", recipe)
        clean: Mapping[str, str] = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment = {
            **clean,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "OMP_NUM_THREADS": "1",
            "MMRL_COLLECTIVE_TIMEOUT_S": "120",
        }
        return subprocess.run(
            [*(command or self.command), str(path), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT_S,
            check=False,
        )

    def test_run_ends_well(self, model: Path, tmp_path: Path) -> None:
        """Every rank runs the program; the exit status is 0; the run folder holds the recipe, the metrics of each step
        once (rank 0 observes) and the checkpoint."""
        done = self.run(tmp_path, path=model, algorithm={"steps": 1})
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        folder = tmp_path / "run"
        assert (folder / "recipe.yaml").is_file()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows] == [1]
        assert list((folder / "checkpoints").glob("step_*"))

    def test_failure_is_an_exit_status_and_a_message(self, model: Path, tmp_path: Path) -> None:
        """A rank that fails ends the run: another status than 0, the error on stderr, and nobody waits forever."""
        done = self.run(tmp_path, path=tmp_path / "nowhere")
        assert done.returncode != 0
        assert "nowhere" in done.stderr, f"{done.stdout}\n{done.stderr}"

    def test_other_programs_run_too(self, model: Path, tmp_path: Path) -> None:
        """`launch` runs the worker that it is given: `mmrl verify` has one of its own. It too runs on every rank."""
        record = tmp_path / "record"
        command = ["verify" if word == "train" else word for word in self.command]
        done = self.run(tmp_path, command, ["--record", str(record), "--synthetic-advantages"], path=model)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert json.loads((record / "record.json").read_text(encoding="utf-8"))["world"] == self.ranks
