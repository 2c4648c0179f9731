"""Log-probs and entropy with heads that do more than one product: logits are overwritten, and nobody may miss them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from mmrl_core.text.token_stats import token_stats

TARGETS = torch.tensor([3, 0, 7, 7, 2])
HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": linear,
    "capped": lambda hidden, table: torch.tanh(linear(hidden, table) / 5.0) * 5.0,
    "divided": lambda hidden, table: linear(hidden, table) / 3.0,
    "multiplied": lambda hidden, table: linear(hidden, table) * 0.3,
}


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(5, 6, generator=random), torch.randn(11, 6, generator=random)
    return hidden.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_log_probs_and_entropy(head: str, temperature: float) -> None:
    hidden, table = leaves(torch.float32)
    log_probs, entropy = token_stats(
        lambda rows: HEADS[head](rows, table), hidden, TARGETS, temperature=temperature, logits_bytes=1 << 20
    )
    (log_probs.sum() + 0.7 * entropy.sum()).backward()  # type: ignore[no-untyped-call]
    exact_hidden, exact_table = leaves(torch.float64)
    logs = (HEADS[head](exact_hidden, exact_table) / temperature).log_softmax(-1)
    want = logs.gather(-1, TARGETS[:, None]).sum() - 0.7 * (logs.exp() * logs).sum()
    want.backward()  # type: ignore[no-untyped-call]
    assert exact_hidden.grad is not None
    assert exact_table.grad is not None
    torch.testing.assert_close(log_probs, logs.gather(-1, TARGETS[:, None])[:, 0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, exact_hidden.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table.grad, exact_table.grad.float(), rtol=1e-4, atol=1e-5)


def test_a_head_that_needs_its_own_result_again_is_an_error_and_no_wrong_gradient() -> None:
    hidden, table = leaves(torch.float32)
    log_probs, _ = token_stats(
        lambda rows: torch.tanh(linear(rows, table)), hidden, TARGETS, temperature=1.0, logits_bytes=1 << 20
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()  # type: ignore[no-untyped-call]
