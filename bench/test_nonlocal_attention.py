"""nonlocal_attention against the strongest other ways of computing the same: ratios, saved memory and the bars.

As tests (`make bench`) each case records its ratios in the benchmark's extra_info. As a program,
`python -m bench.test_nonlocal_attention [--json FILE] [PATTERN]`, it prints one table. KeOps takes part if installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import dnl_kernels as dnl
from bench import harness

BANDWIDTH_PER_ROOT_WIDTH = (
    1.0  # of the Gaussian cases: bandwidth = sqrt(D), so that weights are neither flat nor one-hot
)


class Case(NamedTuple):
    """q, k, v: [B, 1, N, D] or, channels first, views [B, 1, N, D] of [B, D, N]. bars: ratio wanted to each peer."""

    kernel: str
    B: int
    N: int
    D: int
    train: bool
    bars: dict[str, float]
    channels_first: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        words = [self.kernel, f"B{self.B}", f"N{self.N}", f"D{self.D}", "train" if self.train else "forward"]
        words += ["channels-first"] * self.channels_first + ["bf16"] * (self.dtype == torch.bfloat16)
        return "-".join(words)


def _softmax_cases():
    for D, forward, train in ((8, 5.0, 2.5), (16, 2.7, 2.0), (32, 2.4, 1.6), (64, 2.4, 1.5)):
        yield Case("softmax", 16, 1024, D, False, {"sdpa": forward})
        yield Case("softmax", 16, 1024, D, True, {"sdpa": train})
    for D in (128, 256):
        yield Case("softmax", 2, 1024, D, False, {"sdpa": 1 / 1.1})
        yield Case("softmax", 2, 1024, D, True, {"sdpa": 1 / 1.1})
    for D in (16, 64):
        yield Case("softmax", 4, 1024, D, False, {"sdpa": 1 / 1.1}, dtype=torch.bfloat16)
        yield Case("softmax", 4, 1024, D, True, {"sdpa": 1 / 1.1}, dtype=torch.bfloat16)


CASES = [
    *_softmax_cases(),
    Case("softmax", 2, 56 * 56, 32, True, {"sdpa": 2.0}, channels_first=True),
    Case("gaussian", 16, 1024, 16, True, {"softmax": 1 / 1.1}),
    Case("gaussian", 16, 1024, 64, True, {"softmax": 1 / 1.1}),
    Case("gaussian", 1, 4096, 3, True, {"sdpa": 1.2, "keops": 2.0}),
    Case("gaussian", 1, 4096, 64, True, {"sdpa": 1.2, "keops": 10.0}),
]


def tensors(case: Case) -> list[torch.Tensor]:
    shape = (case.B, 1, case.D, case.N) if case.channels_first else (case.B, 1, case.N, case.D)
    return [torch.randn(shape).to(case.dtype).requires_grad_(case.train) for _ in range(3)]


def _augmented(q, k, v, bandwidth):
    """softmax(q.k - |k|^2 / 2) through one more feature, padded to the multiple of 8 that SDPA's fast path likes."""
    q, k = q / bandwidth, k / bandwidth
    D = q.shape[-1]
    bias = -k.square().sum(-1, keepdim=True) / 2
    q = F.pad(torch.cat([q, torch.ones_like(bias)], -1), (0, -(D + 1) % 8))
    k = F.pad(torch.cat([k, bias], -1), (0, -(D + 1) % 8))
    v = F.pad(v, (0, q.shape[-1] - D))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :D]


def _keops(q, k, v, bandwidth):
    from pykeops.torch import LazyTensor

    x, y = LazyTensor(q[0, 0][:, None] / bandwidth), LazyTensor(k[0, 0][None] / bandwidth)
    return (-((x - y) ** 2).sum(-1) / 2).sumsoftmaxweight(LazyTensor(v[0, 0][None].contiguous()), axis=1)[None, None]


