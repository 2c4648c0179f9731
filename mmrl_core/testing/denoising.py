"""`DenoisingConformance`: what the core relies on in policy, engine and backend when actions are denoising steps.

The pipeline is a folder that the class names. Numbers that should be one are compared, and gradients of work that is
split in different ways. What the network computes is the family's business and compared with its own library elsewhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver

from mmrl_core.contracts import (
    ActionStats,
    GenerationRequest,
    LossBatch,
    LossOutput,
    Minibatch,
    Prompt,
    RolloutEngine,
    Rollouts,
    TrainingBackend,
)
from mmrl_core.grpo.collect import seed_of
from mmrl_core.rows import select_rows
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.tiny import tiny_recipe


class RatioLoss:
    """The plainest policy gradient, sum of -weight * advantage * exp(log p - sg(log p)), and the divergence."""

    scope: Any = "action"
    entropy_gradient = False

    def __call__(self, stats: ActionStats, batch: LossBatch) -> LossOutput:
        """See mmrl_core.contracts.Loss."""
        ratio = (stats.log_probs - stats.log_probs.detach()).exp()
        scale = 1.0 if stats.weight is None else stats.weight
        loss = -(batch.weight * batch.advantages[:, None] * ratio * scale).sum()
        if stats.kl is not None:
            loss = loss + 0.5 * (batch.weight * stats.kl).sum()
        return LossOutput(loss=loss)


@dataclass(kw_only=True)
class Easel:
    """One rank with the components of one recipe."""

    rank: Rank
    folder: Path
    cast: Cast
    backend: TrainingBackend
    engine: RolloutEngine
    recipe: Mapping[str, Any]

    def requests(self, prompts: tuple[str, ...], group_size: int) -> list[GenerationRequest]:
        """One request a prompt; ids and seeds as in a run."""
        made = []
        for group, text in enumerate(prompts):
            ids = tuple(range(group * group_size, (group + 1) * group_size))
            made.append(
                GenerationRequest(
                    prompt=Prompt(index=group, text=text, origin=f"check {group}"),
                    group_id=group,
                    sample_ids=ids,
                    seeds=tuple(seed_of(0, 1, i) for i in ids),
                    group_seed=seed_of(0, 1, -2 - group),
                )
            )
        return made

    def sampling(self, **changes: Any) -> Any:
        """The recipe's sampling section with changes."""
        return self.cast.policy.sampling.model_copy(update=changes)


def check_minibatch(rollouts: Rollouts, seed: int = 0) -> Minibatch:
    """All rows, with random advantages and the weights of a mean over actions."""
    advantages = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(seed))
    weight = rollouts.mask.float() / int(rollouts.mask.sum())
    return Minibatch(rollouts=rollouts, advantages=advantages, weight=weight, metric_weight=weight)


def gradient(backend: TrainingBackend, minibatch: Minibatch) -> dict[str, Tensor]:
    """By Hugging Face name."""
    return {n: g.cpu().clone() for bucket in backend.gradients(minibatch, RatioLoss()) for n, g in bucket}


