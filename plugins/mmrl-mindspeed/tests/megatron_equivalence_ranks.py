"""What each rank of the equivalence checks runs: `python -m megatron_equivalence_ranks FOLDER`.

FOLDER/cases.json: {model: {name of layout: options of the backend}}. For every model the ranks train with `fsdp2` and
then in each layout with `megatron`, and write how far apart they are to FOLDER/rankN.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, Rollouts, TrainingBackend
from mmrl_core.testing.backend_updates import poisoned
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import (
    CheckLoss,
    Weights,
    check_minibatch,
    collected,
    relative_difference,
    share,
    text_rollouts,
    unequal,
)
from mmrl_core.testing.tiny import tiny_recipe

GROUPS = (3, 2, 4, 1, 3)
ROLLOUTS = 5
"""Of two updates each."""


@dataclass(kw_only=True)
class Course:
    """What one backend computed, whole, on every rank."""

    log_probs: Tensor
    gradients: Weights
    row_gradients: Weights
    """Of a loss over whole rows."""
    norm: float
    probes: list[Tensor] = field(default_factory=list)
    """Log-probs of the probe rows after each update."""
    changes: list[Weights] = field(default_factory=list)
    """Weights then, less those at the start."""
    facts: dict[str, Any] = field(default_factory=dict)


def own_share(minibatch: Minibatch, backend: TrainingBackend, groups: range) -> Minibatch:
    """This replica's groups, dealt out in turns."""
    replica = backend.replica
    return share(minibatch, [g for g in groups if g % replica.count == replica.index])


def whole(values: Tensor, rollouts: Rollouts, rank: Rank, rows: int) -> Tensor:
    """[rows, T] out of every replica's rows."""
    result = torch.zeros(rows, values.shape[1])
    for ids, part in rank.world.gather((rollouts.sample_id, values)):
        result[ids] = part
    return result


def run(cast: Cast, rank: Rank) -> Course:
    backend = cast.backend()
    rollouts = text_rollouts(cast.policy, GROUPS)
    near = torch.where(rollouts.mask, -5.0, 0.0)
    own = own_share(check_minibatch(rollouts, near), backend, range(len(GROUPS)))
    stats = backend.replay(own.rollouts)
    start = collected(backend.export_weights())
    course = Course(
        log_probs=whole(stats.log_probs, own.rollouts, rank, len(rollouts)),
        gradients=collected(backend.gradients(own, CheckLoss())),
        row_gradients=collected(backend.gradients(own, CheckLoss("sequence"))),
        norm=0.0,
    )
    bad = poisoned(own) if backend.replica.index == backend.replica.count - 1 else own
    skipped = backend.update(bad, CheckLoss())["actor/skipped_updates"]
    course.facts["guarded"] = skipped == 1.0 and not unequal(collected(backend.export_weights()), start)
    metrics = []
    for step in range(ROLLOUTS):
        minibatch = check_minibatch(text_rollouts(cast.policy, GROUPS, seed=step + 1), seed=step)
        for half in (range(2), range(2, len(GROUPS))):
            metrics.append(backend.update(own_share(minibatch, backend, half), CheckLoss()))
            course.probes.append(whole(backend.replay(own.rollouts).log_probs, own.rollouts, rank, len(rollouts)))
            now = collected(backend.export_weights())
            course.changes.append({name: tensor - start[name] for name, tensor in now.items()})
    course.norm = metrics[0]["grad_norm"]
    course.facts["agreed"] = len({json.dumps(m) for m in rank.world.gather(metrics)}) == 1
    return course


def distances(course: Course, reference: Course) -> dict[str, Any]:
    """The largest differences between two courses."""
    one_by_one = [
        (relative_difference({name: ours[name]}, {name: theirs[name]}), name)
        for ours, theirs in ((course.gradients, reference.gradients), (course.row_gradients, reference.row_gradients))
        for name in theirs
    ]
    return {
        **course.facts,
        "log_probs": float((course.log_probs - reference.log_probs).abs().max()),
        "gradient": max(one_by_one),
        "norm": abs(course.norm / reference.norm - 1),
        "probes": max(float((a - b).abs().max()) for a, b in zip(course.probes, reference.probes, strict=True)),
        "changes": max(relative_difference(a, b) for a, b in zip(course.changes, reference.changes, strict=True)),
        "moved": float((reference.probes[-1] - reference.log_probs).abs().max()),
    }


def main(folder: Path) -> None:
    """Run every case on this rank."""
    cases = json.loads((folder / "cases.json").read_text())
    seen: dict[str, Any] = {}
    with Rank.join("cpu", folder) as rank:
        for model, layouts in cases.items():

            def cast(backend: dict[str, Any], model: str = model) -> Cast:
                return rank.cast(
                    tiny_recipe(
                        folder / model,
                        folder / "run",
                        backend=backend,
                        sampling={"temperature": 0.8, "max_new_tokens": 9},
                        # eps: where a gradient is nothing but rounding, Adam would make a whole step of it
                        optimizer={"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "warmup_updates": 2},
                    )
                )

            reference = run(cast({"name": "fsdp2"}), rank)
            seen[model] = {
                name: distances(run(cast({"name": "megatron", **options}), rank), reference)
                for name, options in layouts.items()
            }
        (folder / f"rank{rank.world.rank}.json").write_text(json.dumps(seen))
        rank.world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
