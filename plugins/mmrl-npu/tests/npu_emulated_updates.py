"""Run by `test_npu_emulated.py` in a process that has the emulated device.

One update of a language model, of a small DiT and of FLUX, of the same samples: on the CPU, on the device without
patches, and on it with all of them. Prints one JSON object: how far each is from the CPU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from emulated_runs import tiny_dit, tiny_flux, tiny_text
from mmrl_npu.device import NpuDevice
from mmrl_npu.options import NpuOptions
from mmrl_npu.patches import NAMES
from torch import Tensor
from torch_npu.fused import CALLS

from mmrl_core.contracts import DeviceOps, GenerationRequest, Rollouts
from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.grpo.collect import seed_of
from mmrl_core.grpo.losses import build_loss
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.testing.denoising import check_minibatch
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import collected, relative_difference

Numbers = dict[str, Tensor]


@contextmanager
def ranked(device: DeviceOps, folder: Path) -> Iterator[Rank]:
    """This process as the only rank of a run on `device`."""
    world = connect(device)
    try:
        yield Rank(world=world, device=device, folder=folder)
    finally:
        disconnect()
        if isinstance(device, NpuDevice) and device.patches is not None:
            device.patches.revert()


def requests(cast: Cast) -> list[GenerationRequest]:
    """The first two prompts of the recipe, four samples each, with the seeds of a run."""
    source = components.create_source(cast.selection.data, cast.recipe.seed)
    return [
        GenerationRequest(
            prompt=source.prompt(group),
            group_id=group,
            sample_ids=tuple(range(4 * group, 4 * group + 4)),
            seeds=tuple(seed_of(0, 1, 4 * group + i) for i in range(4)),
            group_seed=seed_of(0, 1, -2 - group),
        )
        for group in range(2)
    ]


def one_update(
    device: DeviceOps, folder: Path, recipe: Mapping[str, Any], rollouts: Rollouts | None
) -> tuple[Rollouts, dict[str, Numbers]]:
    """The samples, those given or new ones, and what comes of them."""
    with ranked(device, folder) as rank:
        cast = rank.cast(recipe)
        backend = cast.backend()
        start = collected(backend.export_weights())
        engine = cast.engine(backend)
        sampled = engine.generate(requests(cast), cast.policy.sampling)
        rollouts = rollouts or sampled
        minibatch = check_minibatch(rollouts)
        loss = build_loss(cast.recipe.algorithm)
        log_probs = backend.replay(rollouts).log_probs
        gradients = collected(backend.gradients(minibatch, loss))
        metrics = backend.update(minibatch, loss)
        weights = collected(backend.export_weights())
        engine.close()
    return rollouts, {
        "sampled": {"log-probs": sampled.behaviour_log_probs},
        "log-probs": {"log-probs": log_probs},
        "loss": {"loss": torch.tensor(metrics["loss"]), "norm": torch.tensor(metrics["grad_norm"])},
        "gradients": gradients,
        "weights": weights,
        "change": {name: weights[name] - start[name] for name in weights},
    }


def main(folder: Path) -> None:
    """Every model, every way."""
    results: dict[str, Any] = {}
    for name, make in (("text", tiny_text), ("dit", tiny_dit), ("flux", tiny_flux)):
        recipe = make(folder / name)
        rollouts, expected = one_update(CpuDevice(), folder, recipe, None)
        for way, patches in (("unpatched", False), ("patched", dict.fromkeys(NAMES, True))):
            CALLS.clear()
            device = NpuDevice(NpuOptions(patches=patches))
            _, found = one_update(device, folder, {**recipe, "device": "npu"}, rollouts)
            results[f"{name} {way}"] = {
                **{kind: relative_difference(found[kind], expected[kind]) for kind in expected},
                "operators": dict(CALLS),
            }
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