def relative(ours: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative L2 distance over all tensors."""
    assert set(ours) == set(other)
    difference = sum(float((ours[n] - other[n]).double().square().sum()) for n in ours)
    total = sum(float(t.double().square().sum()) for t in other.values())
    return math.sqrt(difference / total)


class DenoisingConformance(ComponentConformance):
    """Subclass it as `Test...`, name the `component` (a policy) and override `pipeline`."""

    kind = "policy"
    sampling_section: ClassVar[Mapping[str, Any]]
    """The recipe's sampling section: sizes the pipeline can draw, few steps, noise above 0."""
    prompts: ClassVar[tuple[str, ...]]
    """Two prompts that the pipeline knows."""
    device: ClassVar[str] = "cpu"
    """The device to check on."""
    backend: ClassVar[Mapping[str, Any]] = {"name": "fsdp2"}
    """The training backend, with options."""
    engine: ClassVar[Mapping[str, Any]] = {"name": "flow"}
    """The rollout engine, with options."""
    log_prob_tolerance: ClassVar[float] = 1e-4
    """Largest difference between sampled and replayed log-probs, fp32."""
    gradient_tolerance: ClassVar[float] = 2e-5
    """Largest relative L2 difference between gradients of equal work split in different ways, fp32."""

    @classmethod
    def pipeline(cls, folder: Path) -> Path:
        """Write the model folder and return it."""
        raise NotImplementedError

    @classmethod
    def recipe(cls, model: Path, run_dir: Path, /, **changes: Any) -> dict[str, Any]:
        """A recipe of two quick steps."""
        recipe = tiny_recipe(
            model,
            run_dir,
            device=cls.device,
            model={"policy": {"name": cls.component, **cls.options}},
            backend=dict(cls.backend),
            rollout=dict(cls.engine),
            rewards=[{"name": "brightness", "run": "inline"}],
        )
        recipe["sampling"] = {**cls.sampling_section}
        for section, change in changes.items():
            merge = isinstance(change, Mapping) and isinstance(recipe.get(section), Mapping)
            recipe[section] = {**recipe[section], **change} if merge else change
        return recipe

    @pytest.fixture(scope="class")
    @classmethod
    def easel(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Easel]:
        """One connected rank with everything set up."""
        cls.require_available()
        folder = tmp_path_factory.mktemp("denoising")
        recipe = cls.recipe(cls.pipeline(folder / "model"), folder / "run")
        with Rank.join(cls.device, folder) as rank:
            cast = rank.cast(recipe)
            backend = cast.backend()
            engine = cast.engine(backend)
            try:
                yield Easel(rank=rank, folder=folder, cast=cast, backend=backend, engine=engine, recipe=recipe)
            finally:
                engine.close()

    def varied(self, easel: Easel, **changes: Any) -> tuple[Cast, TrainingBackend, RolloutEngine]:
        """Fresh components of a changed recipe on the same model."""
        cast = easel.rank.cast(self.recipe(Path(easel.recipe["model"]["path"]), easel.folder / "run", **changes))
        backend = cast.backend()
        return cast, backend, cast.engine(backend)

    def test_shapes_and_samples(self, easel: Easel) -> None:
        """[B, T] with T the policy's max_actions, groups adjacent, on the host; one decoded uint8 sample a row."""
        requests = easel.requests(self.prompts, 3)
        rollouts = easel.engine.generate(requests, easel.sampling())
        assert rollouts.mask.shape == rollouts.behaviour_log_probs.shape == (6, easel.cast.policy.max_actions)
        assert rollouts.group_id.tolist() == [0, 0, 0, 1, 1, 1]
        assert rollouts.sample_id.tolist() == list(range(6))
        assert rollouts.mask.all()
        assert all(value.device.type == "cpu" for values in rollouts.payload.values() for value in values)
        assert "final" not in rollouts.payload, "denoised latents are not needed once decoded"
        assert len(rollouts.samples) == 6
        section = easel.sampling()
        for sample, request in zip(rollouts.samples, (r for r in requests for _ in r.seeds), strict=True):
            picture = sample.image if section.frames == 1 else sample.video
            assert picture.dtype.name == "uint8"
            assert picture.shape[-3:] == (section.height, section.width, 3)
            assert sample.prompt is request.prompt
            assert sample.length == rollouts.mask.shape[1]

    def test_sampled_log_probs_equal_replay(self, easel: Easel) -> None:
        """With one update per rollout nothing else is computed: the ratio is 1 because both are one number."""
        rollouts = easel.engine.generate(easel.requests(self.prompts, 3), easel.sampling())
        replayed = easel.backend.replay(rollouts).log_probs
        assert (replayed - rollouts.behaviour_log_probs).abs().max().item() <= self.log_prob_tolerance
        assert torch.equal(replayed, easel.backend.replay(rollouts).log_probs), "the same pass, other numbers"

    @pytest.mark.parametrize(
        "changes",
        [
            {"kernel": "flow", "noise": 0.7},
            {"kernel": "cps", "noise": 0.7},
            {"log_prob": "guard"},
            {"quantise_time": True},
            {"schedule": "model"},
            {"same_initial_noise": False},
            {"trained_fraction": 0.5, "permute_steps": False},
            {"window": {"size": 2, "first": 0}},
            {"cfg_scale": 2.5},
        ],
        ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
    )
    def test_log_probs_agree_under_every_option(self, easel: Easel, changes: Mapping[str, Any]) -> None:
        """Replay uses the same schedule, kernel, window and guidance as sampling."""
        _, backend, engine = self.varied(easel, sampling=changes)
        rollouts = engine.generate(easel.requests(self.prompts, 2), backend_sampling(engine))
        replayed = backend.replay(rollouts).log_probs
        assert rollouts.mask.shape[1] >= 1
        assert (replayed - rollouts.behaviour_log_probs).abs().max().item() <= self.log_prob_tolerance

    def test_rows_do_not_depend_on_their_batch(self, easel: Easel) -> None:
        """Seeds come with samples: a rollout does not depend on ranks, turns or neighbours."""
        requests = easel.requests(self.prompts, 3)
        together = easel.engine.generate(requests, easel.sampling())
        alone = [easel.engine.generate([request], easel.sampling()) for request in requests]
        states = torch.stack(together.payload["states"])
        apart = torch.stack([s for part in alone for s in part.payload["states"]])
        assert torch.allclose(states, apart, rtol=1e-4, atol=1e-4)
        order = [steps for part in alone for steps in part.payload["steps"]]
        assert torch.equal(torch.stack(together.payload["steps"]), torch.stack(order))

    def test_twice_the_same(self, easel: Easel) -> None:
        """Resuming is exact because sampling is."""
        first, second = (easel.engine.generate(easel.requests(self.prompts, 2), easel.sampling()) for _ in range(2))
        assert torch.equal(first.behaviour_log_probs, second.behaviour_log_probs)
        assert all(torch.equal(a, b) for a, b in zip(first.payload["states"], second.payload["states"], strict=True))

    def test_no_requests(self, easel: Easel) -> None:
        """An engine replica may have nothing to do."""
        rollouts = easel.engine.generate([], easel.sampling())
        assert len(rollouts) == 0
        assert rollouts.samples == []

    def test_evaluation_has_no_noise_and_no_actions(self, easel: Easel) -> None:
        """The evaluation defaults are deterministic, whatever the samples' own seeds."""
        sampling = easel.sampling(**type(easel.sampling()).evaluation_defaults)
        rollouts = easel.engine.generate(easel.requests(self.prompts, 2), sampling)
        assert rollouts.mask.shape == (4, 0)
        section = easel.sampling()
        pictures = [s.image if section.frames == 1 else s.video for s in rollouts.samples]
        assert section.same_initial_noise
        assert (pictures[0] == pictures[1]).all(), "one initial noise, no other: one picture"

    def test_gradients_do_not_depend_on_how_work_is_split(self, easel: Easel) -> None:
        """Slices of steps, micro-batches of groups and of samples: the same sum."""
        rollouts = easel.engine.generate(easel.requests(self.prompts, 3), easel.sampling())
        minibatch = check_minibatch(rollouts)
        whole = gradient(easel.backend, minibatch)
        assert sum(float(g.abs().sum()) for g in whole.values()) > 0
        for changes in (
            {"model": {"policy": {"name": self.component, "steps_at_once": 3, **self.options}}},
            {"backend": {"micro_batch_groups": 2}},
            {"backend": {"micro_batch_samples": 2}},
            {"backend": {"activation_checkpointing": True}},
        ):
            _, backend, _ = self.varied(easel, **changes)
            assert relative(gradient(backend, minibatch), whole) <= self.gradient_tolerance, changes

    def test_divergence_from_the_reference(self, easel: Easel) -> None:
        """0 from itself, positive once the network has moved, its gradient in the update."""
        cast = easel.rank.cast(easel.recipe)
        backend = cast.backend(reference=True)
        engine = cast.engine(backend)
        rollouts = engine.generate(easel.requests(self.prompts, 3), easel.sampling())
        minibatch = check_minibatch(rollouts)
        record = backend.reference(rollouts)
        with torch.no_grad(), backend.inference_module() as module:
            stats = cast.policy.replay(module, rollouts, reference=record)
        assert float(stats.kl.abs().max()) <= 1e-9
        for _ in range(3):
            backend.update(minibatch, RatioLoss())
        assert all(
            torch.equal(a, b) for a, b in zip(backend.reference(rollouts)["means"], record["means"], strict=True)
        )
        with torch.no_grad(), backend.inference_module() as module:
            moved = cast.policy.replay(module, rollouts, reference=record)
        assert float(moved.kl.min()) >= 0
        assert float(moved.kl.max()) > 0

    def test_weights_go_out_and_come_back(self, easel: Easel, tmp_path: Path) -> None:
        """An exported folder is a folder like the first: the same names, the same bits, the same pictures."""
        policy = easel.cast.policy
        policy.save_weights(tmp_path / "export", easel.backend.export_weights())
        cast = easel.rank.cast({**easel.recipe, "model": {**easel.recipe["model"], "path": str(tmp_path / "export")}})
        engine = cast.engine(None)
        assert engine.weights == "own"
        again = dict(t for b in cast.backend().export_weights() for t in b)
        before = dict(t for b in easel.backend.export_weights() for t in b)
        assert set(again) == set(before)
        assert all(torch.equal(again[n], before[n]) for n in before)
        requests = easel.requests(self.prompts, 2)
        ours, theirs = easel.engine.generate(requests, easel.sampling()), engine.generate(requests, easel.sampling())
        assert torch.allclose(ours.behaviour_log_probs, theirs.behaviour_log_probs, atol=self.log_prob_tolerance)

    def test_weights_of_another_folder_are_taken(self, easel: Easel, tmp_path: Path) -> None:
        """`model.init_from` replaces the weights of `model.path`; adapters come on top of them."""
        start = {name: tensor.clone() for bucket in easel.backend.export_weights() for name, tensor in bucket}
        other = {name: tensor + 0.01 for name, tensor in start.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save({"model": other}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        for lora in (None, {"rank": 2, "alpha": 4.0}):
            _, backend, engine = self.varied(easel, model={"init_from": str(tmp_path / "dcp"), "lora": lora})
            taken = {name: tensor.clone() for bucket in backend.export_weights() for name, tensor in bucket}
            assert set(taken) == set(start)
            left = [name for name in taken if not torch.equal(taken[name], other[name])]
            assert not left, f"weights are not those of model.init_from: {left[0]} and {len(left) - 1} more"
        requests = easel.requests(self.prompts, 2)
        ours, theirs = (e.generate(requests, easel.sampling()).payload["states"][0] for e in (easel.engine, engine))
        assert not torch.equal(ours, theirs), "the engine samples with the weights of model.path"

    def test_new_weights_are_used(self, easel: Easel) -> None:
        """After an update and `update_weights`, sampled log-probs are those of the new weights, own copy or shared."""
        for weights in ("shared", "own"):
            cast, backend, engine = self.varied(easel, rollout={"weights": weights}, optimizer={"lr": 1e-2})
            requests = easel.requests(self.prompts, 2)
            first = engine.generate(requests, cast.policy.sampling)
            backend.update(check_minibatch(first), RatioLoss())
            engine.update_weights(None if engine.weights == "shared" else backend.export_weights(), 1)
            second = engine.generate(requests, cast.policy.sampling)
            assert second.policy_version == 1
            assert not torch.equal(first.payload["states"][0], second.payload["states"][0])
            replayed = backend.replay(second).log_probs
            assert (replayed - second.behaviour_log_probs).abs().max().item() <= self.log_prob_tolerance

    def test_adapters_train_and_their_absence_is_the_reference(self, easel: Easel) -> None:
        """LoRA: only adapters move; switched off, the network is the one it started from; merged, it is exported."""
        model = {**easel.recipe["model"], "lora": {"rank": 4, "alpha": 8.0}}
        cast = easel.rank.cast({**easel.recipe, "model": model, "optimizer": {"lr": 1e-2}})
        backend = cast.backend(reference=True)
        rollouts = cast.engine(backend).generate(easel.requests(self.prompts, 2), cast.policy.sampling)
        record = backend.reference(rollouts)
        for _ in range(2):
            backend.update(check_minibatch(rollouts), RatioLoss())
        assert all(
            torch.equal(a, b) for a, b in zip(backend.reference(rollouts)["means"], record["means"], strict=True)
        )
        start = dict(t for b in easel.backend.export_weights() for t in b)
        merged = dict(t for b in backend.export_weights() for t in b)
        assert set(merged) == set(start)
        changed = [n for n in merged if not torch.equal(merged[n], start[n])]
        assert changed
        adapters = dict(t for b in backend.export_weights("adapter") for t in b)
        assert adapters
        assert all("lora_" in name for name in adapters)

    def test_a_prompt_is_encoded_once_for_its_group(self, easel: Easel) -> None:
        """Rows of a group share the prompt's conditions: 8 MB a prompt for FLUX, not a sample."""
        rollouts = easel.engine.generate(easel.requests(self.prompts, 3), easel.sampling())
        names = set(rollouts.payload) - {"states", "start", "steps", "size", "means"}
        assert names
        for name in names:
            values = rollouts.payload[name]
            assert values[0] is values[1] is values[2]
            assert values[0] is not values[3]
        part = select_rows(rollouts, [1, 2])
        assert part.payload[min(names)][0] is rollouts.payload[min(names)][1]


def backend_sampling(engine: RolloutEngine) -> Any:
    """The sampling section of the engine's own policy."""
    return engine.policy.sampling  # type: ignore[attr-defined]
