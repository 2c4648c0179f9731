"""The program that every rank of a combination runs: one batch through it, everything on the way written down.

Only the contracts are used: generate, replay, reference, gradients, update, export. Rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmrl_core.checkpoint.weight_files import write_weights
from mmrl_core.contracts import ActionStats, Bucket, Minibatch, Record, Rollouts, TrainingSpec
from mmrl_core.errors import BackendError, MmrlError
from mmrl_core.grpo.importance import mismatch_metrics
from mmrl_core.grpo.losses import PolicyLoss, build_loss
from mmrl_core.grpo.minibatches import build_minibatch
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.logs import configure_logging
from mmrl_core.launch.preflight import installed_versions, preflight
from mmrl_core.plugins import resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.rows import stack_rows
from mmrl_core.verify.batch import Batch
from mmrl_core.verify.generate import Stage, generate, settings
from mmrl_core.verify.job import (
    BATCH,
    FACTS,
    FORMAT,
    GRADIENTS,
    NUMBERS,
    START,
    STEM,
    UPDATES_PER_STEP,
    Job,
    change_folder,
)
from mmrl_core.verify.tolerances import coarsest
from mmrl_core.verify.weights import TensorFolder

log = logging.getLogger("mmrl.verify")


def main(recipe_path: Path) -> int:
    """Record the combination of the complete recipe at `recipe_path` into its run folder, which holds the job."""
    recipe, source = load_recipe(recipe_path)
    selection = resolve(recipe, source)
    configure_logging(recipe.directory, int(os.environ.get("RANK", "0")))
    device = components.create_device(selection)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with components.create_rewards(recipe, selection, device, local_rank) as rewards:
        world = connect(device)
        try:
            if recipe.deterministic:
                device.set_deterministic(True)
            job = Job.read(recipe.directory)  # written before any rank could connect
            prompts = components.create_source(selection.data, recipe.seed)
            preflight(
                world,
                recipe_digest=components.digest(recipe.model_dump(mode="json")),
                plugins_digest=selection.digest(),
                data_digest=prompts.digest(),
                versions=installed_versions(),
                rewards=recipe.rewards,
            )
            policy = components.create_policy(selection, recipe.model)
            device.seed(recipe.seed)
            backend = selection.backend.create()
            training = TrainingSpec(
                optimizer=recipe.optimizer,
                total_updates=max(
                    job.steps * UPDATES_PER_STEP, recipe.algorithm.steps * recipe.algorithm.updates_per_rollout
                ),
                reference=recipe.algorithm.kl.coef > 0,
            )
            backend.setup(components.context(recipe, world, device), policy, training)
            stage = Stage(
                recipe=recipe,
                selection=selection,
                world=world,
                device=device,
                policy=policy,
                backend=backend,
                source=prompts,
                rewards=rewards,
            )
            Recorder(stage, job).run()
            return 0
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"out of device memory: {error}\nTake fewer --prompts, or lower what backend and sampling ask for"
            ) from error
        except MmrlError as error:
            log.error("%s", error, extra={"file_only": True})  # the command line prints it
            raise
        finally:
            disconnect()


class Recorder:
    """One rank's part of a record. Every method is collective."""

    def __init__(self, stage: Stage, job: Job) -> None:
        self.stage, self.job = stage, job
        self.world, self.backend = stage.world, stage.backend
        self.folder = stage.recipe.directory
        self.form: Literal["merged", "adapter"] = "merged" if stage.recipe.model.lora is None else "adapter"
        self.names: dict[str, list[str]] = {}
        self.precisions: set[str] = set()
        """Names of each weight stream in its order, on rank 0."""
        self.numbers: dict[str, Tensor] = {}
        """[B, T] each, rows as in the batch, on rank 0."""

    def run(self) -> None:
        """Everything, in the order in which a step computes it."""
        self._write(START, self.backend.export_weights(self.form))
        batch, engine = self._batch()
        rollouts = batch.share(self.backend.replica)
        log.info("%d samples, %d of them here", len(batch.rollouts), len(rollouts))
        self.numbers["mask"] = batch.rollouts.mask
        stats = self.backend.replay(rollouts)
        self._gather("log_probs", batch, rollouts, stats.log_probs)
        if stats.entropy is not None:
            self._gather("entropy", batch, rollouts, stats.entropy)
        reference = self._reference(batch, rollouts)
        recipe, selection = self.stage.recipe, self.stage.selection
        loss = build_loss(recipe.algorithm, components.create_policy_gradient(recipe, selection))
        minibatch = self._minibatch(batch, rollouts, self._old(rollouts, stats), reference)
        self._write(GRADIENTS, self.backend.gradients(minibatch, loss))
        updates: list[dict[str, float]] = []
        for step in range(1, self.job.steps + 1):
            updates += self._step(batch, rollouts, reference, loss)
            self._write(change_folder(step), self._changes())
            self._gather(f"log_probs.{step}", batch, rollouts, self.backend.replay(rollouts).log_probs)
        if self.world.is_main:
            save_file(self.numbers, self.folder / NUMBERS)
            self._write_facts(batch, engine, updates)
        self.world.barrier()

    # ------------------------------------------------------------------------------------------------------ the batch

    def _batch(self) -> tuple[Batch, dict[str, Any] | None]:
        """The batch to compare on, and how this combination's engine agrees with its training network, if it was
        used: on the batch, or, when another combination has made that with another engine, on samples of its own."""
        stage, job = self.stage, self.job
        given = Batch.read(Path(job.rollouts) / BATCH) if job.rollouts is not None else None
        own = settings(stage.recipe)
        if given is not None and all(given.facts["settings"][name] == own[name] for name in ("rollout", "sampling")):
            stage.rewards.close()
            return given, None
        engine = stage.selection.rollout.create()
        engine.setup(components.context(stage.recipe, self.world, stage.device), stage.policy, self.backend)
        if given is None and not job.synthetic_advantages:
            stage.rewards.setup()
        if given is not None or not engine.replica.is_root:
            stage.rewards.close()
        scored = replace(job, synthetic_advantages=job.synthetic_advantages or given is not None)
        generate(stage, engine, scored, self.folder / BATCH)
        engine.close()
        sampled = Batch.read(self.folder / BATCH)
        return given or sampled, self._mismatch(sampled)

    def _mismatch(self, batch: Batch) -> dict[str, Any]:
        """The engine's declared semantics, and its log-probs against replayed ones, on rank 0."""
        rollouts = batch.share(self.backend.replica)
        replayed = self._gathered(batch, rollouts, self.backend.replay(rollouts).log_probs)
        facts: dict[str, Any] = dict(batch.facts["engine"])
        if replayed is None:
            return facts
        mask, behaviour = batch.rollouts.mask, batch.rollouts.behaviour_log_probs
        sums, maxima = mismatch_metrics(replayed, behaviour, mask, mask.float() / mask.sum().clamp_min(1))
        facts["metrics"] = {name: float(value) for name, value in {**sums, **maxima}.items()}
        difference = torch.where(mask, (replayed - behaviour).abs(), 0.0)
        row, action = divmod(int(difference.argmax()), mask.shape[1])
        facts["place"] = {
            "sample": int(batch.rollouts.sample_id[row]),
            "group": int(batch.rollouts.group_id[row]),
            "action": action,
            "engine": float(behaviour[row, action]),
            "training": float(replayed[row, action]),
        }
        return facts

    # ------------------------------------------------------------------------------------------------------- numbers

    def _gather(self, name: str, batch: Batch, rollouts: Rollouts, values: Tensor) -> None:
        gathered = self._gathered(batch, rollouts, values)
        if gathered is not None:
            self.numbers[name] = gathered

    def _gathered(self, batch: Batch, rollouts: Rollouts, values: Tensor) -> Tensor | None:
        """[B, T] fp32 of all rows from each replica's [b, T], on rank 0."""
        own = (rollouts.sample_id, values.detach().float().cpu()) if self.backend.replica.is_root else None
        parts = self.world.gather_main(own)
        if not self.world.is_main:
            return None
        place = {sample: row for row, sample in enumerate(batch.rollouts.sample_id.tolist())}
        result = torch.full(batch.rollouts.mask.shape, torch.nan)
        for part in parts:
            if part is not None:
                for sample, row in zip(part[0].tolist(), part[1], strict=True):
                    if sample >= 0:  # a replica without groups holds a spare row
                        result[place[sample]] = row
        return torch.where(batch.rollouts.mask, result, 0.0)

    def _reference(self, batch: Batch, rollouts: Rollouts) -> Record | None:
        algorithm = self.stage.recipe.algorithm
        if algorithm.kl.coef == 0:
            return None
        record = self.backend.reference(rollouts)
        if "log_probs" in record:
            self._gather("reference", batch, rollouts, stack_rows(record["log_probs"], rollouts.mask.shape[1]))
        return record if algorithm.kl.where == "loss" else None

    # ------------------------------------------------------------------------------------------------------- updates

    def _old(self, rollouts: Rollouts, stats: ActionStats) -> Tensor:
        behaviour = self.stage.recipe.algorithm.old_log_probs == "behaviour"
        return rollouts.behaviour_log_probs if behaviour else stats.log_probs

    def _minibatch(self, batch: Batch, rollouts: Rollouts, old: Tensor, reference: Record | None) -> Minibatch:
        return build_minibatch(
            rollouts,
            set(batch.rollouts.sample_id.tolist()),
            batch.kept,
            batch.advantage_by_sample(),
            self.stage.recipe.algorithm,
            max_actions=self.stage.policy.max_actions,
            old_log_probs=old,
            reference=reference,
        )

    def _step(
        self, batch: Batch, rollouts: Rollouts, reference: Record | None, loss: PolicyLoss
    ) -> list[dict[str, float]]:
        """UPDATES_PER_STEP updates on the whole batch, their ratios measured from where the step began."""
        old = self._old(rollouts, self.backend.replay(rollouts))
        minibatch = self._minibatch(batch, rollouts, old, reference)
        return [self.backend.update(minibatch, loss) for _ in range(UPDATES_PER_STEP)]

    # ------------------------------------------------------------------------------------------------------- weights

    def _write(self, name: str, stream: Iterator[Bucket]) -> None:
        """Rank 0 writes a weight stream into a folder, in fp32; the others exhaust it."""
        if not self.world.is_main:
            for _ in stream:
                pass
            return
        names = self.names[name] = []
        (self.folder / name).mkdir()

        def noted() -> Iterator[Bucket]:
            for bucket in stream:
                names.extend(one for one, _ in bucket)
                if name == START:
                    self.precisions.update(str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket)
                # copies: a backend may clear its gradients once the stream has ended, before the file is written
                yield [(one, tensor.detach().to("cpu", torch.float32, copy=True)) for one, tensor in bucket]

        write_weights(self.folder / name, noted(), torch.float32, stem=STEM)

    def _changes(self) -> Iterator[Bucket]:
        """The current weights less those of the start (rank 0; elsewhere the stream as it comes)."""
        stream = self.backend.export_weights(self.form)
        if not self.world.is_main:
            yield from stream
            return
        with TensorFolder(self.folder / START) as start:
            for bucket in stream:
                yield [(name, tensor.detach().to("cpu", torch.float32) - start.read(name)) for name, tensor in bucket]

    # --------------------------------------------------------------------------------------------------------- facts

    def _write_facts(self, batch: Batch, engine: dict[str, Any] | None, updates: list[dict[str, float]]) -> None:
        recipe: Recipe = self.stage.recipe
        values = recipe.model_dump(mode="json")
        facts = {
            "format": FORMAT,
            "combination": {name: value for name, value in values.items() if name not in _NOT_COMPARED},
            "dtype": recipe.model.dtype,
            "weights": coarsest(self.precisions),
            "form": self.form,
            "world": self.world.size,
            "replicas": self.backend.replica.count,
            "versions": installed_versions(),
            "batch": batch.digest,
            "samples": len(batch.rollouts),
            "groups": len(set(batch.rollouts.group_id.tolist())),
            "actions": int(batch.rollouts.mask.sum()),
            "advantages": batch.facts["advantages"],
            "rows": [
                {"sample": int(sample), "group": int(group)}
                for sample, group in zip(batch.rollouts.sample_id, batch.rollouts.group_id, strict=True)
            ],
            "steps": self.job.steps,
            "names": self.names,
            "updates": updates,
            "engine": engine,
        }
        text = json.dumps(facts, indent=2) + "\n"
        partial = self.folder / f".{FACTS}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / FACTS)


_NOT_COMPARED = ("name", "run_dir", "writers", "checkpoint", "eval")
"""Sections of a recipe that shape none of the numbers."""
