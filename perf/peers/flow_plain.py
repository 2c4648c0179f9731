"""Our DanceGRPO step against the plainest PyTorch loop of the same formulas, the two taking turns in one process.

    OMP_NUM_THREADS=1 python perf/peers/flow_plain.py --pairs 10 --threads 1
    OMP_NUM_THREADS=1 python perf/peers/flow_plain.py --pairs 10 --threads 1 --compile network    # or blocks
    python perf/peers/flow_plain.py --no-share --max-rows 160   # every row computed, all in one batch, as the loop does
    python perf/peers/flow_plain.py --again                 # the plain loop against itself: the noise

Both train the same random network from the same weights on 10 prompts x 16 samples, 16 steps, 9 of them trained, two
updates. Work is counted in every step and must be exactly what it should be: rows through the network, rows of them
with gradient, optimizer steps. Ours computes the first denoising step once a group, because its samples are one until
then: fewer rows, as many as printed, for the same numbers (--no-share: all of them).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from flow_rig import GROUP, PROMPTS, STEPS, dit_folder, flow_recipe
from peers.pairs import Spread, keep, summary
from peers.plain_dance import UPDATES, PlainDance
from rig import built_run

from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.step_metrics import step_metrics
from mmrl_core.grpo.trainer import train_step
from mmrl_core.perf import machine
from mmrl_core.policies.flow.dit import ClassConditionalDiT

BARS = {"none": 1.05, "blocks": 1.05, "network": 0.9}
"""Ours takes at most so many times as long, at the upper end of the middle half, by what of it is compiled."""


@dataclass(kw_only=True)
class Work:
    """What one side has done, counted where it happens: in its network and its optimizer."""

    rows: int = 0
    shared: int = 0
    """Rows a step that need not be computed, because they equal another one."""
    trained_rows: int = 0
    updates: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the last step."""

    def watch(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Count from now on."""

        def forward(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            self.rows += len(arguments[0])
            self.trained_rows += len(arguments[0]) if torch.is_grad_enabled() else 0

        def step(*_: Any) -> None:
            self.updates += 1

        network.register_forward_pre_hook(forward)
        optimizer.register_step_post_hook(step)

    @property
    def done(self) -> tuple[int, int, int]:
        """(rows, rows with gradient, optimizer steps) so far."""
        return self.rows, self.trained_rows, self.updates


Side = tuple[str, Callable[[], None], Work]


def main() -> int:
    """Exit status 0 when the comparison was valid, whatever came out."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="mmrl-flow-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model = dit_folder(folder / "model")
        second = plain_side("plain", model)
        if arguments.again:
            first = plain_side("again", model)
        else:
            values = our_recipe(flow_recipe(model, folder), arguments)
            first = our_side(stack.enter_context(built_run(values, folder)), shared_rows(arguments))
        pairs, processor, longest = take_turns(first, second, arguments)
    names = first[0], second[0]
    result = {
        "fingerprint": machine.fingerprint(arguments.threads),
        "versions": machine.versions(["mmrl-core", "torch"]),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "job": {
            "prompts": PROMPTS,
            "group": GROUP,
            "steps": STEPS,
            "updates": UPDATES,
            "steps_at_once": arguments.steps_at_once,
            "max_rows": arguments.max_rows,
            "compile": arguments.compile,
        },
        "rows_per_step": {side[0]: side[2].rows // (arguments.pairs + arguments.warmup) for side in (first, second)},
        "shared_rows_per_step": {side[0]: side[2].shared for side in (first, second)},
        "longest_warmup_seconds": longest,
        "pairs": pairs,
        "processor_pairs": processor,
        "last_step": {side[0]: side[2].facts for side in (first, second)},
        "summary": summary(*names, pairs),
        "processor_summary": summary(*names, processor),
    }
    report(*names, result)
    target = arguments.out or machine.REPOSITORY / "runs" / "perf" / f"flow_{names[0]}_{names[1]}.json"
    keep(result, target)
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="measured pairs of steps")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="computing threads of both")
    parser.add_argument("--steps-at-once", type=int, default=1, help="ours: denoising steps in one forward; plain: 1")
    parser.add_argument("--max-rows", type=int, default=PROMPTS * GROUP // 2, help="ours: samples denoised at once")
    parser.add_argument("--no-share", action="store_true", help="ours: compute the first step for every sample")
    parser.add_argument(
        "--compile",
        choices=("none", "blocks", "network"),
        default="none",
        help="ours: backend.compile; it is compiled in warm-up",
    )
    parser.add_argument("--again", action="store_true", help="the plain loop against itself")
    parser.add_argument("--out", type=Path, help="JSON file; default runs/perf/flow_FIRST_SECOND.json")
    arguments = parser.parse_args(words)
    if min(arguments.pairs, arguments.threads, arguments.steps_at_once, arguments.max_rows) < 1 or arguments.warmup < 0:
        parser.error("--pairs, --threads, --steps-at-once and --max-rows must be at least 1, --warmup at least 0")
    if arguments.compile != "none" and (arguments.again or not arguments.warmup):
        parser.error("--compile is about ours, which --again leaves out, and compiles during --warmup pairs")
    return arguments


def our_recipe(values: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe with what the command line says of our side."""
    values["model"]["policy"] |= {"steps_at_once": arguments.steps_at_once, "share_start": not arguments.no_share}
    values["rollout"]["max_rows"] = arguments.max_rows
    values["backend"]["compile"] = arguments.compile
    return values


def shared_rows(arguments: argparse.Namespace) -> int:
    """Rows a step that our side does not compute: of the first step all but one of each group, or of each part of one
    that is denoised in turns."""
    if arguments.no_share:
        return 0
    samples = PROMPTS * GROUP
    parts = sum(
        (min(first + arguments.max_rows, samples) - 1) // GROUP - first // GROUP + 1
        for first in range(0, samples, arguments.max_rows)
    )
    return samples - parts


def plain_side(name: str, model: Path) -> Side:
    """The plain loop."""
    plain, work = PlainDance(model), Work()
    work.watch(plain.network, plain.optimizer)

    def step() -> None:
        done = plain.step()
        work.facts = {"reward": done.reward, "grad_norm": done.grad_norm}

    return name, step, work


def our_side(run: Run, shared: int) -> Side:
    """The loop's own step, from drawing prompts to metrics; nothing is written."""
    backend: Any = run.backend
    layouts, work = Layouts.gather(run.world, run.engine.replica, run.backend.replica), Work(shared=shared)
    (network,) = (part for part in backend.module.modules() if isinstance(part, ClassConditionalDiT))
    work.watch(network, backend.optimizer.torch_optimizer)

    def step() -> None:
        run.progress.step += 1
        learned, batch = train_step(run, run.progress.step, layouts)
        metrics = step_metrics(run, batch, learned, run.timers.collect())
        phases = {name: metrics[f"timing/{name}"] for name in ("rollout", "rule_reward", "update")}
        work.facts = {"reward": metrics["grpo/score/mean"], "grad_norm": metrics["grad_norm"], "seconds": phases}

    return "ours", step, work


def take_turns(
    first: Side, second: Side, arguments: argparse.Namespace
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], float]:  # fmt: skip
    """A B A B ...: seconds of each measured pair, seconds of processor time, all threads together, and the seconds of
    the first side's longest warm-up step.

    Raises SystemExit when a side did other work than it should.
    """
    pairs, processor, longest = [], [], 0.0
    for number in range(1, arguments.warmup + arguments.pairs + 1):
        seconds, busy = [], []
        for _, step, _ in (first, second):
            begin, begin_busy = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - begin)
            busy.append(time.process_time() - begin_busy)
        check_same_work({side[0]: side[2] for side in (first, second)}, number)
        counted = number > arguments.warmup
        label = f"pair {number - arguments.warmup:3d}" if counted else "warm-up "
        told = f"{first[0]} {seconds[0]:7.3f} s   {second[0]} {seconds[1]:7.3f} s   ratio {seconds[0] / seconds[1]:.3f}"
        print(f"{label}  {told}   of processor time {busy[0] / busy[1]:.3f}", flush=True)
        if counted:
            pairs.append((seconds[0], seconds[1]))
            processor.append((busy[0], busy[1]))
        else:
            longest = max(longest, seconds[0])
    return pairs, processor, longest


