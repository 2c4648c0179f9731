"""What one combination is asked to record, and the folder that takes it. Imports no torch.

A record is a folder: `verify.json` (the job), `recipe.yaml`, `batch/` (the rollouts, unless those of another record
were used), `numbers.safetensors` (log-probs and the like), `start/`, `gradients/` and `change-0001/`, ... (weights as
safetensors, fp32), and, once complete, `record.json`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmrl_core.errors import VerifyError

JOB, FACTS, BATCH, NUMBERS = "verify.json", "record.json", "batch", "numbers.safetensors"
START, GRADIENTS = "start", "gradients"
STEM = "weights"
FORMAT = 2
"""Grows when records written before can no longer be compared."""

UPDATES_PER_STEP = 2
"""The second update of a step sees ratios that are not 1, and an optimizer that has a past."""


def change_folder(step: int) -> str:
    """Name of the folder with what `step` steps (counted from 1) changed in the weights."""
    return f"change-{step:04d}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to record. Values are plain, so that it can be written beside the recipe for the ranks to read."""

    prompts: int
    """Groups in the batch that is generated."""
    steps: int
    """Steps of UPDATES_PER_STEP updates each on the batch."""
    rollouts: str | None
    """Folder of an earlier record whose batch is used, or None: generate one."""
    synthetic_advantages: bool
    """Fixed numbers instead of the recipe's rewards."""

    def prepare(self, folder: Path) -> None:
        """Make `folder` an empty record that holds only this job. Raises VerifyError.

        An earlier record is replaced; a folder that holds anything else is left alone.
        """
        try:
            if folder.exists() and not folder.is_dir():
                raise VerifyError(f"{folder}: is not a folder. Name another one")
            if folder.is_dir():
                if any(folder.iterdir()) and not (folder / JOB).is_file():
                    raise VerifyError(f"{folder}: is not empty, and no record of `mmrl verify`. Name another folder")
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            (folder / JOB).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise VerifyError(f"{folder}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job that `prepare` left."""
        return cls(**json.loads((folder / JOB).read_text(encoding="utf-8")))


def read_facts(folder: Path) -> dict[str, Any]:
    """`record.json` of a complete record. Raises VerifyError."""
    path = folder / FACTS
    if not path.is_file():
        why = "was not finished" if (folder / JOB).is_file() else "is no record of `mmrl verify`"
        raise VerifyError(f"{folder}: {why} (there is no {FACTS}). Make one: mmrl verify RECIPE --record {folder}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VerifyError(f"{path}: cannot be read: {error}. Record it again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise VerifyError(f"{path}: written by another version of mmrl. Record it again with this one")
    return facts
