"""How time and memory grow: one variable at a time, the exponent that the algorithm promises and the one that is seen.

Each row: operator "scaling", the values of the variable, and for every way the seconds and bytes at each of them.
`fit` is the slope of the logarithms over the upper half of the values, where constant costs matter least.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import dnl_kernels as dnl
from bench import harness
from bench.comparison import DEVICE, SMOKE, Way, of_module, steps, way
from bench.peers import PlainDenseBlock
from dnl_kernels.nn import DNLBlock


class Curve(NamedTuple):
    """values of the variable; ways(value): ours and its peers; expected: exponents of ours in time and in memory kept
    for backward (None: there is none to promise); flops(value): of a step, where its rate is to be shown."""

    values: tuple[int, ...]
    ways: Callable[[int], dict[str, Way]]
    time: float
    memory: float | None
    flops: Callable[[int], float] | None = None


def block_flops(layers: int = 16, batch: int = 8, growth: int = 6, size: int = 16, channels: int = 12) -> float:
    """Of the convolutions forward and backward."""
    reads = sum(channels + i * growth for i in range(layers))
    return 3 * 2 * 9 * reads * growth * batch * size**2


def block(layers: int = 16, batch: int = 8, growth: int = 6, size: int = 16, channels: int = 12) -> dict[str, Way]:
    x = torch.randn(batch, channels, size, size, device=DEVICE).requires_grad_()
    ours, plain = (kind(channels, layers, growth).to(DEVICE) for kind in (DNLBlock, PlainDenseBlock))
    return {"ours": of_module(ours, x), "eager": of_module(plain, x)}


def attention(positions: int) -> dict[str, Way]:
    given = [torch.randn(1, 1, positions, 32, device=DEVICE) for _ in range(3)]
    return {
        "ours": way(dnl.nonlocal_attention, given),
        "sdpa": way(torch.nn.functional.scaled_dot_product_attention, given),
    }


CURVES = {
    # The convolutions of L layers read C0 + l * G channels each: L^2 in the limit. The states are L.
    "block, layers L": Curve(
        (4, 8, 16, 32, 64, 128), lambda n: block(layers=n, batch=4), 2.0, 1.0, lambda n: block_flops(layers=n, batch=4)
    ),
    "block, batch B": Curve((1, 2, 4, 8, 16, 32), lambda n: block(batch=n), 1.0, 1.0, lambda n: block_flops(batch=n)),
    "block, growth rate G": Curve(
        (3, 6, 12, 24, 48), lambda n: block(growth=n, layers=8), 2.0, 1.0, lambda n: block_flops(growth=n, layers=8)
    ),
    "softmax attention, positions N": Curve((64, 256, 1024, 4096, 16384), attention, 2.0, 1.0),
}


def exponent(values, measured) -> float:
    """Least-squares slope of log(measured) over log(value), upper half of the values."""
    pairs = [(math.log(v), math.log(m)) for v, m in zip(values, measured, strict=True) if m > 0]
    pairs = pairs[-max(3, (len(pairs) + 1) // 2) :]
    x, y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


def curve_row(name: str, curve: Curve, values) -> dict:
    found: dict[str, dict[str, list[float]]] = {}
    for value in values:
        torch.manual_seed(0)
        ways = curve.ways(value)
        functions = {key: steps(one, True)["both"] for key, one in ways.items()}
        times = harness.interleave(functions, rounds=1 if SMOKE else 3, seconds=0.0 if SMOKE else 1.5)
        for key, one in ways.items():
            series = found.setdefault(key, {"seconds": [], "saved_bytes": []})
            series["seconds"].append(harness.quantiles(times[key])["median"])
            series["saved_bytes"].append(harness.saved_bytes(one.call, [*one.leaves, *one.parameters]))
    for series in found.values():
        if len(values) > 2:
            series["fit"] = {key: exponent(values, series[key]) for key in ("seconds", "saved_bytes")}
    return {"operator": "scaling", "case": name, "values": list(values), "ways": found,
            "expected": {"seconds": curve.time, "saved_bytes": curve.memory},
            "flops": [curve.flops(value) for value in values] if curve.flops else None}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_scaling(benchmark, name):
    curve = CURVES[name]
    values = curve.values[:2] if SMOKE else curve.values
    benchmark.extra_info.update(curve_row(name, curve, values))
    ours = steps(curve.ways(values[0])["ours"], True)["both"]
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.parametrize("name", ["block", "attention"])
def test_threads(benchmark, name):
    """One thread and two: the promise is an exponent of -1."""
    make = {"block": lambda: block(size=32, batch=16), "attention": lambda: attention(2048)}[name]
    before, values = torch.get_num_threads(), (1, 2)
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for threads in values:
            torch.set_num_threads(threads)
            functions = {key: steps(one, True)["both"] for key, one in make().items()}
            for key, times in harness.interleave(functions, rounds=1 if SMOKE else 3).items():
                found.setdefault(key, {"seconds": []})["seconds"].append(harness.quantiles(times)["median"])
    finally:
        torch.set_num_threads(before)
    for series in found.values():
        series["fit"] = {"seconds": math.log2(series["seconds"][1] / series["seconds"][0])}
    benchmark.extra_info.update({"operator": "scaling", "case": f"{name}, threads", "values": list(values),
                                 "ways": found, "expected": {"seconds": -1.0, "saved_bytes": None}})  # fmt: skip
    benchmark.pedantic(steps(make()["ours"], True)["both"], rounds=1)
