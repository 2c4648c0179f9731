"""The fused operators as their documentation defines them, in plain PyTorch on any device: what the vendor's formulas
say, with the limits that it states, written without a look at the code that calls them.

Imports nothing of the device, so that tests can put these operators in the place of torch_npu on a CPU, too.
"""

from __future__ import annotations

import collections
import math

import torch
from torch import Tensor

__all__ = ["npu_fusion_attention", "npu_geglu", "npu_gelu", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

CALLS: collections.Counter[str] = collections.Counter()
"""How often each operator ran."""


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = self / rms(self) * gamma; and 1 / rms, in float32."""
    CALLS["npu_rms_norm"] += 1
    assert self.dtype == gamma.dtype, "gamma must have the dtype of the input"
    assert self.shape[self.ndim - gamma.ndim :] == gamma.shape
    mean_square = torch.mean(torch.pow(self.to(torch.float32), 2.0), dim=-1, keepdim=True)
    reciprocal = 1.0 / torch.sqrt(mean_square + epsilon)
    return (self.to(torch.float32) * reciprocal * gamma.to(torch.float32)).to(self.dtype), reciprocal


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    """A * sigmoid(A) * B of the halves A, B along `dim`."""
    CALLS["npu_swiglu"] += 1
    a, b = torch.split(self, self.shape[dim] // 2, dim=dim)
    return (a.float() * torch.sigmoid(a.float()) * b.float()).to(self.dtype)


def npu_gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    """x * Phi(x), or its approximation by tanh."""
    CALLS["npu_gelu"] += 1
    assert approximate in ("none", "tanh")
    x = self.float()
    if approximate == "none":
        bell = 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    else:
        bell = 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return (x * bell).to(self.dtype)


def npu_geglu(self: Tensor, dim: int = -1, approximate: int = 1) -> tuple[Tensor, Tensor]:
    """(A * gelu(B), gelu(B)) of the halves A, B along `dim`; `approximate` 1 is tanh's form. None of our patches calls
    it: diffusers' GEGLU does, wherever torch_npu can be imported."""
    CALLS["npu_geglu"] += 1
    a, b = torch.split(self, self.shape[dim] // 2, dim=dim)
    active = torch.nn.functional.gelu(b, approximate="tanh" if approximate == 1 else "none")
    return a * active, active


def npu_rotary_mul(
    self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """r1 * x + r2 * rotated(x), with the documented limits on layouts and sizes."""
    CALLS["npu_rotary_mul"] += 1
    assert rotate is None
    assert self.ndim == r1.ndim == r2.ndim == 4
    assert self.dtype == r1.dtype == r2.dtype
    width = self.shape[-1]
    assert r1.shape == r2.shape
    assert r1.shape[-1] == width
    assert width % 2 == 0 and width < 896  # noqa: PT018
    same = [a == b for a, b in zip(self.shape[:3], r1.shape[:3], strict=True)]
    one = [b == 1 for b in r1.shape[:3]]
    if rotary_mode == "half":
        assert all(a or b for a, b in zip(same, one, strict=True))
        rotated = torch.cat((-self[..., width // 2 :], self[..., : width // 2]), dim=-1)
    else:
        assert rotary_mode == "interleave"
        assert r1.shape[0] == 1 and one[1] != one[2], "11SD for BNSD, 1S1D for BSND"  # noqa: PT018
        rotated = torch.empty_like(self)
        rotated[..., 0::2], rotated[..., 1::2] = -self[..., 1::2], self[..., 0::2]
    return r1 * self + r2 * rotated


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """softmax(scale * q k^T with True of the mask left out) v. A row with nothing left gives zeros, if
    `inner_precise` is 2; else its result is undefined, here NaN."""
    CALLS["npu_fusion_attention"] += 1
    assert pse is None
    assert padding_mask is None
    assert keep_prob == 1.0
    assert query.dtype == key.dtype == value.dtype
    assert input_layout in ("BNSD", "BSND")
    if input_layout == "BSND":
        query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    assert query.shape[1] == head_num
    assert key.shape == value.shape
    assert head_num % key.shape[1] == 0
    rows, columns = query.shape[2], key.shape[2]
    group = head_num // key.shape[1]
    score = scale * torch.einsum("bngsd,bntd->bngst", query.float().unflatten(1, (-1, group)), key.float()).flatten(
        1, 2
    )
    if sparse_mode == 2:
        assert atten_mask is not None
        assert atten_mask.shape == (2048, 2048)
        assert bool((atten_mask == torch.triu(torch.ones_like(atten_mask), 1)).all())
        left_out = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
    else:
        assert sparse_mode == 0
        left_out = torch.zeros(rows, columns, dtype=torch.bool, device=query.device)
        if atten_mask is not None:
            assert atten_mask.dtype in (torch.bool, torch.uint8)
            assert atten_mask.is_contiguous()
            assert atten_mask.shape[-2:] == (rows, columns)
            assert atten_mask.ndim == 2 or (
                atten_mask.shape[0] in (1, query.shape[0]) and atten_mask.shape[1] in (1, head_num)
            )
            left_out = atten_mask.bool()
    left_out = left_out.expand(score.shape)
    empty = left_out.all(-1, keepdim=True)
    weight = torch.softmax(score.masked_fill(left_out & ~empty, -math.inf), dim=-1)
    weight = weight.masked_fill(empty, 0.0 if inner_precise == 2 else math.nan)
    out = torch.einsum("bngst,bntd->bngsd", weight.unflatten(1, (-1, group)), value.float()).flatten(1, 2)
    out = out.to(query.dtype)
    if input_layout == "BSND":
        out = out.permute(0, 2, 1, 3).contiguous()
    nothing = query.new_empty(0)
    return out, nothing, nothing, nothing, 0, 0, 0


OPERATORS = (npu_rms_norm, npu_swiglu, npu_gelu, npu_rotary_mul, npu_fusion_attention)
"""Those that patches call."""
