"""How this project measures: ratios in one process, alternating; memory; and what the machine can do at best.

An absolute time means little on a shared machine, so every table puts its competitors, the FMA rate and the copy rate
of the same run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    seconds: float = 0.0,
    warmup: int = 1,
    min_time: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each competitor, one after the other in every round.

    There are `rounds` of them; with `seconds`, more while these last (2 where one round takes longer).

    A call shorter than `min_time` seconds is repeated within its turn, so that the clock's grain does not count.
    clock: time.process_time, with one thread, is what is left to compare by on a machine that others keep busy.
    """
    inner, total = {}, 0.0
    for name, function in competitors.items():
        for _ in range(warmup):
            function()
        once = timed(function, clock)
        inner[name] = max(1, int(min_time / max(once, 1e-9))) if warmup else 1
        total += max(once, min_time)
    if seconds:
        rounds = min(max(rounds if total < seconds else 2, int(seconds / total)), 25)
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, function in competitors.items():
            count = inner[name]
            times[name].append(timed(lambda f=function, n=count: [f() for _ in range(n)], clock) / count)
    return times


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, until a GPU has finished it too."""
    start = clock()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many there were."""
    ordered = sorted(times)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return {"median": statistics.median(ordered), "p20": at[0], "p80": at[1], "rounds": len(ordered)}


def alternate(competitors: Mapping[str, Callable[[], object]], rounds: int = 7, **options: Any) -> dict[str, float]:
    """Median seconds per call of each competitor; options: see `interleave`."""
    found = interleave(competitors, rounds, **options)
    return {name: statistics.median(times) for name, times in found.items()}


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that `forward` keeps for its backward: distinct storages except `exclude` (say, parameters)."""
    given = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, int] = {}
    kept = []  # a storage must not be freed and its address used again while we count

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values())


def peak_allocated(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once during `step`, above what it held before.

    Memory that a library takes from the system on its own (oneDNN's weights in its own layout) is not in it: see
    `peak_rss`."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_rss(step: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest point during `step`, or None where Linux does not say."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not hide what the step needs
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        step()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def peak_memory(step: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that `step` holds at once, above what was held before: of torch's allocator, on the CPU or of the
    whole process if that grew by more (libraries and kernels take memory of their own)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(peak_allocated(step), peak_rss(step) or 0)


_FMA_SOURCE = """
typedef float V __attribute__((vector_size(4 * %d)));
#define EACH(DO) DO(a) DO(b) DO(c) DO(d) DO(e) DO(f) DO(g) DO(h) DO(i) DO(j)
float run(long n) {
  V x = {0.999f}, y = {0.001f};
#define DECLARE(v) V v = y;
  EACH(DECLARE)
  for (; n > 0; n--) {
#define STEP(v) v = v * x + y; __asm__ volatile("" : "+%s"(v));
    EACH(STEP)
  }
  V s = y;
#define ADD(v) s += v;
  EACH(ADD)
  return s[0];
}
"""


@functools.cache
def _fma_loop() -> tuple[Any, int] | None:
    """A compiled loop of independent multiply-adds, and how many numbers a vector has; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    lanes, register = (16, "v") if capability.startswith("AVX512") else (8, "x")
    if capability == "DEFAULT":
        lanes, register = 4, "x" if "x86" in torch.__config__.show() else "w"
    with tempfile.TemporaryDirectory() as folder:
        source = folder + "/fma.c"
        with open(source, "w") as file:
            file.write(_FMA_SOURCE % (lanes, register))
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        flags = flags if lanes == 16 else [f for f in flags if "512" not in f]
        subprocess.run([compiler, *flags, source, "-o", folder + "/fma.so"], check=True)
        run = ctypes.CDLL(folder + "/fma.so").run
    run.restype, run.argtypes = ctypes.c_float, [ctypes.c_long]
    return run, lanes


def fma_ceiling(threads: int | None = None, seconds: float = 0.1) -> float:
    """float32 FLOP/s, now, of `threads` cores that do independent fused multiply-adds alone; 0 without a compiler.
    The best of three runs of `seconds`."""
    if (found := _fma_loop()) is None:
        return 0.0
    run, lanes = found
    threads = threads or torch.get_num_threads()

    def timed(count: int) -> float:
        workers = [threading.Thread(target=run, args=(count,)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    time.sleep(0.02)  # until OpenMP's threads, which wait busily for more work, have gone to sleep
    count = 1 << 20
    count = max(count, int(count * seconds / timed(count)))
    return threads * count * 10 * lanes * 2 / min(timed(count) for _ in range(3))


@functools.cache
def copy_ceiling(mib: int = 256) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    source = torch.ones(mib * MIB // 4)
    target = torch.empty_like(source)
    return 2 * mib * MIB / alternate({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]


@functools.cache
def gemm_ceiling(size: int = 1536) -> float:
    """float32 FLOP/s of torch's own product of two large matrices."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    return 2 * size**3 / alternate({"gemm": lambda: torch.mm(a, b, out=out)}, rounds=5)["gemm"]


def ceilings() -> dict[str, float]:
    """What the machine can do at best, measured now."""
    return {
        "threads": torch.get_num_threads(),
        "fma_gflops": fma_ceiling() / 1e9,
        "gemm_gflops": gemm_ceiling() / 1e9,
        "copy_gb_per_s": copy_ceiling() / 1e9,
    }


def save(name: str, rows: list[dict[str, object]]) -> None:
    """Writes rows and the machine's ceilings to bench/results/<name>.json, and prints them as a table."""
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    facts = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), **ceilings()}
    (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    print(f"\n{facts}\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
