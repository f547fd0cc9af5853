"""One run of a sweep: a network of one depth, trained from one seed, with a checkpoint after every epoch.

Nothing random is carried from step to step: initial weights and the order of the images are functions of the seed, the
depth, the repeat and the epoch. A run that continues from a checkpoint is therefore the run that was never stopped, bit
for bit (on the same machine, with as many threads and ranks).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..theory.cascade import refine
from . import checkpoint, model
from .config import Config
from .data import Images
from .errors import Stopped, UsageError
from .ranks import Ranks

POLL = 0.2  # seconds between two looks at the loss, which on a GPU wait for it

Record = dict[str, Any]


class Watch:
    """Is told how a run goes. This one looks away."""

    def begin(self, depth: int, repeat: int, epoch: int) -> None:
        """An epoch begins."""

    def step(self, done: int, steps: int, loss: float, rate: float) -> None:
        """`done` of the epoch's steps are done; its mean loss so far and images/s."""

    def epoch(self, record: Record) -> None:
        """An epoch is over and its checkpoint stored."""

    def say(self, text: str) -> None:
        """Something that the user should know."""


def derive(*key: object) -> int:
    """A seed for torch that is a function of the key, unlike for unlike keys."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def folder_of(out: pathlib.Path, depth: int, repeat: int) -> pathlib.Path:
    return out / f"L{depth}-repeat{repeat}"


def begun(out: pathlib.Path) -> list[tuple[int, int]]:
    """(depth, repeat) of every run with a folder in `out`."""
    matches = (re.fullmatch(r"L(\d+)-repeat(\d+)", path.name) for path in sorted(out.iterdir()))
    return [(int(match[1]), int(match[2])) for match in matches if match]


def batches(count: int, batch_size: int, seed: int, ranks: Ranks) -> Sequence[Tensor]:
    """A random order of `count` images in batches. A rest of fewer than two images for each rank, of which batch norm
    could take no variance, joins the batch before it.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = list(order.to(ranks.device).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) < 2 * ranks.size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@dataclasses.dataclass(frozen=True)
