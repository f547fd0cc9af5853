"""One piece of work, several ways to do it: checked against float64, timed in turn, weighed, and recorded as one row.

A row is plain data (JSON in pytest-benchmark's `extra_info`); what is printed of it is bench/report.py's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch

from bench import harness
from dnl_kernels.testing.budget import Exact, exactly, relative_error, share_of_budget

DEVICE = os.environ.get("DNL_BENCH_DEVICE", "cpu")
SMOKE = os.environ.get("DNL_BENCH_SMOKE") == "1"  # every benchmark once, as a test that it works
COMPILE = os.environ.get("DNL_BENCH_COMPILE", "1") == "1" and not SMOKE
PHASES = ("forward", "backward", "both")
DRAWS = 4


class Way(NamedTuple):
    """call(): the output, from `leaves`, which are differentiated; parameters: leaves that do not count as memory kept
    for backward. same: whether it computes the function of the case (else it is a point of reference only)."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    parameters: Sequence[Tensor] = ()
    same: bool = True


class Case(NamedTuple):
    """ways: by name, "ours" first; a string in place of a Way says why it is absent. exact: the same in float64. flops,
    bytes: of the forward pass, each tensor counted once. backward_flops: as a multiple of the forward's. bars: peer /
    ours that is aimed at, of the last phase. redraw: new inputs in place, where gradients alone are off. Among some
    million pre-activations one may lie within rounding of ReLU's kink: a way that takes it for the other side has
    errors of per cents in its gradients, none in its output. A wrong kernel is wrong in every draw."""

    operator: str
    name: str
    ways: Mapping[str, Way | str]
    exact: Way
    flops: float = 0.0
    bytes: float = 0.0
    backward_flops: float = 2.0
    train: bool = True
    bars: Mapping[str, float] = {}
    redraw: Callable[[], None] | None = None


def way(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], **options: Any) -> Way:
    """function(*tensors), differentiated by every one of them that is not None."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    return Way(lambda: function(*given), [t for t in given if t is not None], **options)


def of_module(module: torch.nn.Module, *inputs: Tensor, train: bool = True, **options: Any) -> Way:
    """module(*inputs), differentiated by its parameters and by floating inputs that want it."""
    module.train(train)
    parameters = list(module.parameters())
    leaves = [t for t in inputs if t.requires_grad]
    return Way(lambda: module(*inputs), [*leaves, *parameters], parameters, **options)


def compiled(one: Way, function: Callable[[], Tensor] | None = None) -> Way | str:
    """The way compiled by torch.compile with static shapes, or why it is not."""
    if not COMPILE:
        return "not asked for (DNL_BENCH_COMPILE=0, or a smoke run)"
    return one._replace(call=torch.compile(function or one.call, dynamic=False))


def steps(one: Way, train: bool) -> dict[str, Callable[[], object]]:
    """The phases as functions to be timed."""

    def forward():
        with torch.no_grad():
            return one.call()

    if not train:
        return {"forward": forward}
    shape = one.call().detach()
    cotangent = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).to(shape).reshape(shape.shape)
    graph: list[Tensor] = []

    def both():
        return torch.autograd.grad(one.call(), one.leaves, cotangent, allow_unused=True)

    def backward():
        # Made at the first call, after the forward passes that are timed: a compiled graph may have kept running
        # statistics, which these change.
        if not graph:
            graph.append(one.call())
        return torch.autograd.grad(graph[0], one.leaves, cotangent, retain_graph=True, allow_unused=True)

    return {"forward": forward, "backward": backward, "both": both}


def results(one: Way, train: bool) -> list[Tensor]:
    """The output and, in training, every gradient."""
    output = one.call()
    if not train:
        return [output.detach()]
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output).reshape(output.shape)
    found = torch.autograd.grad(output, one.leaves, cotangent, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(one.leaves, found, strict=True))]


class Errors(NamedTuple):
    """The largest relative error; and the largest error of a result in units of what rounding can do to it, of all
    results and of the output alone."""

    relative: float
    share: float
    output: float


def errors_of(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The relative error of each result. A gradient that is zero but for rounding counts in proportion to the largest
    one."""
    largest = max((e.abs().max().item() for e in exact if e.numel()), default=0.0)

    def error(actual: Tensor, reference: Tensor) -> float:
        size = reference.abs().max().item() if reference.numel() else 0.0
        return relative_error(actual, reference) * min(1.0, (size or 1.0) / (1e-6 * largest or 1.0))

    return [error(a, e) for a, e in zip(found, exact, strict=True)]


