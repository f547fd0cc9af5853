"""DenseNet blocks on the CPU against plain torch: training steps, evaluation, the paper's network, densenet121.

Each row: milliseconds of ours, eager and (DNL_BENCH_COMPILE=1: compiling takes minutes) torch.compile, the ratios, the
share of the FMA ceiling, and memory: what is kept for backward and the most that a step holds. Medians, alternating in
one process. The rows go to bench/results/dnl_block.json.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import harness
import pytest
import torch
from torch import nn

from dnl_kernels.nn import DNLBlock, DNLNet

COMPILE = os.environ.get("DNL_BENCH_COMPILE", "0") == "1"
ROUNDS = int(os.environ.get("DNL_BENCH_ROUNDS", "5"))


class Case(NamedTuple):
    layers: int
    growth: int = 6
    size: int = 32
    batch: int = 64
    channels: int = 12
    train: bool = True
    bar: float = 0.0  # eager / ours that issue 3 asks for

    def flops(self) -> int:
        """Of the convolutions: forward, and twice that backward."""
        reads = sum(self.channels + i * self.growth for i in range(self.layers))
        return (3 if self.train else 1) * 2 * 9 * reads * self.growth * self.batch * self.size**2


CASES = {
    "train-L16": Case(16, bar=5.0),
    "train-L32": Case(32, bar=7.0),
    "train-L16-G12": Case(16, growth=12, bar=3.0),
    "train-L32-16x16": Case(32, size=16, bar=3.0),
    "train-L32-8x8": Case(32, size=8, bar=3.0),
    "eval-L16": Case(16, batch=32, train=False, bar=9.0),
    "eval-L32": Case(32, batch=32, train=False, bar=7.0),
}
DEPTHS = (4, 8, 16, 32, 64)


class PlainBlock(nn.Module):
    """BN-ReLU-conv on the concatenation, in plain torch."""

    def __init__(self, channels: int, layers: int, growth: int):
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)

    def forward(self, x):
        states = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            states.append(conv(torch.relu(norm(torch.cat(states, 1)))))
        return torch.cat(states, 1)


def compare(name, ours, plain, x, train, flops=0, bar=0.0, compiled=COMPILE, memory=True):
    """The row of two modules on the same input."""
    modules = {"ours": ours, "eager": plain}
    if compiled:
        modules["compile"] = torch.compile(plain)

    def call(module):
        if not train:
            with torch.no_grad():
                return module(x)
        module.zero_grad()
        module(x).sum().backward()

    times = harness.alternate({n: lambda m=m: call(m) for n, m in modules.items()}, rounds=ROUNDS)
    row = {"case": name, **{f"{n}_ms": round(t * 1e3, 2) for n, t in times.items()}}
    row |= {f"{n}_over_ours": round(t / times["ours"], 2) for n, t in times.items() if n != "ours"}
    row["bar"] = bar
    if flops:
        row["gflops"] = round(flops / times["ours"] / 1e9, 1)
        row["of_fma_ceiling"] = round(flops / times["ours"] / harness.fma_ceiling(), 3)
    if train and memory:
        for n in ("ours", "eager"):
            module = modules[n]
            kept = harness.saved_bytes(lambda m=module: m(x), exclude=list(module.parameters()))
            row[f"{n}_saved_mib"] = round(kept / harness.MIB, 1)
            row[f"{n}_peak_mib"] = round(harness.peak_allocated(lambda m=module: call(m)) / harness.MIB, 1)
    return row


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    harness.save("dnl_block", found)


@pytest.mark.parametrize("name", CASES)
def test_block(rows, name):
    case = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.size, case.size, requires_grad=case.train)
    ours, plain = (kind(case.channels, case.layers, case.growth).train(case.train) for kind in (DNLBlock, PlainBlock))
    rows.append(compare(name, ours, plain, x, case.train, case.flops(), case.bar))


def test_time_follows_the_flops(rows):
    for depth in DEPTHS:
        case = Case(depth, batch=16)
        x = torch.randn(case.batch, case.channels, case.size, case.size, requires_grad=True)
        ours = DNLBlock(case.channels, depth, case.growth)
        seconds = harness.alternate({"ours": lambda m=ours, x=x: m(x).sum().backward()}, rounds=ROUNDS)["ours"]
        gflops = case.flops() / seconds / 1e9
        rows.append({"case": f"depth-{depth}-B16", "ours_ms": round(seconds * 1e3, 2), "gflops": round(gflops, 1)})


def test_paper_network(rows):
    """One SGD step of DNLNet.paper(L=16) on 28 x 28 images."""
    torch.manual_seed(0)
    nets = {"ours": DNLNet.paper(num_layers=16), "eager": DNLNet.paper(num_layers=16)}
    for name, module in list(nets["eager"].named_modules()):
        if isinstance(module, DNLBlock):
            config = module.config
            plain = PlainBlock(config.in_channels, config.num_layers, config.growth_rate)
            parent, _, child = name.rpartition(".")
            setattr(nets["eager"].get_submodule(parent), child, plain)
    x = torch.randn(64, next(nets["ours"].parameters()).shape[1], 28, 28)
    labels = torch.randint(0, 10, (64,))
    optimisers = {n: torch.optim.SGD(net.parameters(), 0.01, momentum=0.9) for n, net in nets.items()}

    def step(name):
        optimisers[name].zero_grad()
        nn.functional.cross_entropy(nets[name](x), labels).backward()
        optimisers[name].step()

    times = harness.alternate({n: lambda n=n: step(n) for n in nets}, rounds=ROUNDS)
    row = {"case": "DNLNet.paper-L16-28x28", **{f"{n}_ms": round(t * 1e3, 2) for n, t in times.items()}}
    rows.append(row | {"eager_over_ours": round(times["eager"] / times["ours"], 2), "bar": 3.5})


def test_densenet121(rows):
    """A training step of torchvision's densenet121, B=4, 224 x 224, against the same network with our blocks."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    plain, ours = (torchvision.models.densenet121() for _ in range(2))
    for name in ("denseblock1", "denseblock2", "denseblock3", "denseblock4"):
        setattr(ours.features, name, DNLBlock.from_torchvision(getattr(ours.features, name)))
    row = compare("densenet121-B4-224", ours, plain, torch.randn(4, 3, 224, 224), True, bar=1.0, compiled=False)
    rows.append(row)
