"""An update of a text model in one packed row against two padded passes, taking turns in one process.

    OMP_NUM_THREADS=2 python perf/packed_rows.py --tokens 64           # every response has 64 tokens
    OMP_NUM_THREADS=2 python perf/packed_rows.py --tokens 64 --ends    # responses end where they like

SmolLM2-135M-Instruct in fp32, 4 prompts x 8 samples. Log-probs of both ways must agree to 1e-3, or the comparison ends.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers.pairs import Spread, keep, summary
from rig import built_run, text_recipe
from test_text import whole_minibatch

from mmrl_core.grpo.collect import collect
from mmrl_core.grpo.losses import build_loss
from mmrl_core.packaged_models import local_path
from mmrl_core.perf import machine
from mmrl_core.text.packing import ATTENTION

WAYS = (ATTENTION, "sdpa")


def main() -> int:
    """Exit status 0 when the comparison was valid, whatever came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="longest response")
    parser.add_argument("--ends", action="store_true", help="end tokens end responses")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one that is not counted")
    arguments = parser.parse_args()
    sampling = {"max_new_tokens": arguments.tokens, "temperature": 1.0, "ignore_eos": not arguments.ends}
    with tempfile.TemporaryDirectory(prefix="mmrl-packed-") as scratch:
        folder = Path(scratch)
        recipe = text_recipe(str(local_path("mmrl:smollm2-135m-instruct")), folder, sampling=sampling)
        with built_run(recipe, folder) as run:
            backend: Any = run.backend
            model = backend.module.model
            batch = collect(run, 1)
            minibatch, loss = whole_minibatch(run, batch), build_loss(run.recipe.algorithm)
            log_probs = []
            for way in WAYS:
                model.set_attn_implementation(way)
                log_probs.append(backend.replay(batch.rollouts).log_probs)
            torch.testing.assert_close(*log_probs, rtol=0, atol=1e-3)
            pairs = []
            for number in range(arguments.pairs + 1):
                times = []
                for way in WAYS:
                    model.set_attn_implementation(way)
                    start = time.perf_counter()
                    backend.update(minibatch, loss)
                    times.append(time.perf_counter() - start)
                print(
                    f"packed {times[0]:.3f} s   two passes {times[1]:.3f} s   ratio {times[0] / times[1]:.3f}",
                    flush=True,
                )
                if number:
                    pairs.append((times[0], times[1]))
    result = {
        "fingerprint": machine.fingerprint(torch.get_num_threads()),
        "versions": machine.versions(["mmrl-core", "torch", "transformers"]),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "job": {"sampling": sampling, "lengths": batch.rollouts.mask.sum(-1).tolist()},
        "pairs": pairs,
        "summary": summary("packed", "two passes", pairs),
    }
    print(f"paired ratio packed / two passes: {Spread(**result['summary']['packed/two passes']).text(digits=3)}")
    name = f"packed_rows_{arguments.tokens}{'_ends' if arguments.ends else ''}.json"
    keep(result, machine.REPOSITORY / "runs" / "perf" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