def check_same_work(sides: dict[str, Work], steps: int) -> None:
    """Raises SystemExit unless every side has done the work of `steps` steps, no more, and less by what it shares."""
    samples = PROMPTS * GROUP
    trained = samples * int((STEPS - 1) * 0.6)
    for name, work in sides.items():
        wanted = steps * (samples * STEPS + trained - work.shared), steps * trained, steps * UPDATES
        if work.done != wanted:
            raise SystemExit(
                f"after {steps} steps {name} has done (rows, rows with gradient, optimizer steps) {work.done}, "
                f"not {wanted}"
            )


def report(first: str, second: str, result: dict[str, Any]) -> None:
    """The outcome for people."""
    told = result["summary"]
    ratio = Spread(**told[f"{first}/{second}"])
    rows, shared = result["rows_per_step"], result["shared_rows_per_step"]
    counts = [f"{name} {rows[name]} (and {shared[name]} that equal another row)" for name in rows]
    print(f"\nrows through the network a step: {', '.join(counts)}; load {result['load_average']}")
    if result["job"]["compile"] != "none":
        longest = f"{result['longest_warmup_seconds']:.1f} s"
        print(f"{first}: {result['job']['compile']} compiled in warm-up, the longest step of which took {longest}")
    print(f"seconds a step, median:  {first} {Spread(**told[first]).text(' s', 3)}")
    print(f"                         {second} {Spread(**told[second]).text(' s', 3)}")
    print(f"paired ratio {first} / {second}: {ratio.text(digits=3)}")
    busy = Spread(**result["processor_summary"][f"{first}/{second}"])
    print(f"the same of processor time, which others on this machine disturb less: {busy.text(digits=3)}")
    bar = BARS[result["job"]["compile"]]
    verdict = "within" if ratio.upper_quartile <= bar else "NOT within"
    print(f"upper end of the middle half {ratio.upper_quartile:.3f}: {verdict} the bar of {bar}")
    print(f"last step: {json.dumps(result['last_step'])}")


if __name__ == "__main__":
    sys.exit(main())
