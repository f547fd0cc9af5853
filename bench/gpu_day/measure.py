"""How a GPU is measured: CUDA events around one call, the second-level cache overwritten before it, ways in turns.

Three times of every way. device_us: the median over rounds of the time between two events, each way once in a round.
stream_us: calls one behind the other without waiting, per call, which is what a Python loop sees, launches included.
graph_us: the replay of a CUDA graph of the call, which has no gaps between launches; or why it cannot be captured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench import comparison, harness
from bench.gpu_day import day
from dnl_kernels.testing.precision import float32_products

GPU = torch.cuda.is_available() and os.environ.get("DNL_GPU_TESTS") != "emulated"
FLUSH_BYTES = 256 << 20  # more than any second-level cache has
ROUNDS, STREAM_CALLS = 15, 20
PHASES = ("forward", "both")


class Measured:
    """Writes rows; knows what the card can do and when to stop."""

    def __init__(self, group: str, path: str, seconds: float):
        self.group, self.path, self.until = group, path, time.monotonic() + seconds
        self.flush = torch.empty(FLUSH_BYTES if GPU else 1, dtype=torch.uint8, device="cuda" if GPU else "cpu")
        self.copy, self.product = self._ceilings()
        self.write(case="ceilings", copy_gb_per_s=self.copy / 1e9, bf16_tflops=self.product / 1e12)

    def left(self) -> float:
        return self.until - time.monotonic()

    def write(self, **fields: Any) -> None:
        day.append(self.path, kind="bench", group=self.group, **fields)

    def _ceilings(self) -> tuple[float, float]:
        """Bytes per second, read and written, of a large copy, and FLOP/s of a large product in bfloat16."""
        device, count, size = ("cuda", 2**28, 8192) if GPU else ("cpu", 2**16, 64)
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        for call in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=out)):
            call()
        copied = min(self.once(lambda: target.copy_(source)) for _ in range(5))
        multiplied = min(self.once(lambda: torch.mm(a, b, out=out)) for _ in range(5))
        return 8 * count / copied * 1e6, 2 * size**3 / multiplied * 1e6

    def once(self, call: Callable[[], object]) -> float:
        """Microseconds of one call on the device."""
        if not GPU:
            return harness.timed(call) * 1e6
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3

    def in_turns(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(ROUNDS if GPU else 2):
            if done >= 3 and self.left() < 0:
                break
            for name, call in calls.items():
                times[name].append(self.once(call))
        return times

    def stream(self, call: Callable[[], object], once: float) -> float:
        count = max(3, min(STREAM_CALLS, int(2e5 / max(once, 1.0)))) if GPU else 1
        return harness.timed(lambda: [call() for _ in range(count)]) / count * 1e6

    def graph(self, call: Callable[[], object]) -> float | str:
        if not GPU:
            return "no device"
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                call()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            return statistics.median(self.once(graph.replay) for _ in range(5))
        except Exception as error:
            torch.cuda.synchronize()
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"

    def case(self, case: comparison.Case, tf32: bool = False) -> None:
        """Every way of the case: a row each. tf32: how float32 is multiplied in what is timed, not in the reference."""
        if self.left() <= 0:
            self.write(case=case.name, way="all", error="no time was left")
            return
        exact = self._exact(case)
        with float32_products(tf32):
            ready: dict[str, dict[str, Callable[[], object]]] = {}
            facts: dict[str, dict[str, Any]] = {}
            for name, way in case.ways.items():
                if isinstance(way, str) or self.left() <= 0:
                    self.write(case=case.name, way=name, error=way if isinstance(way, str) else "no time was left")
                    continue
                try:
                    facts[name], ready[name] = self._first(case, way, exact)
                except Exception as error:
                    self.write(case=case.name, way=name, error=f"{type(error).__name__}: {str(error)[:300]}")
                    if GPU:
                        torch.cuda.synchronize()  # raises again where the context is broken: nothing can follow
                        torch.cuda.empty_cache()
            phases = PHASES if case.train else PHASES[:1]
            times = {phase: self.in_turns({n: functions[phase] for n, functions in ready.items()}) for phase in phases}
            for name, functions in ready.items():
                row = {**facts[name], "tf32": tf32, "train": case.train}
                for phase, call in functions.items():
                    q = harness.quantiles(times[phase][name])
                    row[phase] = {
                        "device_us": q["median"], "p20_us": q["p20"], "p80_us": q["p80"], "rounds": q["rounds"],
                        "stream_us": self.stream(call, q["median"]), "graph_us": self.graph(call),
                    }  # fmt: skip
                    row[phase] |= self._shares(case, phase, q["median"])
                self.write(case=case.name, way=name, **row)
        torch._dynamo.reset()

    def _exact(self, case: comparison.Case) -> list[torch.Tensor] | None:
        """Output and gradients in float64, where the case says how and the card has the memory."""
        if case.exact is None:
            return None
        try:
            with float32_products(False):
                return comparison.results(case.exact, case.train)
        except torch.OutOfMemoryError:
            self.write(case=case.name, way="float64", error="out of memory")
            torch.cuda.empty_cache()
            return None

    def _first(
        self, case: comparison.Case, way: comparison.Way, exact: list[torch.Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
        """What one call says: its time with all compilation, its errors, its memory; and the phases to be timed."""
        began = time.perf_counter()
        found = comparison.results(way, case.train)
        if GPU:
            torch.cuda.synchronize()
        first = time.perf_counter() - began
        errors = None
        if exact is not None and way.same and len(found) == len(exact):
            errors = comparison.errors_of(found, exact)
        functions = comparison.steps(way, case.train)
        functions = {name: call for name, call in functions.items() if name in PHASES}
        peak = harness.peak_memory(list(functions.values())[-1], "cuda") if GPU else None
        dtype = str(next(t.dtype for t in way.leaves if t.is_floating_point())).removeprefix("torch.")
        facts = {
            "dtype": dtype, "first_call_s": round(first, 3), "peak_bytes": peak,
            "error_output": errors[0] if errors else None,
            "error_gradients": max(errors[1:], default=None) if errors else None,
        }  # fmt: skip
        return facts, functions

    def _shares(self, case: comparison.Case, phase: str, us: float) -> dict[str, float]:
        """Of the card's measured rates, by bytes and operations that are counted once."""
        factor = 1.0 if phase == "forward" else 1.0 + case.backward_flops
        moved = case.bytes * (1.0 if phase == "forward" else 3.0)
        return {
            "tflops": case.flops * factor / us / 1e6, "share_of_product": case.flops * factor / us * 1e6 / self.product,
            "gb_per_s": moved / us / 1e3, "share_of_copy": moved / us * 1e6 / self.copy,
        }  # fmt: skip
