"""TRL's side of a comparison: `GRPOTrainer`, which waits for the driver before each of its steps.

Runs in TRL's own environment: it imports nothing of mmrl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peers.channel import PeerSide
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NUMBER = re.compile(r"-?\d+")


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Half for the last number being right, half for nothing but that number."""
    values = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion[0]["content"].strip()
        found = NUMBER.findall(text)
        right = bool(found) and found[-1] == expected
        values.append(0.5 * right + 0.5 * (right and text.rstrip(".") == expected))
    return values


class Turns(TrainerCallback):  # type: ignore[misc]
    """A step begins when the driver says so. Its time ends with the optimizer's; fetching the batch before it and
    logging after it are not counted."""

    def __init__(self, channel: PeerSide, job: dict[str, Any]) -> None:
        self.channel, self.job = channel, job
        self.trainer: Any = None
        self.answer: dict[str, Any] | None = None
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._send()
        if self.channel.wait() is None:
            raise SystemExit
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.begin
        trained = self.trainer._buffered_inputs  # what this step's loss was computed on, by micro-batch
        prompts = [
            ids[mask.bool()].tolist()
            for part in trained
            for ids, mask in zip(part["prompt_ids"], part["prompt_mask"], strict=True)
        ]
        self.answer = {
            "seconds": seconds,
            "prompts": prompts,
            "response_tokens": [n for part in trained for n in part["completion_mask"].sum(-1).tolist()],
            "updates": state.global_step,
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._send()

    def _send(self) -> None:
        """The answer goes out when everything after the step is done too, so that this process is idle then."""
        if self.answer is not None:
            self.channel.send(self.answer)
            self.answer = None


def main() -> None:
    """Set up, then train; `Turns` does the waiting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="the driver's description of the work")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    channel = PeerSide()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text(encoding="utf-8").splitlines()]
    rows_per_step = job["prompts_per_step"] * job["samples_per_prompt"]
    config = GRPOConfig(
        output_dir=str(arguments.folder),
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=rows_per_step // job["peer_micro_batches"],
        gradient_accumulation_steps=job["peer_micro_batches"],  # rows are generated together all the same
        num_generations=job["samples_per_prompt"],
        max_completion_length=job["tokens"],
        generation_kwargs={"min_new_tokens": job["tokens"]},  # end tokens cannot be drawn before the last one
        max_steps=job["steps"],
        shuffle_dataset=False,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    turns = Turns(channel, job)
    trainer = GRPOTrainer(
        model=job["model"], args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), callbacks=[turns]
    )
    turns.trainer = trainer
    import torch

    channel.send(
        {
            "ready": {
                "threads": torch.get_num_threads(),
                "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")},
                "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()}),
                "micro_batch_rows": config.per_device_train_batch_size,
                "steps_per_generation": config.steps_per_generation,
                "num_iterations": config.num_iterations,
                "loss_type": config.loss_type,
                "optimizer": str(config.optim),
                "attention": trainer.model.config._attn_implementation,
            }
        }
    )
    trainer.train()


if __name__ == "__main__":
    main()
