"""DNLBlock with a non-local kernel and NonLocal2d against plain torch, and the memory of a long Gaussian.

Each row: milliseconds of ours and of every peer, the ratios peer / ours with their bars, and memory: what is kept for
backward, the most that torch's allocator held in a training step, and how far the process grew. Medians, alternating in
one process. The rows go to bench/results/nonlocal_modules.json. DNL_BENCH_COMPILE=1 adds torch.compile.
"""

from __future__ import annotations

import os

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dnl_kernels as dnl
from dnl_kernels.nn import DNLBlock, NonLocal2d

COMPILE = os.environ.get("DNL_BENCH_COMPILE", "0") == "1"
ROUNDS = int(os.environ.get("DNL_BENCH_ROUNDS", "5"))


class PlainBlock(nn.Module):
    """BN-ReLU-1x1 of the concatenation, then attention over all pixels by SDPA. contiguous: queries, keys and values
    are copied to contiguous tokens, which SDPA's fast path wants; views as users write them fall back to N x N."""

    def __init__(self, channels: int, layers: int, growth: int, contiguous: bool):
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.affines = nn.ModuleList(nn.Conv2d(w, growth, 1, bias=False) for w in widths)
        self.projections = nn.ModuleList(nn.Conv2d(growth, 3 * growth, 1, bias=False) for _ in widths)
        self.outputs = nn.ModuleList(nn.Conv2d(growth, growth, 1, bias=False) for _ in widths)
        self.contiguous = contiguous

    def forward(self, x):
        states = [x]
        for norm, affine, project, output in zip(self.norms, self.affines, self.projections, self.outputs, strict=True):
            y = affine(torch.relu(norm(torch.cat(states, 1))))
            tokens = [t.mT[:, None] for t in project(y).flatten(2).chunk(3, 1)]  # [B, 1, N, G]
            tokens = [t.contiguous() for t in tokens] if self.contiguous else tokens
            z = F.scaled_dot_product_attention(*tokens)
            states.append(output(z[:, 0].mT.unflatten(2, y.shape[2:])))
        return torch.cat(states, 1)

    def load(self, block: DNLBlock) -> PlainBlock:
        """The parameters of `block`, so that both compute the same."""
        for layer, norm, affine, project, output in zip(
            block.layers, self.norms, self.affines, self.projections, self.outputs, strict=True
        ):
            norm.load_state_dict(layer.norm.state_dict())
            affine.load_state_dict(layer.affine.state_dict())
            weight = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
            project.load_state_dict({"weight": weight[:, :, None, None]})
            output.load_state_dict({"weight": layer.output.weight[:, :, None, None]})
        return self


class MatmulNonLocal(nn.Module):
    """The embedded Gaussian as most libraries write it: two matrix products around a softmax of all pairs."""

    def __init__(self, ours: NonLocal2d):
        super().__init__()
        self.theta, self.phi, self.g, self.out, self.norm = ours.theta, ours.phi, ours.g, ours.out, ours.norm

    def forward(self, x):
        theta, phi, g = (m(x).flatten(2) for m in (self.theta, self.phi, self.g))
        weight = torch.softmax(theta.mT @ phi / theta.shape[1] ** 0.5, -1)
        y = (weight @ g.mT).mT.unflatten(2, x.shape[2:])
        return x + self.norm(self.out(y))


def compare(name, functions, x, parameters, bars):
    """The row of functions of x, the first of them ours. bars: peer -> ratio wanted, or (ratio, share of memory)."""

    def call(function):
        for t in (x, *parameters):
            t.grad = None
        function(x).sum().backward()

    times = harness.alternate({n: lambda f=f: call(f) for n, f in functions.items()}, rounds=ROUNDS)
    row = {"case": name, **{f"{n}_ms": round(t * 1e3, 2) for n, t in times.items()}}
    for n, t in times.items():
        if n != "ours":
            row[f"{n}_over_ours"], row[f"{n}_bar"] = round(t / times["ours"], 2), bars.get(n, "")
    for n, f in functions.items():
        if n == "compile":
            continue
        row[f"{n}_saved_mib"] = round(harness.saved_bytes(lambda f=f: f(x), [x, *parameters]) / harness.MIB, 1)
        row[f"{n}_peak_mib"] = round(harness.peak_allocated(lambda f=f: call(f)) / harness.MIB, 1)
    return row


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    harness.save("nonlocal_modules", found)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian", "dot"])
def test_block(rows, kernel):
    torch.manual_seed(0)
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    ours = DNLBlock(16, 8, 16, affine="conv1x1", kernel=kernel)
    functions = {"ours": ours}
    if kernel == "softmax":
        plain = PlainBlock(16, 8, 16, contiguous=True).load(ours)
        functions |= {"eager": plain, "eager_views": PlainBlock(16, 8, 16, contiguous=False).load(ours)}
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-3)
        if COMPILE:
            functions["compile"] = torch.compile(plain)
    parameters = [p for f in functions.values() for p in f.parameters()]
    row = compare(f"DNLBlock-{kernel}-L8", functions, x, parameters, {"eager": 3.0, "eager_views": 3.0, "compile": 2.0})
    rows.append(row)


def test_nonlocal2d(rows):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 56, 56, requires_grad=True)
    ours = NonLocal2d(64)
    functions = {"ours": ours, "matmul": MatmulNonLocal(ours)}
    torch.testing.assert_close(ours(x), functions["matmul"](x), rtol=1e-3, atol=1e-3)
    rows.append(compare("NonLocal2d-64-56x56", functions, x, list(ours.parameters()), {"matmul": 2.0}))


def test_memory_of_a_long_gaussian(rows):
    q, k, v = (torch.randn(1, 1, 8192, 32, requires_grad=True) for _ in range(3))

    def step():
        dnl.nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=32**0.5).sum().backward()

    allocated, resident = harness.peak_allocated(step), harness.peak_rss(step)
    row = {"case": "gaussian-B1-N8192-D32-train", "ours_peak_mib": round(allocated / harness.MIB, 1)}
    if resident is not None:
        row["ours_rss_mib"] = round(resident / harness.MIB, 1)
    rows.append(row | {"peak_bar_mib": 32})
