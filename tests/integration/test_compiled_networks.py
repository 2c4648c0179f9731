"""`backend.compile`: compiled blocks train the same network under the same names, and nothing falls back in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch import Tensor, nn

from mmrl_core.backends import compiled
from mmrl_core.contracts import Rollouts, TrainingBackend
from mmrl_core.errors import BackendError
from mmrl_core.metrics.names import reproducible
from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder
from mmrl_core.testing.denoising import Easel, RatioLoss, check_minibatch, gradient, relative
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.tiny import tiny_recipe, write_recipe_file

PROMPTS = ("the digit 3", "the digit 7")
EAGER: Mapping[str, Any] = {}
COMPILED: Mapping[str, Any] = {"backend": {"compile": "blocks"}}
NETWORK: Mapping[str, Any] = {"backend": {"compile": "network"}}
ADAPTERS: Mapping[str, Any] = {
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "backend": {"activation_checkpointing": True},
}


def recipe(model: Path, folder: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Every forward has the same four rows: two compilations, one of them with its backward."""
    values = tiny_recipe(
        model,
        folder / "run",
        model={"policy": {"name": "flow", "share_start": False}},
        backend={"name": "fsdp2", "micro_batch_groups": 2},
        rollout={"name": "flow"},
        data={"name": "digits"},
        sampling={},
        rewards=[{"name": "brightness", "run": "inline"}],
        algorithm={"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "old_log_probs": "recompute"},
    )
    values["sampling"] = {"steps": 4, "height": 4, "width": 4}
    for change in changes:
        for section, fields in change.items():
            values[section] = {**values[section], **fields}
    return values


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled code goes with the test's files."""
    folder = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # what the processor says it has is not tried first: seconds
        patch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compiled") / "model"
    network = ClassConditionalDiT(
        DitConfig(sample_size=4, width=16, depth=3, heads=2, classes=[str(digit) for digit in range(10)])
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_folder(folder, network, shift=3.0)
    return folder


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory, compiler_cache: Path) -> Iterator[Rank]:
    with Rank.join("cpu", tmp_path_factory.mktemp("rank")) as joined:
        yield joined


@dataclass(kw_only=True)
class Seen:
    """What a backend did with one batch, its weights after two updates, and the backend."""

    rollouts: Rollouts
    replayed: Tensor
    differentiated: Tensor
    """Log-probs of forwards that can be differentiated."""
    gradient: dict[str, Tensor]
    norms: list[float]
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    reference: list[Tensor]
    backend: TrainingBackend


def look(rank: Rank, model: Path, *changes: Mapping[str, Any], batch: Rollouts | None = None) -> Seen:
    """Sample, replay, differentiate and update twice. `batch`: rollouts to train on instead of its own."""
    cast = rank.cast(recipe(model, rank.folder, *changes))
    backend = cast.backend(reference=cast.recipe.model.lora is not None)
    engine = cast.engine(backend)
    easel = Easel(rank=rank, folder=rank.folder, cast=cast, backend=backend, engine=engine, recipe={})
    rollouts = engine.generate(easel.requests(PROMPTS, 2), cast.policy.sampling)
    trained = batch or rollouts
    minibatch = check_minibatch(trained)
    replayed = backend.replay(trained).log_probs
    with backend.inference_module() as module:
        slices = cast.policy.action_slices(trained.mask.shape[1])
        parts = [cast.policy.replay(module, trained, actions=part).log_probs.detach() for part in slices]
    return Seen(
        rollouts=rollouts,
        replayed=replayed,
        differentiated=torch.cat(parts, dim=1),
        gradient=gradient(backend, minibatch),
        norms=[backend.update(minibatch, RatioLoss())["grad_norm"] for _ in range(2)],
        weights=stream(backend),
        adapters=stream(backend, "adapter"),
        reference=backend.reference(trained)["means"] if cast.recipe.model.lora is not None else [],
        backend=backend,
    )


def stream(backend: TrainingBackend, form: Any = "merged") -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in backend.export_weights(form) for name, tensor in bucket}


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("changes", "how", "graphs"),
    [(ADAPTERS, COMPILED, 3), (EAGER, NETWORK, 3)],
    ids=["blocks with adapters and activation checkpointing", "network"],
)
def test_the_numbers_are_those_of_the_plain_network(
    rank: Rank, model: Path, changes: Mapping[str, Any], how: Mapping[str, Any], graphs: int
) -> None:
    """`graphs`: three blocks are one. With gradient, without, as reference; the network's time has a stride of 0 when
    sampling."""
    plain = look(rank, model, changes)
    before = compilations()
    ours = look(rank, model, changes, how, batch=plain.rollouts)
    assert compilations() - before == graphs
    for name in ("states", "steps"):
        mine, theirs = torch.stack(ours.rollouts.payload[name]), torch.stack(plain.rollouts.payload[name])
        assert torch.allclose(mine, theirs, atol=1e-5), name
    assert (ours.rollouts.behaviour_log_probs - plain.rollouts.behaviour_log_probs).abs().max() <= 2e-5
    assert (ours.replayed - plain.replayed).abs().max() <= 2e-5
    assert torch.equal(ours.differentiated, ours.replayed), "a first ratio that is not 1"
    assert list(ours.gradient) == list(plain.gradient)
    assert relative(ours.gradient, plain.gradient) <= 1e-5
    assert ours.norms == pytest.approx(plain.norms, rel=1e-4)
    for form in ("weights", "adapters"):
        mine, theirs = getattr(ours, form), getattr(plain, form)
        assert list(mine) == list(theirs), "other names of weights"
        assert all(torch.allclose(mine[name], theirs[name], atol=2e-4) for name in mine)
    assert bool(ours.adapters) == bool(ours.reference) == bool(changes)
    for mine, theirs in zip(ours.reference, plain.reference, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), "the reference is the network without its adapters"


