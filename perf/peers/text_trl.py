"""Our GRPO step against TRL's GRPOTrainer: the same work, the two taking turns in one run.

    python perf/peers/text_trl.py --tokens 16 --steps 10 --warmup 2
    python perf/peers/text_trl.py --tokens 16 --ours-unshared       # our shared path against our own unshared one
    python perf/peers/text_trl.py --tokens 16 --again               # ours against itself: the noise

Each side is a process of its own in its own environment; the one whose turn it is not waits on a pipe. What both did
is checked from the data they trained on: identical prompt token ids, exactly --tokens new tokens a sample, one update.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.channel import DriverSide, PeerError
from peers.pairs import Spread, keep, summary
from peers.questions import write_questions

from mmrl_core.perf import machine

PERF = Path(__file__).resolve().parent.parent
REQUIREMENTS = PERF / "peers" / "requirements-trl.txt"
GROUP, PROMPTS = 8, 4
MUST_AGREE = ("torch", "transformers")


def main() -> int:
    """Exit status 0 when the comparison was valid, whatever came out."""
    arguments = parse()
    threads = arguments.threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="mmrl-peers-") as scratch:
        job = prepare(arguments, Path(scratch))
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with ExitStack() as stack:
            sides = [stack.enter_context(side) for side in start(arguments, path, Path(scratch), environment(threads))]
            facts = {side.name: side.ready() for side in sides}
            check_alike(facts, threads)
            print_header(arguments, job, facts, threads)
            pairs, details = take_turns(sides, arguments, job)
    first, second = (side.name for side in sides)
    result = {
        "fingerprint": machine.fingerprint(threads),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "job": {k: v for k, v in job.items() if k not in ("prompts",)},
        "peers": facts,
        "warmup": arguments.warmup,
        "pairs": pairs,
        "details": details,
        "summary": summary(first, second, pairs),
    }
    report(first, second, result["summary"], details)
    target = arguments.out or PERF.parent / "runs" / "perf" / f"text_{second}_{arguments.tokens}.json"
    keep(result, target)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of every sample (16, 64)")
    parser.add_argument("--prompt-tokens", type=int, help="exact length of every prompt; default: the question's own")
    parser.add_argument("--steps", type=int, default=10, help="measured pairs")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them that are not counted")
    parser.add_argument("--threads", type=int, help="computing threads of each side; default OMP_NUM_THREADS or cores")
    parser.add_argument("--model", default="mmrl:smollm2-135m-instruct", help="a folder, or mmrl:NAME")
    parser.add_argument(
        "--trl-micro-batches",
        type=int,
        default=1,
        choices=(1, 2, 4, 8),
        help="parts of TRL's backward pass; whole, 256 + 64 tokens of SmolLM2-135M need more than 24 GB",
    )
    parser.add_argument("--trl-python", help="Python of an environment with requirements-trl.txt; default: made once")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--ours-unshared", action="store_true", help="compare with our own prefix_sharing: off")
    other.add_argument("--again", action="store_true", help="compare ours with itself")
    parser.add_argument("--out", type=Path, help="JSON file; default runs/perf/text_PEER_TOKENS.json")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 0 or arguments.tokens < 2:
        parser.error("--steps must be at least 1, --warmup at least 0, --tokens at least 2")
    return arguments


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The work, written where both sides read it."""
    from transformers import AutoTokenizer

    from mmrl_core.packaged_models import local_path

    model = str(Path(local_path(arguments.model)).resolve())
    total = arguments.steps + arguments.warmup
    prompts = folder / "prompts.jsonl"
    lengths = write_questions(
        prompts,
        AutoTokenizer.from_pretrained(model),
        count=total * PROMPTS,
        prompt_tokens=arguments.prompt_tokens,
    )
    return {
        "model": model,
        "prompts": str(prompts),
        "prompt_tokens": [min(lengths), max(lengths)],
        "tokens": arguments.tokens,
        "steps": total,
        "prompts_per_step": PROMPTS,
        "samples_per_prompt": GROUP,
        "peer_micro_batches": arguments.trl_micro_batches,
        "lr": 5e-6,
        "dtype": "float32",
    }


