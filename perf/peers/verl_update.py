"""Our update against verl's engine driven by verl's own functions, the two taking turns in one process.

    python perf/peers/verl_update.py --tokens 16 --pairs 6
    python perf/peers/verl_update.py --backend verl-fsdp2    # the same engine, driven by mmrl: the plugin's own cost

Both train the same model from the same weights on the same 32 rows (4 prompts x 8 samples) in one micro-batch: verl by
`train_batch` of its FSDP2 engine, its `ppo_loss`, its AdamW and clipping; ours with `update` of the backend. The first
update starts from equal weights, so their gradient norms must be equal; otherwise the comparison ends with an error.
Needs mmrl-verl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from peers.pairs import Spread, keep, summary
from rig import built_run, text_recipe
from test_text import whole_minibatch
from torch import Tensor

from mmrl_core.contracts import Minibatch
from mmrl_core.grpo.collect import collect
from mmrl_core.grpo.losses import build_loss
from mmrl_core.grpo.run import Run
from mmrl_core.packaged_models import local_path
from mmrl_core.perf import machine
from mmrl_core.text.token_batches import left_pad

SAME_NORM = 1e-3
"""Largest relative difference of the first update's gradient norms. transformers gives the padding token's row of the
embedding no gradient, and verl leaves that as it is."""


def main() -> int:
    """Exit status 0 when the comparison was valid, whatever came out."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    backends = {
        "fsdp2": {"name": "fsdp2", "micro_batch_groups": 4},
        "verl-fsdp2": {"name": "verl-fsdp2", "micro_batch_samples": 32},
    }
    with tempfile.TemporaryDirectory(prefix="mmrl-peers-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        recipe = text_recipe(
            str(local_path(arguments.model)),
            folder,
            backend=backends[arguments.backend],
            sampling={"max_new_tokens": arguments.tokens, "temperature": 1.0, "ignore_eos": True},
        )
        run = stack.enter_context(built_run(recipe, folder))
        if not dist.is_initialized():  # one rank of ours needs no process group, verl's engine does
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        minibatch = off_policy(run, whole_minibatch(run, collect(run, 1)))
        sides = ours(run, minibatch), verls(run, minibatch)
        pairs = take_turns(sides, arguments)
    result = {
        "fingerprint": machine.fingerprint(arguments.threads),
        "versions": machine.versions(["mmrl-core", "mmrl-verl", "verl", "torch", "transformers"]),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "job": {"model": arguments.model, "tokens": arguments.tokens, "backend": arguments.backend},
        "warmup": arguments.warmup,
        "pairs": pairs,
        "summary": summary("ours", "verl", pairs),
    }
    print(f"\nseconds an update, median:  ours {Spread(**result['summary']['ours']).text(' s')}")
    print(f"                            verl {Spread(**result['summary']['verl']).text(' s')}")
    print(f"paired ratio ours / verl: {Spread(**result['summary']['ours/verl']).text(digits=3)}")
    target = arguments.out or machine.REPOSITORY / "runs" / "perf" / f"update_{arguments.backend}_verl.json"
    keep(result, target)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="response tokens of every row")
    parser.add_argument("--pairs", type=int, default=6, help="measured pairs")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="mmrl:smollm2-135m-instruct", help="a folder, or mmrl:NAME")
    parser.add_argument("--backend", default="fsdp2", choices=("fsdp2", "verl-fsdp2"), help="ours")
    parser.add_argument("--out", type=Path, help="JSON file; default runs/perf/update_BACKEND_verl.json")
    arguments = parser.parse_args()
    if min(arguments.pairs, arguments.warmup, arguments.threads) < 1 or arguments.tokens < 2:
        parser.error("--pairs, --warmup and --threads must be at least 1, --tokens at least 2")
    return arguments


def off_policy(run: Run, minibatch: Minibatch) -> Minibatch:
    """The minibatch with drawn advantages (rewards may all be equal, and then there is nothing to train on), and with
    the log-probs of the first weights as the old ones, as verl is given them."""
    drawn = torch.randn(len(minibatch.advantages), generator=torch.Generator().manual_seed(0))
    old = run.backend.replay(minibatch.rollouts).log_probs.clone()
    return replace(minibatch, advantages=drawn, old_log_probs=old)


