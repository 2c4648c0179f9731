"""The ranks of a run and the few collectives the core needs on plain Python values and CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place. With `size` 1 nothing needs an initialised process group."""

    rank: int = 0
    """0 <= rank < size."""
    size: int = 1
    """Number of ranks."""
    local_rank: int = 0
    """Place among the ranks of this host."""
    nodes: int = 1
    """Number of hosts."""

    @property
    def is_main(self) -> bool:
        """Rank 0: writes files and observes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. Values are pickled between our own ranks only."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_main(self, value: T) -> list[T]:
        """Every rank's value, by rank, on rank 0; nothing elsewhere. For what is large. Pickled like `gather`."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=source)
        result: T = box[0]
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: int) -> int:
        """The largest value over ranks; how ranks agree on counts and decisions."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()
