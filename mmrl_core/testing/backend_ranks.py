"""What each rank of the backend checks runs: `python -m mmrl_core.testing.backend_ranks RECIPE LORA_RECIPE FOLDER`.

All checks across ranks in one process group; every rank writes what it saw to FOLDER/rankN.pt, and the test compares.
LORA_RECIPE is `-` for a backend without adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl_core.contracts import Minibatch, TrainingBackend
from mmrl_core.errors import BackendError
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.backend_stage import GROUPS
from mmrl_core.testing.backend_updates import poisoned
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import CheckLoss, check_minibatch, collected, share, text_rollouts


def uneven_groups(groups: int, replica: int, count: int) -> list[int]:
    """Replica 0 has all groups but one for each other replica."""
    first = groups - (count - 1)
    return list(range(first)) if replica == 0 else [first + replica - 1]


def main(arguments: Sequence[str]) -> None:
    """Run every check on this rank."""
    recipe_path, lora_path, folder = (Path(argument) for argument in arguments)
    recipe, _ = load_recipe(recipe_path)
    near = torch.load(folder / "near.pt", weights_only=True)
    with Rank.join(recipe.device.name, folder) as rank:
        seen = _look(rank.cast_file(recipe_path), near, folder, rank)
        if str(lora_path) != "-":
            seen["lora"] = _look_at_adapters(rank.cast_file(lora_path), near)
        torch.save(seen, folder / f"rank{rank.world.rank}.pt")
        rank.world.barrier()


def _shares(cast: Cast, backend: TrainingBackend, near: torch.Tensor) -> tuple[Minibatch, Minibatch]:
    """(uneven share, everything or nothing) of this rank's replica."""
    whole = check_minibatch(text_rollouts(cast.policy, GROUPS), near)
    replica = backend.replica
    uneven = share(whole, uneven_groups(len(GROUPS), replica.index, replica.count))
    return uneven, share(whole, range(len(GROUPS)) if replica.index == 0 else [])


def _look(cast: Cast, near: torch.Tensor, folder: Path, rank: Rank) -> dict[str, Any]:
    backend = cast.backend(reference=True)
    uneven, lopsided = _shares(cast, backend, near)
    replica, loss = backend.replica, CheckLoss()
    seen: dict[str, Any] = {
        "replica": [replica.index, replica.count, int(replica.is_root)],
        "rows": uneven.rollouts.sample_id,
        "replay": backend.replay(uneven.rollouts).log_probs,
        "lopsided_rows": lopsided.rollouts.sample_id,
        "lopsided_replay": backend.replay(lopsided.rollouts).log_probs,
        "gradients": collected(backend.gradients(uneven, loss)),
        "lopsided_gradients": collected(backend.gradients(lopsided, loss)),
        "loaded": collected(backend.export_weights()),
    }
    record = backend.reference(uneven.rollouts)
    seen["reference"] = record.get("log_probs", [])
    if backend.shares_module:
        with torch.no_grad(), backend.inference_module() as module:
            for _ in range(1 + 2 * rank.world.rank):  # a collective in here would hang: ranks differ in their forwards
                live = cast.policy.replay(module, uneven.rollouts).log_probs.cpu()
        seen["live"] = live
    bad = poisoned(uneven) if replica.index == replica.count - 1 else uneven
    seen["poisoned_metrics"] = backend.update(bad, loss)
    seen["poisoned"] = collected(backend.export_weights())
    seen["metrics"] = backend.update(uneven, loss)
    seen["updated"] = collected(backend.export_weights())
    backend.save(folder / "saved", optimizer=True)
    rank.world.barrier()
    seen["next_metrics"] = backend.update(lopsided, loss)
    seen["next"] = collected(backend.export_weights())
    resumed = cast.backend()
    resumed.load(folder / "saved", optimizer=True)
    resumed.update(lopsided, loss)
    seen["resumed"] = collected(resumed.export_weights())
    seen["stopped"] = 0
    try:
        for _ in range(10):
            resumed.update(bad, loss)
            seen["stopped"] += 1
    except BackendError:
        seen["stopped"] += 1
    return seen


def _look_at_adapters(cast: Cast, near: torch.Tensor) -> dict[str, Any]:
    backend = cast.backend(reference=True)
    uneven, _ = _shares(cast, backend, near)
    for _ in range(2):
        backend.update(uneven, CheckLoss())
    return {
        "adapters": collected(backend.export_weights("adapter")),
        "merged": collected(backend.export_weights()),
        "reference": backend.reference(uneven.rollouts).get("log_probs", []),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
