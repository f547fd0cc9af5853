"""DenseSum against eager additions, torch.compile of them, and stack + einsum: all L sums of a network, forward and
backward, with the memory that they keep. Medians, alternating in one process; rows go to bench/results/dense_sum.json.

torch.compile of the additions takes minutes at L = 48 and is part of the run with DNL_BENCH_COMPILE=1 only.
"""

from __future__ import annotations

import os

import harness
import pytest
import torch

from dnl_kernels.nn import DenseSum

COMPILE = os.environ.get("DNL_BENCH_COMPILE", "0") == "1"
ROUNDS = int(os.environ.get("DNL_BENCH_ROUNDS", "5"))
BARS = {"eager_over_ours": 3.0, "compile_over_ours": 1.0, "ours_saved_mib": 100.0}


def additions(states, weight):
    sums = []
    for call in range(len(states)):
        y = weight[call, 0] * states[0]
        for j in range(1, call + 1):
            y = y + weight[call, j] * states[j]
        sums.append(y)
    return sums


def stacked(states, weight):
    return [torch.einsum("j,j...->...", weight[c, : c + 1], torch.stack(states[: c + 1])) for c in range(len(states))]


@pytest.mark.parametrize("layers, shape", [(48, (1024, 512)), (12, (1024, 512))], ids=["L48-2MiB", "L12-2MiB"])
def test_all_sums(layers, shape):
    """States are given, so that nothing but the sums is measured."""
    torch.manual_seed(0)
    mix = DenseSum(layers)
    torch.nn.init.normal_(mix.weight, std=layers**-0.5)
    states = [torch.randn(shape, requires_grad=True) for _ in range(layers)]
    dy = torch.randn(shape)

    def streamed(states, weight):
        history, sums = mix.history(states[0]), []
        for x in states[1:]:
            sums.append(mix(history))
            history.append(x)
        return [*sums, mix(history)]

    competitors = {"ours": streamed, "eager": additions, "einsum": stacked}
    if COMPILE:
        competitors["compile"] = torch.compile(additions)

    def step(function):
        mix.weight.grad = None
        for x in states:
            x.grad = None
        sums = function(states, mix.weight)
        torch.autograd.backward(sums, [dy] * layers)

    times = harness.alternate({n: lambda f=f: step(f) for n, f in competitors.items()}, rounds=ROUNDS)
    row = {"case": f"L{layers}-{shape[0]}x{shape[1]}", **{f"{n}_ms": round(t * 1e3, 1) for n, t in times.items()}}
    row |= {f"{n}_over_ours": round(t / times["ours"], 2) for n, t in times.items() if n != "ours"}
    for name, function in competitors.items():
        if name != "compile":
            kept = harness.saved_bytes(lambda f=function: f(states, mix.weight), exclude=[mix.weight])
            row[f"{name}_saved_mib"] = round(kept / harness.MIB, 1)
    harness.save(f"dense_sum_L{layers}", [{**row, **{f"bar_{n}": b for n, b in BARS.items()}}])