Side = Callable[[], float]
"""One update; its gradient norm before clipping."""


def ours(run: Run, minibatch: Minibatch) -> Side:
    """The backend's update with the recipe's loss."""
    loss = build_loss(run.recipe.algorithm)
    return lambda: run.backend.update(minibatch, loss)["grad_norm"]


def verls(run: Run, minibatch: Minibatch) -> Side:
    """`train_batch` of verl's engine on the same rows."""
    from mmrl_verl.platforms import choose, engine_class

    choose("cpu")
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding

    rows = len(minibatch.rollouts)
    settings = FSDPEngineConfig(
        strategy="fsdp2",
        model_dtype="fp32",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_remove_padding=False,  # without flash-attention it would mask over the whole pack
        use_dynamic_bsz=False,
        use_torch_compile=False,
        micro_batch_size_per_gpu=rows,
    )
    engine = engine_class("fsdp2")(
        model_config=HFModelConfig(
            path=run.recipe.model.path, use_remove_padding=False, override_config={"attn_implementation": "sdpa"}
        ),
        engine_config=settings,
        optimizer_config=FSDPOptimizerConfig(
            lr=run.recipe.optimizer.lr, clip_grad=1.0, weight_decay=0.0, total_training_steps=10**6
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=run.recipe.algorithm.samples_per_prompt,
        ppo_mini_batch_size=rows,
        ppo_micro_batch_size_per_gpu=rows,
        use_kl_loss=False,
        entropy_coeff=0.0,
    )
    tensors = padded(run, minibatch)

    def update() -> float:
        from tensordict import TensorDict

        data = left_right_2_no_padding(TensorDict({k: v.clone() for k, v in tensors.items()}, batch_size=[rows]))
        tensordict_utils.assign_non_tensor(
            data,
            use_remove_padding=False,
            use_dynamic_bsz=False,
            use_fused_kernels=False,
            micro_batch_size_per_gpu=rows,
            calculate_entropy=False,
            temperature=1.0,
            global_batch_size=rows,
        )
        with engine.train_mode():
            answer = engine.train_batch(data, loss_function=partial(ppo_loss, config=actor))
            engine.lr_scheduler_step()
        norm: float = answer["metrics"]["grad_norm"]
        return norm

    return update


def padded(run: Run, minibatch: Minibatch) -> dict[str, Tensor]:
    """The rows as verl's trainer holds them: prompts padded on the left, responses of equal length after them."""
    rollouts = minibatch.rollouts
    assert minibatch.old_log_probs is not None
    pad: int = run.policy.pad_id  # type: ignore[attr-defined]
    prompts, mask = left_pad(rollouts.payload["prompt_ids"], pad)
    responses = torch.stack(list(rollouts.payload["response_ids"]))
    mask = torch.cat([mask, torch.ones_like(responses)], dim=1)
    return {
        "input_ids": torch.cat([prompts, responses], dim=1),
        "prompts": prompts,
        "responses": responses,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "response_mask": torch.ones_like(responses),
        "advantages": minibatch.advantages[:, None].expand(responses.shape).contiguous(),
        "old_log_probs": minibatch.old_log_probs[:, : responses.shape[1]].clone(),
    }


def take_turns(sides: tuple[Side, Side], arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """A B A B ...: seconds of each measured pair. Raises SystemExit when the first gradients differ."""
    pairs = []
    for number in range(arguments.warmup + arguments.pairs):
        times, norms = [], []
        for side in sides:
            start = time.perf_counter()
            norms.append(side())
            times.append(time.perf_counter() - start)
        if number == 0 and abs(norms[0] - norms[1]) > SAME_NORM * norms[1]:
            raise SystemExit(f"the first gradients have norms {norms[0]} and {norms[1]}: this is not the same work")
        counted = number >= arguments.warmup
        label = f"pair {number - arguments.warmup + 1:3d}" if counted else "warm-up "
        print(
            f"{label}  ours {times[0]:7.3f} s   verl {times[1]:7.3f} s   ratio {times[0] / times[1]:.3f}   "
            f"gradient norms {norms[0]:.6g} {norms[1]:.6g}",
            flush=True,
        )
        if counted:
            pairs.append((times[0], times[1]))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
