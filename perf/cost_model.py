"""Where the time of a text run goes, on paper: floors of each phase by arithmetic, memory and links.

    python perf/cost_model.py                                   # the tables of docs/explanation/cost-model.md
    python perf/cost_model.py --check runs/perf/roofline_16.json    # the floors of what `roofline.py` measured here

A floor is what a phase takes when nothing else limits it: matrix products at half of the chip's data-sheet rate, memory
and links at 0.8 of theirs. Everything else is free in the model, so a real phase takes longer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only model with grouped-query attention."""

    name: str
    weights: float
    """All parameters, embeddings included."""
    layers: int
    hidden: int
    key_values: int
    """Key-value heads times their width."""
    bytes: int = 2
    """Of one weight."""

    @property
    def cache(self) -> float:
        """Bytes of keys and values of one token."""
        return 2.0 * self.layers * self.key_values * self.bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices and what joins them, each way and per device, in FLOP/s and bytes/s."""

    name: str
    devices: int
    per_node: int
    flops: float
    memory: float
    inside: float
    """Between devices of a node."""
    between: float
    """Between nodes."""
    host: float
    """Between a device and its host."""
    products: float = 0.5
    """Of `flops`: what large matrix products reach, with everything around them. Assumed, not measured."""
    transfers: float = 0.8
    """Of the other rates."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step: `prompts` x `group` samples of `prompt` and `response` tokens, the longest `longest`."""

    prompts: int
    group: int
    prompt: int
    response: int
    longest: int
    micro_batch: int
    """Samples of one forward and backward of a replica."""
    updates: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How devices are used. `tensor` and `pipeline` of training; `engine`: tensor-parallel size of an engine."""

    backend: str
    tensor: int
    pipeline: int
    engine: int
    recompute: bool = True


def phases(model: Model, machine: Machine, job: Job, layout: Layout) -> dict[str, float]:
    """Seconds of each phase of a step in which training and generation share the devices."""
    rate = machine.flops * machine.products
    memory = machine.memory * machine.transfers
    samples = job.prompts * job.group
    tokens = job.prompts * job.prompt + samples * job.response  # a group's prompt is computed once
    engines = machine.devices // layout.engine
    rows = samples / engines

    prefill = 2 * model.weights * job.prompts * job.prompt / (machine.devices * rate)
    context = job.prompt + job.response / 2

    def token(active: float) -> float:
        """One token of every active row of an engine: its weights and caches are read, its products done."""
        read = (model.weights * model.bytes + active * context * model.cache) / layout.engine / memory
        done = 2 * model.weights * active / layout.engine / rate
        return max(read, done)

    # most rows are done at the mean length; then a tail of one row an engine goes on to the longest
    decode = job.response * token(rows) + (job.longest - job.response) * token(min(1.0, rows))

    forward = 2 * model.weights * tokens / (machine.devices * rate)
    backward = (3 if layout.recompute else 2) * forward
    replicas = machine.devices // (layout.tensor * layout.pipeline)
    traffic = _training_traffic(model, machine, job, layout, samples / replicas)
    bubble = (layout.pipeline - 1) / max(1.0, samples / replicas / job.micro_batch)
    link = machine.between if machine.devices > machine.per_node else machine.inside
    return {
        "rollout": prefill + decode,
        "old log-probs": forward * (1 + bubble) if job.updates > 1 else 0.0,
        "reference": forward * (1 + bubble),
        "update": max((forward + backward) * (1 + bubble), traffic),
        "weights to engines": model.weights * model.bytes / (link * machine.transfers),
        "offload and onload": 2 * 16 * model.weights / machine.devices / (machine.host * machine.transfers),
    }


def _training_traffic(model: Model, machine: Machine, job: Job, layout: Layout, rows: float) -> float:
    """Seconds that the links are busy in an update; hidden behind the arithmetic as far as that is longer."""
    micro_batches = max(1.0, rows / job.micro_batch)
    if layout.backend == "fsdp2":
        # forward and backward gather all weights, backward scatters gradients in fp32, for every micro-batch
        link = machine.between if machine.devices > machine.per_node else machine.inside
        return micro_batches * model.weights * (2 * model.bytes + 4) / (link * machine.transfers)
    # four reductions of activations a layer for a forward and its backward, two more to recompute; ring: twice the data
    per_row = (job.prompt / job.group + job.response) * model.hidden * model.bytes
    reductions = 2 * (6 if layout.recompute else 4) * (model.layers / layout.pipeline) * rows * per_row
    inside = reductions * (layout.tensor - 1) / layout.tensor / (machine.inside * machine.transfers)
    gradients = (
        model.weights * (4 + model.bytes) / (layout.tensor * layout.pipeline) / (machine.between * machine.transfers)
    )
    return inside + (gradients if machine.devices > layout.tensor * layout.pipeline else 0.0)


QWEN_7B = Model(name="Qwen2.5-7B", weights=7.6e9, layers=28, hidden=3584, key_values=512)
QWEN_72B = Model(name="Qwen2.5-72B", weights=72.7e9, layers=80, hidden=8192, key_values=1024)
SMOLLM2 = Model(name="SmolLM2-135M", weights=134.5e6, layers=30, hidden=576, key_values=192, bytes=4)


def h100(devices: int) -> Machine:
    """Nodes of 8 H100 SXM: data-sheet rates; NVLink 450 GB/s each way, 400 Gbit/s between nodes, PCIe 5 x16."""
    return Machine(
        name=f"{devices} H100 (nodes of 8)",
        devices=devices,
        per_node=8,
        flops=989.5e12,
        memory=3.35e12,
        inside=450e9,
        between=50e9,
        host=64e9,
    )


RUNS = (
    (
        QWEN_7B,
        h100(16),
        Job(prompts=32, group=8, prompt=256, response=1024, longest=2048, micro_batch=4),
        (
            Layout(backend="fsdp2", tensor=1, pipeline=1, engine=1),
            Layout(backend="megatron", tensor=2, pipeline=2, engine=1),
            Layout(backend="megatron", tensor=2, pipeline=1, engine=2),
        ),
    ),
    (
        QWEN_72B,
        h100(512),
        Job(prompts=512, group=16, prompt=512, response=4096, longest=16384, micro_batch=1),
        (
            Layout(backend="fsdp2", tensor=1, pipeline=1, engine=4),
            Layout(backend="megatron", tensor=8, pipeline=4, engine=4),
            Layout(backend="megatron", tensor=8, pipeline=1, engine=8),
        ),
    ),
)


def tables() -> str:
    """Markdown: one table a run, one row a layout."""
    parts = []
    for model, machine, job, layouts in RUNS:
        parts.append(
            f"{model.name} on {machine.name}, {job.prompts} x {job.group} samples, prompts of {job.prompt}, responses "
            f"of {job.response} tokens (longest {job.longest}); seconds:\n"
        )
        names = list(phases(model, machine, job, layouts[0]))
        parts.append(f"| layout | {' | '.join(names)} | step | tokens/s/device |")
        parts.append("|---" * (len(names) + 3) + "|")
        tokens = job.prompts * job.group * (job.prompt + job.response)
        for layout in layouts:
            found = phases(model, machine, job, layout)
            whole = sum(found.values())
            shown = f"{layout.backend} TP{layout.tensor} PP{layout.pipeline}, engine TP{layout.engine}"
            numbers = " | ".join(f"{value:.3g}" for value in found.values())
            parts.append(f"| {shown} | {numbers} | {whole:.3g} | {tokens / whole / machine.devices:.0f} |")
        parts.append("")
    return "\n".join(parts)


def check(file: Path) -> str:
    """Floors of the job that `roofline.py` measured here, by the rates that it measured, beside what was reached."""
    found = json.loads(file.read_text(encoding="utf-8"))
    job, rounds = found["job"], found["rounds"]

    def median(name: str) -> float:
        return statistics.median(one[name] for one in rounds)

    here = Machine(
        name="this machine",
        devices=1,
        per_node=1,
        flops=median("matmul_flops"),
        memory=median("memory_bytes_per_second"),
        inside=math.inf,
        between=math.inf,
        host=math.inf,
        products=1.0,
        transfers=1.0,
    )
    work = Job(
        prompts=job["prompts"],
        group=job["group"],
        prompt=job["prompt_tokens"],
        response=job["tokens"],
        longest=job["tokens"],
        micro_batch=job["prompts"] * job["group"],
    )
    layout = Layout(backend="fsdp2", tensor=1, pipeline=1, engine=1, recompute=False)
    floors = phases(SMOLLM2, here, work, layout)
    lines = ["| phase | floor, s | measured, s | floor / measured |", "|---|---|---|---|"]
    for phase, name in (("rollout", "our_generation_seconds"), ("update", "update_seconds")):
        floor, reached = floors[phase], median(name)
        lines.append(f"| {phase} | {floor:.2f} | {reached:.2f} | {floor / reached:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FILE", help="a file of perf/roofline.py")
    file = parser.parse_args().check
    print(tables() if file is None else check(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
