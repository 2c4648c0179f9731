"""A whole rollout against the published loop in float64, and the corners of windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmrl_core.flow.kernels import ode_table, step_table
from mmrl_core.flow.schedule import linear_sigmas
from mmrl_core.flow.trajectory import Course, Trajectory, Velocity, denoise, draw_noise

SHAPE = (2, 3, 3)


def velocity(x: Tensor, time: Tensor, rows: Tensor | None = None) -> Tensor:
    """Smooth and different everywhere."""
    return torch.tanh(0.7 * x + time.view(-1, 1, 1, 1)) - 0.3 * x


def run(
    starts: list[int],
    length: int,
    *,
    steps: int = 6,
    noise: float = 0.4,
    kernel: str = "dance",
    guard: bool = False,
    groups: list[int] | None = None,
    shared: bool = False,
    network: Velocity = velocity,
) -> tuple[Trajectory, Tensor, Tensor, Tensor]:
    """`groups`: rows with one number start from one noise; `shared`: and are computed once until they part."""
    sigmas = linear_sigmas(steps, 3.0)
    seeds = range(len(starts))
    start, z = draw_noise(groups or seeds, 1, SHAPE)[:, 0], draw_noise([100 + s for s in seeds], length, SHAPE)
    course = Course(
        sigmas=sigmas,
        times=sigmas,
        stochastic=step_table(sigmas, kernel, noise),  # type: ignore[arg-type]
        deterministic=ode_table(sigmas),
        kernel=kernel,  # type: ignore[arg-type]
        starts=torch.tensor(starts),
        length=length,
        guard=guard,
        alike=torch.tensor(groups) if shared else None,
    )
    return denoise(network, start, z, course), sigmas, start, z


def published(
    sigmas: Tensor, x: Tensor, z: Tensor, first: int, length: int, eta: float
) -> tuple[list[Tensor], list[float], Tensor]:
    """One row of DanceGRPO's loop: (states around stochastic steps, log-probs, x0 of the last step)."""
    levels, x, z = sigmas.double().tolist(), x.double(), z.double()
    states, chosen = [], []
    for i in range(len(levels) - 1):
        s, following = levels[i], levels[i + 1]
        v = velocity(x[None], torch.tensor([s], dtype=torch.float64))[0]
        if i == len(levels) - 2:
            return [*states, x][: length + 1] if len(states) == length else states, chosen, x - s * v
        if first <= i < first + length:
            states.append(x)
            x0 = x - s * v
            score = -(x - (1 - s) * x0) / s**2
            mean = x + (following - s) * v - 0.5 * eta**2 * score * (following - s)
            std = eta * math.sqrt(s - following)
            x = mean + std * z[i - first]
            logp = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
            chosen.append(float(logp.mean()))
            if i == first + length - 1:
                states.append(x)
        else:
            x = x + (following - s) * v
    raise AssertionError


@pytest.mark.parametrize(("starts", "length"), [([0, 0, 0], 5), ([1, 1], 2), ([0, 3, 2, 1], 2), ([4, 0], 1)])
def test_a_rollout_is_the_published_loop(starts: list[int], length: int) -> None:
    done, sigmas, start, z = run(starts, length)
    for row, first in enumerate(starts):
        states, chosen, final = published(sigmas, start[row], z[row], first, length, 0.4)
        assert len(states) == length + 1
        assert (done.states[row].double() - torch.stack(states)).abs().max() < 5e-6
        assert (done.log_probs[row].double() - torch.tensor(chosen).double()).abs().max() < 5e-6
        assert (done.final[row].double() - final).abs().max() < 5e-6


def test_a_row_does_not_know_its_neighbours() -> None:
    together, *_ = run([0, 3, 2], 2)
    alone, *_ = run([0], 2)
    assert torch.equal(together.states[0], alone.states[0])
    assert torch.equal(together.log_probs[0], alone.log_probs[0])


@pytest.mark.parametrize(
    ("groups", "starts", "length", "computed"),
    [
        ([0, 0, 0, 4, 4], [0, 0, 0, 0, 0], 5, [2, 5, 5, 5, 5, 5]),  # part after the first step
        ([7, 7, 7, 5, 5], [2, 2, 2, 0, 0], 2, [2, 3, 3, 5, 5, 5]),  # each group at the beginning of its window
        ([0, 1, 2], [1, 0, 1], 2, [3, 3, 3, 3, 3, 3]),  # groups of one
        ([3, 3, 3], [0, 0, 0], 0, [1, 1, 1, 1, 1, 1]),  # never
    ],
)
@pytest.mark.parametrize("guard", [False, True])
def test_rows_that_noise_has_not_parted_are_computed_once(
    groups: list[int], starts: list[int], length: int, computed: list[int], guard: bool
) -> None:
    rows: list[int] = []

    def network(x: Tensor, time: Tensor, which: Tensor | None) -> Tensor:
        assert len(x) == len(time) == (len(starts) if which is None else len(which))
        rows.append(len(x))
        return velocity(x, time)

    shared, *_ = run(starts, length, guard=guard, groups=groups, shared=True, network=network)
    alone, *_ = run(starts, length, guard=guard, groups=groups)
    assert rows == computed
    for name in ("states", "log_probs", "means", "final"):
        ours, theirs = getattr(shared, name), getattr(alone, name)
        assert (ours is theirs is None) or torch.equal(ours, theirs), name


def test_without_stochastic_steps_nothing_is_recorded() -> None:
    done, sigmas, start, _ = run([0, 0], 0)
    assert done.states.shape[:2] == (2, 0)
    assert done.log_probs.shape == (2, 0)
    x = start.double()
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]).double() * velocity(x, sigmas[i].double().expand(2))
    assert (done.final.double() - x).abs().max() < 5e-6, "x0 of the last step is where the ODE ends"


def test_guard_records_means() -> None:
    done, sigmas, _, z = run([1, 0], 3, guard=True)
    assert done.means is not None
    assert not done.log_probs.any()
    std = 0.4 * (sigmas[:-1] - sigmas[1:]).sqrt()
    for row, first in enumerate((1, 0)):
        for place in range(3):
            expected = done.means[row, place] + std[first + place] * z[row, place]
            assert torch.allclose(done.states[row, place + 1], expected, atol=1e-6)


def test_noise_belongs_to_its_seed() -> None:
    assert torch.equal(draw_noise([5, 9], 3, SHAPE)[1], draw_noise([9], 3, SHAPE)[0])
    assert draw_noise([], 3, SHAPE).shape == (0, 3, *SHAPE)
