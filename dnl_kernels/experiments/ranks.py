"""Data-parallel training under torchrun: the same program on every rank, each with its share of every batch.

The shares of a batch depend on its order and the number of ranks only. Gradients are averaged with the weight of each
share, so that a step is that of one process on the whole batch, to rounding; batch norm is the exception, it takes the
statistics of each rank's own share (and rank 0's running statistics are the ones kept).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UsageError


class Ranks(NamedTuple):
    """This process (rank of size) and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """The part of a batch [B] that this rank works on."""
        return batch.tensor_split(self.size)[self.rank]

    def weight(self, batch: Tensor) -> float:
        """Of this rank's mean loss, so that the average over ranks is the mean loss of the batch."""
        return self.size * len(self.share(batch)) / len(batch)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def total(self, value: Tensor) -> Tensor:
        """The sum of `value` over the ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def from_main(self, value: Any) -> Any:
        """What rank 0 gave as `value`."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The group of processes that torchrun started (gloo on CPU, NCCL on CUDA), or this process alone."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda' but torch finds no CUDA device; expected cpu")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(torch.device(device))
        return
    local = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(local)
    # torchrun keeps one store over its restarts: without a prefix, a new rank may read the address of a dead one there.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{restarts()}", store)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield Ranks(local, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has replaced this process's group, because a process of it failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
