"""What each rank of the denoising comparison runs: `python -m denoising_ranks FOLDER`.

The same work with `fsdp2` and with `megatron`; rank 0 writes both backends' numbers to FOLDER/seen.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core.contracts import GenerationRequest, Minibatch, Prompt, TrainingBackend
from mmrl_core.grpo.collect import seed_of
from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder
from mmrl_core.rows import select_rows
from mmrl_core.testing.denoising import RatioLoss, check_minibatch
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.tiny import tiny_recipe

PROMPTS = ("the digit 3", "the digit 7", "the digit 1")
GROUP = 2


def pipeline(folder: Path) -> Path:
    """Write a tiny transformer for digits."""
    torch.manual_seed(0)
    config = DitConfig(sample_size=8, width=32, depth=2, heads=2, classes=[str(d) for d in range(10)])
    network = ClassConditionalDiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_folder(folder, network, shift=3.0)
    return folder


def recipe(model: Path, run: Path, /, **sections: Any) -> dict[str, Any]:
    """Five denoising steps on it."""
    made = tiny_recipe(
        model,
        run,
        **{"model": {"policy": {"name": "flow"}}, "rollout": {"name": "flow"}, **sections},
        rewards=[{"name": "brightness", "run": "inline"}],
        optimizer={"lr": 1e-3, "eps": 1e-6, "clip_grad": 1.0, "weight_decay": 0.1},
    )
    made["sampling"] = {"steps": 5, "height": 8, "width": 8}
    return made


def requests() -> list[GenerationRequest]:
    """One a prompt, seeds as in a run."""
    return [
        GenerationRequest(
            prompt=Prompt(index=group, text=text, origin=f"prompt {group}"),
            group_id=group,
            sample_ids=tuple(range(group * GROUP, (group + 1) * GROUP)),
            seeds=tuple(seed_of(0, 1, i) for i in range(group * GROUP, (group + 1) * GROUP)),
            group_seed=seed_of(0, 1, -2 - group),
        )
        for group, text in enumerate(PROMPTS)
    ]


def own(minibatch: Minibatch, backend: TrainingBackend) -> Minibatch:
    """This replica's groups: all but the last, or the last."""
    replica = backend.replica
    split = len(PROMPTS) - (replica.count - 1)
    groups = range(split) if replica.index == 0 else [split + replica.index - 1]
    rows = [row for group in groups for row in range(group * GROUP, (group + 1) * GROUP)]
    part = minibatch.reference
    return Minibatch(
        rollouts=select_rows(minibatch.rollouts, rows),
        advantages=minibatch.advantages[rows],
        weight=minibatch.weight[rows],
        metric_weight=minibatch.metric_weight[rows],
        reference=None if part is None else {name: [values[row] for row in rows] for name, values in part.items()},
    )


def collected(stream: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for bucket in stream for name, tensor in bucket}


def look(options: Mapping[str, Any], rank: Rank, model: Path, folder: Path) -> dict[str, Any]:
    """Gradients, weights after two updates and after a resumed third."""
    dtype = options.pop("dtype", "float32")
    sections = {"backend": options, "model": {"policy": {"name": "flow"}, "dtype": dtype}}
    cast = rank.cast(recipe(model, folder / "run", **sections))
    backend = cast.backend(reference=True)
    rollouts = cast.engine(backend).generate(requests(), cast.policy.sampling)
    whole = check_minibatch(rollouts)
    whole.reference = backend.reference(rollouts)
    minibatch = own(whole, backend)
    seen: dict[str, Any] = {
        "start": collected(backend.export_weights()),
        "log_probs": backend.replay(rollouts).log_probs,
        "gradients": collected(backend.gradients(minibatch, RatioLoss())),
    }
    seen["metrics"] = [backend.update(minibatch, RatioLoss()) for _ in range(2)]
    seen["weights"] = collected(backend.export_weights())
    saved = folder / f"saved-{options['name']}-{dtype}"
    backend.save(saved, optimizer=True)
    rank.world.barrier()
    backend.update(minibatch, RatioLoss())
    seen["third"] = collected(backend.export_weights())
    other = {**options, "distributed_optimizer": False} if options["name"] == "megatron" else options
    resumed = rank.cast(recipe(model, folder / "run", **{**sections, "backend": other})).backend()
    resumed.load(saved, optimizer=True)
    resumed.update(minibatch, RatioLoss())
    seen["resumed"] = collected(resumed.export_weights())
    return seen


def main(folder: Path) -> None:
    """Both backends, one after the other."""
    with Rank.join("cpu", folder) as rank:
        seen = {
            "fsdp2": look({"name": "fsdp2"}, rank, folder / "model", folder),
            "megatron": look({"name": "megatron"}, rank, folder / "model", folder),
            "bf16": look({"name": "megatron", "dtype": "bfloat16"}, rank, folder / "model", folder),
        }
        if rank.world.is_main:
            torch.save(seen, folder / "seen.pt")
        rank.world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
