"""Our side of a comparison: a run built as `mmrl train` builds it, one step of the one loop at a time."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peers.channel import PeerSide
from rig import built_run, text_recipe

from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.step_metrics import step_metrics
from mmrl_core.grpo.trainer import train_step
from mmrl_core.perf import machine


def main() -> None:
    """Set up, then a step for each request of the driver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="the driver's description of the work")
    parser.add_argument("--prefix-sharing", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    channel = PeerSide()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    values = text_recipe(
        job["model"],
        arguments.folder,
        model={
            "path": job["model"],
            "dtype": "float32",
            "policy": {"name": "causal_lm", "prefix_sharing": arguments.prefix_sharing},
        },
        backend={"name": "fsdp2", "micro_batch_groups": job["prompts_per_step"]},
        sampling={"max_new_tokens": job["tokens"], "temperature": 1.0, "ignore_eos": True},
        data={"name": "jsonl", "path": job["prompts"], "shuffle": False},
        algorithm={
            "steps": job["steps"],
            "prompts_per_step": job["prompts_per_step"],
            "samples_per_prompt": job["samples_per_prompt"],
        },
        optimizer={"lr": job["lr"], "schedule": "constant", "clip_grad": 1.0, "weight_decay": 0.0},
    )
    with built_run(values, arguments.folder) as run:
        layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
        dtypes = sorted({str(p.dtype) for p in run.backend.module.parameters()})  # type: ignore[attr-defined]
        channel.send(
            {
                "ready": {
                    "threads": torch.get_num_threads(),
                    "versions": machine.versions(["mmrl-core", "torch", "transformers"]),
                    "dtypes": dtypes,
                    "prefix_sharing": arguments.prefix_sharing,
                }
            }
        )
        while (step := channel.wait()) is not None:
            begin = time.perf_counter()
            learned, batch = train_step(run, step, layouts)
            run.progress.step = step
            metrics = step_metrics(run, batch, learned, run.timers.collect())
            seconds = time.perf_counter() - begin
            channel.send(
                {
                    "seconds": seconds,
                    "prompts": [ids.tolist() for ids in batch.rollouts.payload["prompt_ids"]],
                    "response_tokens": batch.rollouts.mask.sum(-1).tolist(),
                    "updates": run.progress.updates,
                    "grad_norm": metrics["grad_norm"],
                    "reward": metrics["grpo/score/mean"],
                    "phases": {
                        name: metrics[f"timing/{name}"] for name in ("rollout", "update", "resharding_to_infer")
                    },
                }
            )


if __name__ == "__main__":
    main()
