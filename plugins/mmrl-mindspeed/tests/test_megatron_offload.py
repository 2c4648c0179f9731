"""Putting memory away and bringing it back: views of one buffer, as Megatron's parameters are, stay views of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from denoising_ranks import collected, pipeline, recipe, requests
from mmrl_mindspeed.offload import Offloaded

from mmrl_core.testing.denoising import RatioLoss, check_minibatch
from mmrl_core.testing.stage import Rank


def test_views_share_memory_again() -> None:
    buffer, grads, lone = torch.arange(6.0), torch.ones(6), torch.arange(3.0)
    views, gradient = [buffer[:2].view(1, 2), buffer[2:]], grads[1:4]
    away = Offloaded()
    away.put_away(keep=[*views, buffer, lone], drop=[gradient])
    assert [t.untyped_storage().nbytes() for t in (buffer, grads, lone, *views)] == [0] * 5
    away.bring_back()
    away.bring_back()  # twice is once
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]
    assert lone.tolist() == [0, 1, 2]
    assert grads.tolist() == [0.0] * 6
    buffer.fill_(9)
    assert all(bool(view.eq(9).all()) for view in views)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, distributed: bool, dtype: str) -> None:
    """On a CPU the host is the device, so nothing is gained here, and everything else is as elsewhere."""
    model = pipeline(tmp_path / "model")
    sections: dict[str, Any] = {
        "backend": {"name": "megatron", "offload": True, "distributed_optimizer": distributed},
        "model": {"policy": {"name": "flow"}, "dtype": dtype},
    }
    with Rank.join("cpu", tmp_path) as rank:
        cast = rank.cast(recipe(model, tmp_path / "run", **sections))
        results = []
        for offloads in (False, True):
            backend: Any = cast.backend(reference=True)
            minibatch = check_minibatch(cast.engine(backend).generate(requests(), cast.policy.sampling))
            minibatch.reference = backend.reference(minibatch.rollouts)
            backend.update(minibatch, RatioLoss())
            if offloads:
                away = Offloaded()
                held = list(backend.work.resident())
                away.put_away(keep=held, drop=backend.work.optimizer.gradient_buffers())
                assert not any(t.untyped_storage().nbytes() for t in held)
                moments = len(list(backend.work.optimizer.resident()))
                assert moments >= 3 * len(list(backend.work.module.parameters()))
                away.bring_back()
            backend.offload()  # nothing on a CPU
            backend.onload()
            metrics = backend.update(minibatch, RatioLoss())
            record = backend.reference(minibatch.rollouts)
            results.append((metrics, collected(backend.export_weights()), record))
    (one, before, first), (other, after, second) = results
    assert one == other
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(first["means"], second["means"], strict=True))
