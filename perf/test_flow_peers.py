"""The plain loop computes what we compute, and the comparison refuses unequal work. Not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_rig import GROUP, PROMPTS, STEPS, dit_folder, flow_recipe
from peers.flow_plain import Work, check_same_work, our_recipe, our_side, parse, shared_rows
from peers.plain_dance import UPDATES, PlainDance
from rig import built_run

from mmrl_core.grpo.collect import collect
from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.trainer import learn


def test_plain_loop_computes_the_same(tmp_path: Path) -> None:
    """On our states: the log-probs of our rollout, and the gradient norms of our two updates, within rounding."""
    model = dit_folder(tmp_path / "model")
    plain = PlainDance(model)
    labels = torch.arange(PROMPTS).repeat_interleave(GROUP)
    with built_run(flow_recipe(model, tmp_path), tmp_path) as run:
        batch = collect(run, 1)
        rollouts = batch.rollouts
        states, order = torch.stack(rollouts.payload["states"]), torch.stack(rollouts.payload["steps"])
        layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
        learned = learn(run, batch, 1, layouts)
    assert states.shape[:2] == (PROMPTS * GROUP, STEPS)
    assert order.shape[1] == int((STEPS - 1) * 0.6)

    rows = torch.arange(len(labels))
    log_probs = torch.zeros(order.shape)
    with torch.no_grad():
        for place, step in enumerate(order.unbind(1)):
            sigma, after = (plain.sigma[step + k].view(-1, 1, 1, 1) for k in (0, 1))
            x = states[rows, step]
            mean, std, _ = plain.kernel(plain.network(x, plain.sigma[step], labels), x, sigma, after)
            log_probs[:, place] = plain.log_prob(states[rows, step + 1], mean, std)
    assert torch.allclose(log_probs, rollouts.behaviour_log_probs, atol=1e-5)

    score = torch.tensor([row.score for row in batch.kept], dtype=torch.float64).view(PROMPTS, GROUP)
    spread = (score - score.mean(1, keepdim=True)) / (score.std(1, keepdim=True) + 1e-8)
    advantages = spread.flatten().clamp(-5, 5).float()
    old = torch.zeros(len(rows), STEPS - 1).scatter_(1, order, rollouts.behaviour_log_probs)
    norms = [
        plain.update(labels[part], states[part], old[part], advantages[part], order[part])
        for part in rows.chunk(UPDATES)
    ]
    assert learned["grad_norm"] == pytest.approx(sum(norms) / UPDATES, rel=1e-3)


def test_equal_work_is_accepted_and_other_work_is_refused() -> None:
    trained = PROMPTS * GROUP * 9
    rows = PROMPTS * GROUP * STEPS + trained
    done = Work(rows=3 * rows, trained_rows=3 * trained, updates=6)
    check_same_work({"ours": done, "plain": done}, 3)
    less = Work(rows=3 * rows, trained_rows=3 * trained - 1, updates=6)
    more = Work(rows=3 * rows + 1, trained_rows=3 * trained, updates=6)
    once = Work(rows=3 * rows, trained_rows=3 * trained, updates=3)
    claims = Work(rows=3 * rows, shared=150, trained_rows=3 * trained, updates=6)
    check_same_work({"ours": Work(rows=3 * (rows - 150), shared=150, trained_rows=3 * trained, updates=6)}, 3)
    for other in (less, more, once, claims):
        with pytest.raises(SystemExit, match="plain has done"):
            check_same_work({"ours": done, "plain": other}, 3)


@pytest.mark.parametrize("options", [[], ["--no-share"], ["--max-rows", "24"]])
def test_our_shared_rows_are_known_beforehand(tmp_path: Path, options: list[str]) -> None:
    arguments = parse(options)
    values = our_recipe(flow_recipe(dit_folder(tmp_path / "model", depth=1, width=16), tmp_path), arguments)
    shared = shared_rows(arguments)
    assert shared == {"": 150, "--no-share": 0, "--max-rows": 160 - 13}[options[0] if options else ""]
    with built_run(values, tmp_path) as run:
        _, step, work = our_side(run, shared)
        step()
    check_same_work({"ours": work}, 1)


def test_work_is_counted_in_network_and_optimizer(tmp_path: Path) -> None:
    plain, work = PlainDance(dit_folder(tmp_path / "model", depth=1, width=16)), Work()
    work.watch(plain.network, plain.optimizer)
    plain.step()
    check_same_work({"plain": work}, 1)
