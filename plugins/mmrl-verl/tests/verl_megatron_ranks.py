"""What each rank of the checks of verl's Megatron engine on CPUs runs: `python -m verl_megatron_ranks FOLDER`.

FOLDER/case.json: the backend's options. The ranks compare `verl-megatron` with transformers, with its autograd, and
with a course of updates of `fsdp2`, and write what they saw to FOLDER/rankN.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import megatron_without_cuda
import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, TrainingBackend
from mmrl_core.testing.backend_updates import poisoned
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import (
    CheckLoss,
    Weights,
    check_minibatch,
    collected,
    plain_model,
    plain_stats,
    relative_difference,
    share,
    text_rollouts,
    unequal,
)
from mmrl_core.testing.tiny import tiny_recipe

GROUPS = (3, 2, 4, 1)
TEMPERATURE = 0.8
UPDATES = 4


def own(minibatch: Minibatch, backend: TrainingBackend) -> Minibatch:
    """This replica's groups, dealt out in turns."""
    replica = backend.replica
    return share(minibatch, [g for g in range(len(GROUPS)) if g % replica.count == replica.index])


def minibatches(cast: Cast) -> list[Minibatch]:
    """One for each update."""
    return [check_minibatch(text_rollouts(cast.policy, GROUPS, seed=n), seed=n) for n in range(UPDATES)]


def course(backend: TrainingBackend, cast: Cast) -> tuple[Weights, dict[str, float]]:
    """(What `UPDATES` updates with one that must be skipped among them did to the weights, the last's metrics.)"""
    start = {name: tensor.clone() for name, tensor in collected(backend.export_weights()).items()}
    metrics: dict[str, float] = {}
    for number, minibatch in enumerate(minibatches(cast)):
        if number == 2:
            before = collected(backend.export_weights())
            bad = own(minibatch, backend)
            # on one replica alone; all skip
            skipped = backend.update(poisoned(bad) if backend.replica.index == 0 else bad, CheckLoss())
            assert skipped["actor/skipped_updates"] == 1.0
            assert not unequal(collected(backend.export_weights()), before), "a NaN was not kept out"
        metrics = backend.update(own(minibatch, backend), CheckLoss())
    return {name: tensor - start[name] for name, tensor in collected(backend.export_weights()).items()}, metrics


def checkpoints(rank: Rank, cast: Cast, backend: TrainingBackend) -> dict[str, Any]:
    """Saved, loaded into a fresh backend, and gone on with; and loaded without the optimizer."""
    folder = rank.folder / "checkpoint"
    backend.save(folder, optimizer=True)
    saved = collected(backend.export_weights())
    loaded, first = cast.backend(), minibatches(cast)[1]
    loaded.update(own(first, loaded), CheckLoss())
    loaded.load(folder, optimizer=True)
    facts: dict[str, Any] = {"loaded": unequal(collected(loaded.export_weights()), saved)}
    minibatch = minibatches(cast)[0]
    for each in (backend, loaded):
        each.update(own(minibatch, each), CheckLoss())
    facts["resumed"] = unequal(collected(loaded.export_weights()), collected(backend.export_weights()))
    loaded.load(folder, optimizer=False)
    facts["weights alone"] = unequal(collected(loaded.export_weights()), saved)
    # its fp32 weights too: an update starts from them
    loaded.update(own(minibatch, loaded), CheckLoss())
    facts["next"] = relative_difference(collected(loaded.export_weights()), saved)
    return facts


def main(folder: Path) -> None:
    """Run the case on this rank."""
    case = json.loads((folder / "case.json").read_text())
    with Rank.join("cpu", folder) as rank:
        megatron_without_cuda.prepare()

        def cast(backend: dict[str, Any]) -> Cast:
            return rank.cast(
                tiny_recipe(
                    folder / "model",
                    folder / "run",
                    backend=backend,
                    sampling={"temperature": TEMPERATURE, "max_new_tokens": 9},
                    optimizer={"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "warmup_updates": 2, "clip_grad": 1.0},
                )
            )

        common = {"remove_padding": False, "transformer": megatron_without_cuda.TRANSFORMER}
        made = cast({"name": "verl-megatron", **common, **case["options"]})
        backend = made.backend(reference=True)
        rollouts = text_rollouts(made.policy, GROUPS)
        minibatch = check_minibatch(rollouts, torch.where(rollouts.mask, -5.0, 0.0))
        mine = own(minibatch, backend)
        plain = plain_model(folder / "model")
        with torch.no_grad():
            expected = plain_stats(plain, mine.rollouts, TEMPERATURE)
        stats = backend.replay(mine.rollouts)
        assert stats.entropy is not None
        assert expected.entropy is not None
        reference = torch.stack(list(backend.reference(mine.rollouts)["log_probs"]))
        exported = collected(backend.export_weights())
        stored: dict[str, Tensor] = dict(plain.named_parameters())
        seen: dict[str, Any] = {
            "log_probs": float((stats.log_probs - expected.log_probs).abs().max()),
            "entropy": float((stats.entropy - expected.entropy).abs().max()),
            "reference": float((reference - expected.log_probs).abs().max()),
            "names": sorted(exported) == sorted(stored),
            "exported": unequal(exported, {name: tensor.detach() for name, tensor in stored.items()}),
        }
        # everything differentiates its own groups; the reference all of them, on every rank
        fsdp2 = cast({"name": "fsdp2"})
        other = fsdp2.backend()
        theirs = collected(other.gradients(own(minibatch, other), CheckLoss()))
        ours = collected(backend.gradients(mine, CheckLoss()))
        seen["gradient"] = max(relative_difference({name: ours[name]}, {name: theirs[name]}) for name in theirs)
        seen["kept"] = unequal(collected(backend.export_weights()), exported)
        changes, metrics = course(backend, made)
        expected_changes, expected_metrics = course(other, fsdp2)
        seen["changes"] = relative_difference(changes, expected_changes)
        seen["metrics"] = max(
            abs(metrics[n] - expected_metrics[n]) / (abs(expected_metrics[n]) + 1e-3) for n in metrics
        )
        seen["agreed"] = len({json.dumps(m) for m in rank.world.gather(metrics)}) == 1
        seen |= checkpoints(rank, made, backend)
        (folder / f"rank{rank.world.rank}.json").write_text(json.dumps(seen))
        rank.world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
