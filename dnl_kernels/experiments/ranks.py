"""Data-parallel training under torchrun: the same program on every rank, each with its share of every batch.

The shares of a batch depend on its order and the number of ranks only. Gradients are averaged with the weight of each
share, so that a step is that of one process on the whole batch, to rounding. Batch norm is the exception: it normalises
by the statistics of each rank's own share, as DistributedDataParallel does by itself, and the running statistics are
averaged over the ranks after every epoch. There is no SyncBatchNorm: DNLBlock takes the statistics of a state once, in
the pass that writes it, for all layers that read it, and a sum over ranks would have to happen inside that pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

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

    def wrap(self, model: nn.Module, how: str = "ddp") -> nn.Module:
        """The model with its gradients averaged over the ranks; for "fsdp" with its parameters shared out to them,
        each block gathering its own while it runs.
        """
        if self.size == 1:
            return model
        if how == "ddp":
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, the parameters of the blocks are whole on every rank."""
        sharded = [block for block in blocks(model) if isinstance(block, FSDPModule)]
        for block in sharded:
            block.unshard()
        yield
        for block in sharded:
            block.reshard()

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Gives all ranks the mean of their running statistics."""
        if self.size > 1:
            for buffer in filter(Tensor.is_floating_point, model.buffers()):
                dist.all_reduce(buffer)
                buffer.div_(self.size)

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


def blocks(model: nn.Module) -> list[nn.Module]:
    from ..nn import DNLBlock

    return [module for module in model.modules() if isinstance(module, DNLBlock)]


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
