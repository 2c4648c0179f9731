"""Moving what a process holds to the host and back, in place: views and buffers that share memory go on sharing it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class Offloaded:
    """Memory on its way between a device and the host.

    Megatron's parameters are views of large buffers, which `Module.to` would tear apart. So the memory itself is put
    away: each tensor keeps its place in it.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[UntypedStorage, Tensor]] = []
        self._dropped: list[tuple[UntypedStorage, int]] = []

    @torch.no_grad()
    def put_away(self, keep: Iterable[Tensor], drop: Iterable[Tensor]) -> None:
        """Copy the memory of `keep` to the host and free it; free that of `drop`, which is all zero when it is back."""
        assert not self._kept, "put away twice"
        for storage in _memory(drop):
            self._dropped.append((storage, storage.nbytes()))
            storage.resize_(0)
        for storage in _memory(keep):
            self._kept.append((storage, _bytes(storage).to("cpu", copy=True)))
            storage.resize_(0)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Undo `put_away`; without one nothing happens."""
        for storage, copy in self._kept:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy)
        for storage, size in self._dropped:
            storage.resize_(size)
            _bytes(storage).zero_()
        self._kept.clear()
        self._dropped.clear()


def _memory(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The allocations behind some tensors, each once; those freed already left out."""
    found = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return [storage for storage in found.values() if storage.nbytes()]


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