class Run:
    """One network: its place in the sweep, its images, and who does the work."""

    config: Config
    depth: int
    repeat: int
    out: pathlib.Path
    ranks: Ranks
    watch: Watch
    data: Images
    test: Images | None = None

    @property
    def folder(self) -> pathlib.Path:
        return folder_of(self.out, self.depth, self.repeat)

    def train(self) -> list[Record]:
        """Trains until config.epochs, from the last checkpoint where there is one. Returns one record per epoch.

        Raises:
            Stopped: the loss is no longer finite, or a checkpoint cannot be written.
        """
        config, ranks = self.config, self.ranks
        if config.cascade is not None and ranks.size > 1:
            raise UsageError(f"--cascade trains in one process; it was started with {ranks.size} ranks")
        yardstick = matmul_rate(ranks.device, config.precision) * ranks.size
        torch.manual_seed(derive(config.seed, self.depth, self.repeat))
        found = ranks.from_main(restore(config, self.folder, self.watch) if ranks.main else None)
        history: list[Record] = [] if found is None else found.facts["history"]
        layers = config.layers(self.depth, max(1, len(history)))
        network = self._placed(model.build(config, layers, self.data))
        size = self._size(layers, network)
        parallel = ranks.wrap(network, config.parallel)
        optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=config.momentum)
        if found is not None:
            state = tensors(parallel, optimizer)
            checkpoint.load(found.path, state, ranks)
            set_state_dict(parallel, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        call: Any = torch.compile(parallel) if config.compile else parallel

        for epoch in range(len(history) + 1, config.epochs + 1):
            self.watch.begin(self.depth, self.repeat, epoch)
            started = time.perf_counter()
            while layers < config.layers(self.depth, epoch):
                torch.manual_seed(derive(config.seed, self.depth, self.repeat, "refined", layers))
                network, optimizer = refine(network, optimizer)
                parallel = call = network = self._placed(network)
                layers *= 2
                size = self._size(layers, network)
            losses = self.epoch(epoch, network, call, optimizer)
            seconds = time.perf_counter() - started
            rate = len(self.data.labels) / seconds
            ranks.average_statistics(network)
            tests = evaluate(parallel, self.test, ranks) if self.test else {}
            share = rate * size["flops"] / len(self.data.labels) / yardstick
            speed = {"seconds": seconds, "images_per_second": rate, "share_of_matmul_rate": share}
            place = {"depth": self.depth, "repeat": self.repeat, "epoch": epoch}
            history.append(place | size | losses | tests | speed)
            facts = {"history": history, "config": config.fixed()}
            checkpoint.save(self.folder, epoch, tensors(parallel, optimizer), facts, ranks)
            self.watch.epoch(history[-1])
        return history

    def _size(self, layers: int, network: nn.Module) -> Record:
        """Of the network that trains in an epoch: its layers, its parameters and the operations of the epoch."""
        parameters = sum(p.numel() for p in network.parameters())
        flops = model.flops(self.config, layers, self.data) * len(self.data.labels)
        return {"layers": layers, "parameters": parameters, "flops": flops}

    def _placed(self, network: nn.Module) -> nn.Module:
        network = network.to(self.ranks.device)
        return network.to(memory_format=torch.channels_last) if self.config.channels_last else network

    def epoch(self, epoch: int, network: nn.Module, call: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One pass of SGD over `network`, which `call` runs. Returns the mean, over the images, of the loss that each
        had in its step, and the regularizer after the last one, where there is one.
        """
        config, ranks, data = self.config, self.ranks, self.data
        # The same order for every depth, so that the depths are compared on the same batches.
        order = batches(len(data.labels), config.batch_size, derive(config.seed, self.repeat, epoch), ranks)
        call.train()
        losses = torch.zeros(len(order), device=ranks.device)
        seen, all_seen, started = 0, 0, time.perf_counter()
        polled = started
        for step, batch in enumerate(order, 1):
            images, labels = data.batch(ranks.share(batch))
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = nn.functional.cross_entropy(call(images), labels)
            losses[step - 1] = loss.detach() * len(labels)
            objective = loss * ranks.weight(batch)
            optimizer.zero_grad()
            if config.regularizer:
                with ranks.gathered(network):
                    (objective + config.regularizer * model.regularizer(network)).backward()
            else:
                objective.backward()
            optimizer.step()
            seen, all_seen, now = seen + len(labels), all_seen + len(batch), time.perf_counter()
            if now - polled > POLL or step == len(order):
                polled = now
                self.check_finite(losses, epoch)
                mean = losses.double().sum().item() / seen
                self.watch.step(step, len(order), mean, all_seen / (now - started))
        total = {"train_loss": ranks.total(losses.double().sum()).item() / len(data.labels)}
        if config.regularizer:
            with torch.no_grad(), ranks.gathered(network):
                total["regularizer"] = model.regularizer(network).item()
        return total

    def check_finite(self, losses: Tensor, epoch: int) -> None:
        """Raises Stopped, with the place and the checkpoint to go back to, where a loss is not finite."""
        if not losses.isfinite().all():
            step = int(losses.isfinite().logical_not().nonzero()[0])
            last = next(iter(checkpoint.stored(self.folder)), None)
            raise Stopped(
                f"the loss became {losses[step].item()} in step {step + 1} of epoch {epoch} (L = {self.depth}, repeat "
                f"{self.repeat}); last good checkpoint: {last}; a smaller --lr or another --norm may help"
            )


def tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.Tensors:
    """What a checkpoint stores, under names that do not depend on how the network is spread over ranks."""
    model, state = get_state_dict(network, optimizer)
    return {"model": model, "optimizer": state}


def restore(config: Config, folder: pathlib.Path, watch: Watch) -> checkpoint.Found | None:
    """The checkpoint that the run in `folder` continues from; None where it starts."""
    found = checkpoint.latest(folder, watch.say)
    if found is not None:
        config.check_same(found.facts["config"], folder)
    return found


@torch.no_grad()
def evaluate(network: nn.Module, test: Images, ranks: Ranks) -> dict[str, float]:
    """Mean loss and accuracy on the test split, shared by the ranks, with the running statistics."""
    network.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for index in torch.arange(len(test.labels), device=ranks.device).split(256 * ranks.size):
        images, labels = test.batch(ranks.share(index))
        scores = network(images)
        total[0] += nn.functional.cross_entropy(scores, labels, reduction="sum")
        total[1] += (scores.argmax(1) == labels).sum()
    loss, right = (ranks.total(total) / len(test.labels)).tolist()
    return {"test_loss": loss, "test_accuracy": right}


@functools.cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here, the yardstick for a network's: the best within a tenth of a second, after
    one to warm up (bfloat16 is slow on processors that lack it).
    """
    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < 0.1:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # on a GPU: waits
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])
