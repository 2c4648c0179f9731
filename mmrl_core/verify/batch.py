"""The batch that goes through both combinations: rollouts and advantages, as safetensors and JSON.

Rows of the payload that share a tensor (the samples of a prompt) share it again after reading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmrl_core.checkpoint.manifest import file_record
from mmrl_core.contracts import Replica, Rollouts
from mmrl_core.errors import VerifyError
from mmrl_core.grpo.collect import SampleRow
from mmrl_core.rewards.executor import Scored
from mmrl_core.rows import select_rows

TENSORS, TEXT = "rollouts.safetensors", "rollouts.json"
_FIELDS = ("group_id", "sample_id", "mask", "behaviour_log_probs", "truncated")


@dataclass(kw_only=True)
class Batch:
    """All rows, ordered by sample id; the same on every rank."""

    rollouts: Rollouts
    """Without samples."""
    advantages: Tensor
    """[B] fp32."""
    facts: dict[str, Any]
    """Plain values: `settings` (what shaped the rows), `engine`, `samples` (a short text of each row), `advantages`."""
    digest: str = ""
    """Of the tensors; set by `read`."""

    def write(self, folder: Path) -> None:
        """Write both files into `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self.rollouts, name).contiguous() for name in _FIELDS}
        tensors["advantages"] = self.advantages.contiguous()
        payload: dict[str, list[int]] = {}
        for name, rows in self.rollouts.payload.items():
            places: dict[int, int] = {}
            for row in rows:
                if id(row) not in places:
                    places[id(row)] = len(places)
                    tensors[f"payload.{name}.{places[id(row)]}"] = row.detach().cpu().contiguous().clone()
            payload[name] = [places[id(row)] for row in rows]
        save_file(tensors, folder / TENSORS)
        text = {"policy_version": self.rollouts.policy_version, "payload": payload, "facts": self.facts}
        (folder / TEXT).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Batch:
        """What `write` wrote. Raises VerifyError when a file is missing or damaged."""
        try:
            text = json.loads((folder / TEXT).read_text(encoding="utf-8"))
            with safe_open(folder / TENSORS, framework="pt") as file:
                fields = {name: file.get_tensor(name) for name in (*_FIELDS, "advantages")}
                payload: dict[str, list[Tensor]] = {}
                for name, places in text["payload"].items():
                    unique = {place: file.get_tensor(f"payload.{name}.{place}") for place in set(places)}
                    payload[name] = [unique[place] for place in places]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise VerifyError(
                f"{folder}: no batch of `mmrl verify`, or a damaged one: {error}. Name the folder of a record that "
                "generated its rollouts"
            ) from error
        return cls(
            rollouts=Rollouts(
                **{name: fields[name] for name in _FIELDS}, policy_version=text["policy_version"], payload=payload
            ),
            advantages=fields["advantages"],
            facts=text["facts"],
            digest=file_record(folder / TENSORS).sha256,
        )

    @property
    def kept(self) -> list[SampleRow]:
        """The rows as the normalisers of a minibatch count them."""
        return [
            sample_row(int(group), int(sample), int(actions))
            for group, sample, actions in zip(
                self.rollouts.group_id, self.rollouts.sample_id, self.rollouts.mask.sum(-1), strict=True
            )
        ]

    def advantage_by_sample(self) -> dict[int, float]:
        """Advantage by sample id."""
        return dict(zip(self.rollouts.sample_id.tolist(), self.advantages.tolist(), strict=True))

    def share(self, replica: Replica) -> Rollouts:
        """The rows of every `count`-th group. A replica without any gets the first row as a spare with the ids -1: it
        belongs to no minibatch, but lets the replica take part in collective passes."""
        groups = sorted(set(self.rollouts.group_id.tolist()))
        mine = set(groups[replica.index :: replica.count])
        rows = [row for row, group in enumerate(self.rollouts.group_id.tolist()) if group in mine]
        if rows:
            return select_rows(self.rollouts, rows)
        spare = select_rows(self.rollouts, [0])
        spare.group_id, spare.sample_id = torch.full_like(spare.group_id, -1), torch.full_like(spare.sample_id, -1)
        return spare


def sample_row(group_id: int, sample_id: int, actions: int, scored: Scored | None = None) -> SampleRow:
    """A row of the table with what minibatches and advantages read."""
    return SampleRow(
        group_id=group_id,
        sample_id=sample_id,
        holder=0,
        score=None if scored is None else scored.value,
        drop_group=False,
        rewards={} if scored is None else scored.per_reward,
        sub_scores={},
        prompt_length=None,
        response_length=None,
        actions=actions,
        truncated=False,
    )


def synthetic_advantages(groups: Sequence[int], samples: Sequence[int]) -> Tensor:
    """[B] fp32: a fixed normal number for each sample id, less the mean of its group; the same on every machine."""
    drawn = torch.tensor(
        [float(torch.randn((), generator=torch.Generator().manual_seed(sample + 1))) for sample in samples]
    )
    result = torch.empty_like(drawn)
    for group in set(groups):
        rows = torch.tensor([row for row, other in enumerate(groups) if other == group])
        result[rows] = drawn[rows] - drawn[rows].mean()
    return result