def competitors(case: Case) -> dict[str, Callable]:
    """Functions of (q, k, v); all but the first are peers."""
    bandwidth = BANDWIDTH_PER_ROOT_WIDTH * math.sqrt(case.D)
    layout = "channels_first" if case.channels_first else "tokens"
    if case.kernel == "softmax":
        found = {"ours": lambda *t: dnl.nonlocal_attention(*t, layout=layout)}
        if case.channels_first:  # as users write it: views of the images, no copy
            found["sdpa"] = lambda *t: F.scaled_dot_product_attention(*(x.mT for x in t)).mT
        else:
            found["sdpa"] = F.scaled_dot_product_attention
        return found
    found = {
        "ours": lambda *t: dnl.nonlocal_attention(*t, kernel="gaussian", bandwidth=bandwidth, layout=layout),
        "softmax": lambda *t: dnl.nonlocal_attention(*t, layout=layout),
        "sdpa": lambda *t: _augmented(*t, bandwidth),
    }
    if case.B == 1 and importlib.util.find_spec("pykeops"):
        found["keops"] = lambda *t: _keops(*t, bandwidth)
    return {name: f for name, f in found.items() if name in ("ours", *case.bars)}


def step(function: Callable, given: list[torch.Tensor], train: bool) -> Callable[[], None]:
    def run():
        if not train:
            with torch.no_grad():
                function(*given)
            return
        for t in given:
            t.grad = None
        function(*given).sum().backward()

    return run


def measure(case: Case, rounds: int = 5, clock: Callable[[], float] = time.perf_counter) -> dict:
    """Ratios peer / ours of the median times, bytes kept for backward, and how far the results are apart."""
    given = tensors(case)
    found = competitors(case)
    times = harness.alternate(
        {name: step(f, given, case.train) for name, f in found.items()}, rounds=rounds, clock=clock
    )
    result = {
        "case": case.name,
        "ms": times["ours"] * 1e3,
        "ratios": {},
        "bars": case.bars,
        "saved_mib": {},
        "peak_mib": {},
    }
    expected = found["ours"](*given).detach().float()
    for name, function in found.items():
        if name != "ours":
            result["ratios"][name] = times[name] / times["ours"]
            if name != "softmax" or case.kernel == "softmax":
                torch.testing.assert_close(function(*given).detach().float(), expected, rtol=2e-2, atol=2e-2)
        if case.train:
            result["saved_mib"][name] = harness.saved_bytes(lambda f=function: f(*given), given) / harness.MIB
        peak = harness.peak_rss(step(function, given, case.train))
        result["peak_mib"][name] = None if peak is None else peak / harness.MIB
    products = 14 if case.train else 4
    result["gflops"] = products * case.B * case.N**2 * case.D / times["ours"] / 1e9
    return result


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ratio(case, benchmark):
    benchmark.extra_info.update(measure(case))
    benchmark.pedantic(step(competitors(case)["ours"], tensors(case), case.train), rounds=3, warmup_rounds=1)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time: for a machine in use")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    report = {"torch": torch.__version__, "ceilings": harness.ceilings(), "cases": []}
    print({k: round(v, 1) for k, v in report["ceilings"].items()})
    for case in CASES:
        if options.pattern not in case.name:
            continue
        row = measure(case, options.rounds, time.process_time if options.cpu_time else time.perf_counter)
        report["cases"].append(row)
        for peer, ratio in row["ratios"].items():
            verdict = "meets" if ratio >= case.bars[peer] else "misses"
            memory = " ".join(
                f"{what} {_mib(row[key].get('ours'))} MiB (peer {_mib(row[key].get(peer))})"
                for what, key in (("saved", "saved_mib"), ("peak", "peak_mib"))
            )
            rate = f"{row['gflops']:.0f} GFLOP/s"
            print(
                f"{case.name:44s} {peer:8s} {ratio:5.2f}x {verdict} {case.bars[peer]:.2f}x  {rate}  {memory}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