def share_of_largest(actual: Tensor, exact: Exact) -> float:
    """The largest error of an element in units of the largest bound of one."""
    return share_of_budget(actual, exact._replace(bound=exact.bound.amax().expand_as(exact.bound)))


def errors(ways: Mapping[str, Way], case: Case) -> dict[str, Errors]:
    """Of each way that computes the function of the case, by the budget of the tests (dnl_kernels/testing/budget.py).
    There the bound of an element is its largest deviation in many runs of the float64 reference with rounding; sizes
    here are too large for that. The largest deviation of any element of a result shows in a single run, so that results
    are held to that; other formulations, and eight runs, are made only where one would not do."""
    found = {name: results(one, case.train) for name, one in ways.items() if one.same}
    dtype = found["ours"][0].dtype
    for draws, others in ((1, False), (1, True), (8, True)):
        exact = exactly(lambda: results(case.exact, case.train), dtype, dtype, draws, others)
        shares = {name: [*map(share_of_largest, of, exact)] for name, of in found.items()}
        if max(shares["ours"]) <= 1:
            break
    values = [e.value for e in exact]
    return {name: Errors(max(errors_of(of, values)), max(shares[name]), shares[name][0]) for name, of in found.items()}


def measure(case: Case, seconds: float = 3.0, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The row of a case. seconds: about what the timed rounds of one phase may take."""
    functorch.donated_buffer = False  # else a compiled backward cannot be timed apart from its forward
    ways = {name: w for name, w in case.ways.items() if isinstance(w, Way)}
    first = {name: harness.timed(lambda w=w: results(w, case.train), clock) for name, w in ways.items()}
    for draw in range(1, DRAWS + 1):
        found = errors(ways, case)
        passed = found["ours"].share <= 1
        if passed or found["ours"].output > 1 or case.redraw is None or draw == DRAWS:
            break
        case.redraw()
    row: dict[str, Any] = {
        "operator": case.operator, "case": case.name, "train": case.train, "device": DEVICE,
        "dtype": str(ways["ours"].leaves[0].dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "check": {"passed": passed, "share": found["ours"].share, "draw": draw},
        "flops": {"forward": case.flops, "backward": case.flops * case.backward_flops},
        "bytes": {"forward": case.bytes}, "bars": dict(case.bars),
        "absent": {name: w for name, w in case.ways.items() if isinstance(w, str)}, "ways": {},
    }  # fmt: skip
    timed = {name: steps(w, case.train) for name, w in ways.items()}
    for name, one in ways.items():
        row["ways"][name] = {
            "first_call_s": first[name],
            "error": found[name].relative if name in found else None,
            **_memory(one, timed[name], case),
        }
    row["fma_gflops"], found_times = _quiet_times(timed, PHASES if case.train else ("forward",), seconds, clock)
    for phase, of_ways in found_times.items():
        for name, times in of_ways.items():
            row["ways"][name][phase] = harness.quantiles(times)
    torch._dynamo.reset()
    return row


_best_rate = [0.0]  # GFLOP/s of multiply-adds, the most that this run of the suite has seen


def _quiet_times(timed, phases, seconds: float, clock) -> tuple[float | None, dict[str, dict[str, list[float]]]]:
    """The rate of multiply-adds beside the measurement, and phase -> way -> seconds.

    Others on the same machine take from its cores at times, and not the same from every way. Where the rate falls short
    of the best one of the run by a tenth, all is timed again, up to twice; the times with the highest rate count. The
    times themselves decide nothing.
    """

    def rate() -> float:
        found = harness.fma_ceiling() / 1e9
        _best_rate[0] = max(_best_rate[0], found)
        return found

    attempts = []
    for _ in range(1 if SMOKE or DEVICE != "cpu" else 3):
        before = 0.0 if SMOKE or DEVICE != "cpu" else rate()
        times = {
            phase: harness.interleave(
                {name: functions[phase] for name, functions in timed.items()},
                seconds=0.0 if SMOKE else seconds, rounds=1 if SMOKE else 5, warmup=0 if SMOKE else 1, clock=clock,
            )
            for phase in phases
        }  # fmt: skip
        attempts.append((min(before, rate()) if before else 0.0, times))
        if attempts[-1][0] >= 0.9 * _best_rate[0]:
            break
    found, times = max(attempts, key=lambda attempt: attempt[0])
    return found or None, times


def _memory(one: Way, functions: Mapping[str, Callable[[], object]], case: Case) -> dict[str, float | None]:
    peak = harness.peak_memory(functions["both" if case.train else "forward"], DEVICE)
    kept = harness.saved_bytes(one.call, [*one.leaves, *one.parameters]) if case.train else None
    return {"saved_bytes": kept, "peak_bytes": peak}