def environment(threads: int) -> dict[str, str]:
    """The same for both sides: threads, nothing from a hub, and the modules beside this file."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    return {
        **clean,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(PERF),
    }


def start(
    arguments: argparse.Namespace, job: Path, scratch: Path, variables: dict[str, str]
) -> list[DriverSide]:  # fmt: skip
    """Both processes, first and second of each pair."""

    def side(name: str, python: str, module: str, *options: str) -> DriverSide:
        folder = scratch / name
        folder.mkdir()
        command = [python, "-m", module, "--job", str(job), "--folder", str(folder), *options]
        return DriverSide(name, command, variables, scratch / f"{name}.log", folder)

    ours = side("ours", sys.executable, "peers.mmrl_peer")
    if arguments.ours_unshared:
        return [ours, side("unshared", sys.executable, "peers.mmrl_peer", "--prefix-sharing", "off")]
    if arguments.again:
        return [ours, side("again", sys.executable, "peers.mmrl_peer")]
    return [ours, side("trl", arguments.trl_python or trl_python(), "peers.trl_peer")]


def trl_python() -> str:
    """Python of TRL's own environment, made on first use beside the model cache."""
    from mmrl_core.packaged_models import model_cache

    text = REQUIREMENTS.read_text(encoding="utf-8")
    folder = model_cache().parent / "peers" / f"trl-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"making TRL's environment in {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        index = os.environ.get("TORCH_INDEX")
        if index:  # an index with CPU builds of torch, as for `make`
            torch = next(line for line in text.splitlines() if line.startswith("torch=="))
            subprocess.run([*install, "--index-url", index, torch], check=True)
        subprocess.run([*install, "-r", str(REQUIREMENTS)], check=True)
        done.touch()
    return str(python)


def check_alike(facts: dict[str, dict[str, Any]], threads: int) -> None:
    """Raises SystemExit unless both sides compute with the same libraries, precision and threads."""
    for name, side in facts.items():
        if side["threads"] != threads:
            raise SystemExit(f"{name} computes with {side['threads']} threads, not {threads}")
        if side["dtypes"] != ["torch.float32"]:
            raise SystemExit(f"{name} has weights in {side['dtypes']}, not fp32 only")
    for library in MUST_AGREE:
        found = {name: side["versions"][library] for name, side in facts.items()}
        if len({version.split("+")[0] for version in found.values()}) > 1:
            raise SystemExit(f"the two sides have different versions of {library}: {found}")


def take_turns(
    sides: list[DriverSide], arguments: argparse.Namespace, job: dict[str, Any]
) -> tuple[list[tuple[float, float]], list[dict[str, Any]]]:
    """A B A B ...: seconds of each measured pair, and what else the sides said about their steps."""
    first, second = sides
    pairs, details = [], []
    for number in range(1, job["steps"] + 1):
        answers = {side.name: side.step(number) for side in sides}
        check_same_work(answers, number, job)
        a, b = answers[first.name]["seconds"], answers[second.name]["seconds"]
        counted = number > arguments.warmup
        label = f"pair {number - arguments.warmup:3d}" if counted else "warm-up "
        print(f"{label}  {first.name} {a:7.3f} s   {second.name} {b:7.3f} s   ratio {a / b:.3f}", flush=True)
        if counted:
            pairs.append((a, b))
            details.append(
                {
                    name: {k: v for k, v in answer.items() if k not in ("prompts", "response_tokens")}
                    for name, answer in answers.items()
                }
            )
    return pairs, details


def check_same_work(answers: dict[str, dict[str, Any]], number: int, job: dict[str, Any]) -> None:
    """Raises PeerError unless both trained once on the same prompts with full-length responses."""
    rows = job["prompts_per_step"] * job["samples_per_prompt"]
    for name, answer in answers.items():
        if answer["response_tokens"] != [job["tokens"]] * rows:
            raise PeerError(f"step {number}: {name} trained on responses of {answer['response_tokens']} tokens")
        if answer["updates"] != number:
            raise PeerError(f"step {number}: {name} has done {answer['updates']} updates, not one a step")
    # TRL shuffles the samples of a step before its update, so their order says nothing
    first, second = (sorted(answer["prompts"]) for answer in answers.values())
    if first != second:
        raise PeerError(f"step {number}: the two sides trained on different prompt tokens")


def print_header(
    arguments: argparse.Namespace, job: dict[str, Any], facts: dict[str, dict[str, Any]], threads: int
) -> None:  # fmt: skip
    """What is being compared."""
    low, high = job["prompt_tokens"]
    print(f"model {arguments.model}, fp32, {PROMPTS} prompts x {GROUP} samples, prompts of {low} to {high} tokens,")
    print(f"exactly {job['tokens']} new tokens a sample, one update a step, {threads} threads each, taking turns")
    for name, side in facts.items():
        print(f"  {name}: {json.dumps({k: v for k, v in side.items() if k != 'dtypes'})}")
    load = machine.load_average()
    if load is not None and load > threads + 0.5:
        print(f"  warning: load average {load}: this machine is busy with something else", flush=True)


def report(first: str, second: str, result: dict[str, Any], details: list[dict[str, Any]]) -> None:
    """The outcome for people."""
    print(f"\nseconds a step, median:  {first} {Spread(**result[first]).text(' s')}")
    print(f"                         {second} {Spread(**result[second]).text(' s')}")
    print(f"paired ratio {first} / {second}: {Spread(**result[f'{first}/{second}']).text(digits=3)}")
    for name in (first, second):
        if "phases" in details[0][name]:
            phases = {
                phase: Spread.of([d[name]["phases"][phase] for d in details]).median
                for phase in details[0][name]["phases"]
            }
            print(f"{name} by phase, median: " + ", ".join(f"{k} {v:.2f} s" for k, v in phases.items()))


if __name__ == "__main__":
    sys.exit(main())
