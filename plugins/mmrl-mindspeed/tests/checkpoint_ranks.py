"""What each rank of the checkpoint tests runs: `python -m checkpoint_ranks FOLDER`.

FOLDER/plan.json lists scenes. In each a fresh backend loads, updates, saves and updates again, as the scene says, and
rank 0 writes what came out to FOLDER/NAME.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mmrl_core.contracts import Minibatch, TrainingBackend
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.texts import CheckLoss, check_minibatch, collected, share, text_rollouts

GROUPS = (3, 2, 4, 2)


def _share(minibatch: Minibatch, backend: TrainingBackend) -> Minibatch:
    replica = backend.replica
    return share(minibatch, range(replica.index, len(GROUPS), replica.count))


def _play(scene: dict[str, Any], rank: Rank, folder: Path) -> dict[str, Any]:
    cast = rank.cast(scene["recipe"])
    backend = cast.backend()
    rollouts = text_rollouts(cast.policy, GROUPS)
    if scene.get("load"):
        backend.load(folder / scene["load"], optimizer=scene.get("optimizer", True))
    seen: dict[str, Any] = {"loaded": collected(backend.export_weights())}
    minibatch = check_minibatch(rollouts)
    for _ in range(scene.get("updates", 0)):
        backend.update(_share(minibatch, backend), CheckLoss())
    if scene.get("save"):
        seen["saved"] = collected(backend.export_weights())
        backend.save(folder / scene["save"], optimizer=scene.get("optimizer", True))
        rank.world.barrier()
    for _ in range(scene.get("then", 0)):
        seen["metrics"] = backend.update(_share(minibatch, backend), CheckLoss())
    seen["weights"] = collected(backend.export_weights())
    seen["log_probs"] = backend.replay(rollouts).log_probs
    return seen


def main(folder: Path) -> None:
    """Play every scene on this rank."""
    with Rank.join("cpu", folder) as rank:
        for scene in json.loads((folder / "plan.json").read_text(encoding="utf-8")):
            try:
                seen = _play(scene, rank, folder)
            except Exception as error:
                if "error" not in scene:
                    raise
                seen = {"error": f"{type(error).__name__}: {error}"}
            if rank.world.is_main:
                torch.save(seen, folder / f"{scene['name']}.pt")
        rank.world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
