"""A rank that builds training backends and runs parts of their work on command: `python backend_ranks.py MODEL FOLDER`.

Commands are lines on stdin, the answer to each is a line on stdout: `build JSON` (a recipe's sections), then `update`,
`old_log_probs` or `export` as often as wanted. The work is that of the text rows: 4 prompts x 8 samples, here with
prompts of 48 tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rig import text_recipe

from mmrl_core.contracts import Minibatch, Rollouts, TrainingBackend
from mmrl_core.grpo.losses import build_loss
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import check_minibatch, share

GROUPS, SAMPLES, PROMPT = 4, 8, 48


def fixed_rollouts(cast: Cast, tokens: int) -> Rollouts:
    """Random rows of equal lengths; time does not depend on which tokens they are."""
    draw = torch.Generator().manual_seed(0)
    count = len(cast.policy.tokenizer)
    prompts = [torch.randint(count, (PROMPT,), generator=draw) for _ in range(GROUPS)]
    rows = GROUPS * SAMPLES
    return Rollouts(
        group_id=torch.arange(GROUPS).repeat_interleave(SAMPLES),
        sample_id=torch.arange(rows),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        behaviour_log_probs=torch.full((rows, tokens), -3.0),
        truncated=torch.ones(rows, dtype=torch.bool),
        policy_version=0,
        payload={
            "prompt_ids": [prompts[row // SAMPLES] for row in range(rows)],
            "response_ids": [torch.randint(count, (tokens,), generator=draw) for _ in range(rows)],
        },
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """One backend and this rank's share of the rows."""

    backend: TrainingBackend
    minibatch: Minibatch
    cast: Cast

    def update(self) -> None:
        self.backend.update(self.minibatch, build_loss(self.cast.recipe.algorithm))

    def old_log_probs(self) -> None:
        self.backend.replay(self.minibatch.rollouts)

    def export(self) -> None:
        for _ in self.backend.export_weights():
            pass


def build(rank: Rank, model: str, sections: dict[str, object]) -> Work:
    cast = rank.cast(text_recipe(model, rank.folder, **sections))
    backend = cast.backend()
    replica = backend.replica
    groups = [group for group in range(GROUPS) if group % replica.count == replica.index]
    return Work(
        backend=backend,
        minibatch=share(check_minibatch(fixed_rollouts(cast, cast.recipe.sampling["max_new_tokens"])), groups),
        cast=cast,
    )


def main(arguments: Sequence[str]) -> None:
    """Answer commands until stdin ends."""
    model, folder = arguments
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    with Rank.join("cpu", Path(folder)) as rank:
        work: Work | None = None
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "build":
                work = None  # its memory first
                work = build(rank, model, json.loads(rest))
            else:
                command: Callable[[], None] = getattr(work, word)
                command()
            rank.world.barrier()
            print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
