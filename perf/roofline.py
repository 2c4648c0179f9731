"""How near the text job comes to what this machine can do: the update to its matrix products, generation to its floor.

    eval "$(mmrl env cpu recipes/quickstart.yaml)"    # what a recipe with `launcher.environment: device` runs with
    OMP_NUM_THREADS=2 python perf/roofline.py --threads 2

SmolLM2-135M-Instruct in fp32, 4 prompts x 8 samples of exactly `--tokens` tokens. In each round, one after the other:
the rate of matrix products, an update, our generation, and transformers' `generate` on the same 32 rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers.pairs import Spread, keep
from rig import built_run, requests, text_recipe
from test_text import whole_minibatch

from mmrl_core.grpo.collect import collect
from mmrl_core.grpo.losses import build_loss
from mmrl_core.grpo.run import Run
from mmrl_core.packaged_models import local_path
from mmrl_core.perf import machine
from mmrl_core.text.token_batches import left_pad

MODEL = "mmrl:smollm2-135m-instruct"
SQUARE = ((1536, 1536, 1536),)
"""(rows, in, out) of what is called the rate of the machine."""
OWN = ((512, 576, 1536), (512, 1536, 576), (512, 576, 49152))
"""The products that SmolLM2 spends its time in: perceptron up and down, and the head."""


def main() -> int:
    """Exit status 0 when it could be measured, whatever came out."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="mmrl-roofline-") as scratch:
        folder = Path(scratch)
        sampling = {"max_new_tokens": arguments.tokens, "temperature": 1.0, "ignore_eos": True}
        with built_run(text_recipe(str(local_path(MODEL)), folder, sampling=sampling), folder) as run:
            result = measure(run, arguments)
    report(result)
    target = arguments.out or machine.REPOSITORY / "runs" / "perf" / f"roofline_{arguments.tokens}.json"
    keep(result, target)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of every sample")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file; default runs/perf/roofline_TOKENS.json")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.tokens, arguments.threads) < 1:
        parser.error("--rounds, --tokens and --threads must be at least 1")
    return arguments


def measure(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and rates of each round; one round before them warms up."""
    asked = requests(run)
    batch = collect(run, 1)
    minibatch, loss = whole_minibatch(run, batch), build_loss(run.recipe.algorithm)
    forward = run.policy.flops(batch.rollouts)
    assert forward is not None
    longest = max(len(ids) for ids in batch.rollouts.payload["prompt_ids"])
    generate = peer(run, batch.rollouts.payload["prompt_ids"], arguments.tokens)
    rounds = []
    for number in range(arguments.rounds + 1):
        now = {
            "matmul_flops": matmul_rate(SQUARE),
            "own_matmul_flops": matmul_rate(OWN),
            "memory_bytes_per_second": copy_rate(),
            "update_seconds": seconds(lambda: run.backend.update(minibatch, loss)),
            "our_generation_seconds": seconds(lambda: run.engine.generate(asked, run.sampling)),
            "transformers_seconds": seconds(generate),
        }
        now["update_of_matmul"] = 3 * forward / now["update_seconds"] / now["matmul_flops"]
        now["update_of_own_matmul"] = 3 * forward / now["update_seconds"] / now["own_matmul_flops"]
        now["generation_speedup"] = now["transformers_seconds"] / now["our_generation_seconds"]
        print("warm-up" if number == 0 else f"round {number}", {k: round(v, 3) for k, v in now.items()}, flush=True)
        if number:
            rounds.append(now)
    return {
        "fingerprint": machine.fingerprint(arguments.threads),
        "versions": machine.versions(["mmrl-core", "torch", "transformers"]),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "job": {
            "prompts": 4,
            "group": 8,
            "tokens": arguments.tokens,
            "prompt_tokens": longest,
            "update_flops": 3 * forward,
        },
        "rounds": rounds,
    }


def matmul_rate(shapes: Sequence[tuple[int, int, int]]) -> float:
    """FLOP/s over products of these shapes, each the median of nine."""
    work = spent = 0.0
    for rows, inside, outside in shapes:
        a, b = torch.randn(rows, inside), torch.randn(outside, inside)
        work += 2 * rows * inside * outside
        spent += statistics.median(seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b)) for _ in range(9))
    return work / spent


def copy_rate() -> float:
    """Bytes/s read and written by copying 256 MB, the median of five."""
    source = torch.zeros(64_000_000)
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(5))


def peer(run: Run, prompts: list[torch.Tensor], tokens: int) -> Callable[[], None]:
    """`generate` of transformers on the run's own network: the same prompts, every row with its own."""
    backend: Any = run.backend
    model, policy = backend.module.model, run.policy
    ids, mask = left_pad(prompts, policy.pad_id)

    @torch.no_grad()
    def generate() -> None:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=policy.pad_id,
        )
        assert made.shape == (len(prompts), ids.shape[1] + tokens)

    return generate


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def report(result: dict[str, Any]) -> None:
    """The outcome for people."""
    rounds = result["rounds"]

    def spread(name: str) -> Spread:
        return Spread.of([one[name] for one in rounds])

    square, own = (statistics.median(r[name] for r in rounds) / 1e9 for name in ("matmul_flops", "own_matmul_flops"))
    print(f"\nmatrix products {square:.0f} GFLOP/s, of the model's own shapes {own:.0f}")
    print(f"update {spread('update_seconds').text(' s')}, needs {result['job']['update_flops'] / 1e9:.0f} GFLOP:")
    print(f"  of the rate of matrix products {spread('update_of_matmul').text()}  (bar 0.60)")
    print(f"  of that of the model's own shapes {spread('update_of_own_matmul').text()}")
    print(f"generation {spread('our_generation_seconds').text(' s')}")
    print(f"  transformers {spread('transformers_seconds').text(' s')}")
    print(f"  times as fast as transformers {spread('generation_speedup').text()}  (bar 1.5)")


if __name__ == "__main__":
    sys.exit(main())