def test_a_loaded_backend_goes_on_bit_for_bit(rank: Rank, model: Path, tmp_path: Path) -> None:
    first = look(rank, model, NETWORK)
    minibatch = check_minibatch(first.rollouts)
    first.backend.save(tmp_path / "saved", optimizer=True)
    first.backend.update(minibatch, RatioLoss())
    second = rank.cast(recipe(model, rank.folder, NETWORK)).backend()
    second.load(tmp_path / "saved", optimizer=True)
    second.update(minibatch, RatioLoss())
    ours, theirs = stream(second), stream(first.backend)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = rank.cast(recipe(model, rank.folder)).backend()
    plain.load(tmp_path / "saved", optimizer=True)  # a checkpoint does not say whether its run was compiled
    assert set(stream(plain)) == set(theirs)


def train(folder: Path, model: Path, run: str, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Metrics and exported weights of a run on two ranks in bf16, where blocks are sharded and hooks gather them."""
    sections = {"model": {"dtype": "bfloat16"}, "checkpoint": {"export": True, "every": 1}}
    values = recipe(model, folder, sections, {"backend": {"micro_batch_groups": 1}})
    file = write_recipe_file(folder / "recipe.yaml", values)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
    command = [sys.executable, "-m", "mmrl_core.cli.main", "train", str(file), f"run_dir={run}"]
    done = subprocess.run(
        [*command, "launcher={name: local, processes: 2}", *overrides],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (folder / run / "export" / "transformer").glob("*.safetensors")
    return [reproducible(row) for row in rows], load_file(weights)


def test_two_ranks_train_resume_and_export(model: Path, tmp_path: Path, compiler_cache: Path) -> None:
    whole, weights = train(tmp_path, model, "whole", "backend.compile=blocks")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step_00000002")
    shutil.rmtree(tmp_path / "halves" / "export")
    halves, again = train(tmp_path, model, "halves", "backend.compile=blocks")
    assert halves == whole
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    plain, theirs = train(tmp_path, model, "plain")
    assert len(whole) == len(plain) == 2
    for ours, other in zip(whole, plain, strict=True):
        assert ours["actor/ppo_kl"] == 0.0, "forwards with and without gradient round differently"
        assert ours["grpo/score/mean"] == pytest.approx(other["grpo/score/mean"], abs=0.02)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert list(theirs) == list(weights)
    assert all(torch.allclose(weights[name].float(), theirs[name].float(), atol=0.02) for name in theirs)
    assert any(compiler_cache.iterdir()), "compiled code goes where TORCHINDUCTOR_CACHE_DIR says"


# ------------------------------------------------------------------------------------------------------------- refusals


class Broken(nn.Module):
    """Not one graph."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.sin()


def test_what_cannot_be_compiled_is_an_error() -> None:
    block = Broken()
    compiled.compile_units([block])
    with pytest.raises(BackendError, match=r"Broken.forward cannot be compiled"):
        block(torch.ones(3))


def test_too_many_shapes_are_an_error(monkeypatch: pytest.MonkeyPatch, compiler_cache: Path) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 1)
    block = nn.Softsign()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled.compile_units([block])
        block(torch.ones(3))
        with pytest.raises(BackendError, match=r"1 different shapes.*micro_batch_samples"):
            block(torch.ones(4))


def test_text_is_refused(rank: Rank, tmp_path: Path, tiny_model: Path) -> None:
    cast = rank.cast(tiny_recipe(tiny_model, tmp_path / "run", backend={"name": "fsdp2", "compile": "blocks"}))
    with pytest.raises(BackendError, match=r"the policy causal_lm .* backend.compile: none"):
        cast.backend()


def test_without_a_compiler_it_is_refused(rank: Rank, model: Path) -> None:
    policy = rank.cast(recipe(model, rank.folder, COMPILED)).policy
    refused = pytest.raises(BackendError, match=r"no C\+\+ compiler.*apt install g\+\+")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), refused:
        compiled.refuse_unless_compilable(policy, torch.device("cpu"))
    compiled.refuse_unless_compilable(policy, torch.device("cpu"))


def test_without_the_headers_of_python_it_is_refused(
    rank: Rank, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = rank.cast(recipe(model, rank.folder, COMPILED)).policy
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BackendError, match=r"Python.h is missing.*python3-dev"):
        compiled.refuse_unless_compilable(policy, torch.device("cpu"))


def test_devices_that_the_compiler_does_not_know_are_refused(rank: Rank, model: Path) -> None:
    policy = rank.cast(recipe(model, rank.folder, COMPILED)).policy
    with pytest.raises(BackendError, match=r"knows no device meta"):
        compiled.refuse_unless_compilable(policy, torch.device("meta"))


@pytest.mark.parametrize("changes", [{"model": {"dtype": "bfloat16"}}, {"backend": {"activation_checkpointing": True}}])
def test_a_whole_network_has_no_hooks_between_its_blocks(rank: Rank, model: Path, changes: Mapping[str, Any]) -> None:
    cast = rank.cast(recipe(model, rank.folder, NETWORK, changes))
    with pytest.raises(BackendError, match=r"compile: network needs one rank.* Use backend.compile: blocks"):
        cast.backend()


@pytest.mark.parametrize("setting", ["suppress_errors", "disable"])
def test_a_torch_that_would_not_compile_is_refused(rank: Rank, model: Path, setting: str) -> None:
    policy = rank.cast(recipe(model, rank.folder, COMPILED)).policy
    with torch._dynamo.config.patch({setting: True}), pytest.raises(BackendError, match=setting):
        compiled.refuse_unless_compilable(policy, torch.device("cpu"))
