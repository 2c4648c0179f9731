import subprocess
import sys

import pytest

from mmrl_core.data.order import EpochOrder


def rows(order: EpochOrder, start: int, stop: int) -> list[int]:
    return [order.row(i) for i in range(start, stop)]


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    order = EpochOrder(50, seed=3)
    epochs = [rows(order, 50 * e, 50 * (e + 1)) for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_any_position_is_the_same_whatever_was_asked_before() -> None:
    walked, jumped = EpochOrder(7, seed=0), EpochOrder(7, seed=0)
    forward = rows(walked, 0, 100)
    assert [jumped.row(i) for i in reversed(range(100))] == forward[::-1]
    assert rows(EpochOrder(7, seed=1), 0, 100) != forward


def test_without_shuffling_rows_repeat_in_order() -> None:
    assert rows(EpochOrder(3, seed=9, shuffle=False), 0, 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("seed", [0, 2**40])
def test_another_process_has_the_same_order(seed: int) -> None:
    code = f"from mmrl_core.data.order import EpochOrder as E; print([E(20, {seed}).row(i) for i in range(45)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(rows(EpochOrder(20, seed), 0, 45))


def test_the_order_is_pinned_so_that_old_runs_can_be_resumed() -> None:
    assert rows(EpochOrder(8, seed=7), 0, 16) == PINNED


PINNED = [7, 4, 6, 1, 5, 0, 2, 3, 7, 4, 3, 0, 1, 5, 2, 6]
