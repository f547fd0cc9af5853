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
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

MIB = 2**20


def alternate(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    min_time: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds per call of each competitor, one after the other in every round.

    A call shorter than `min_time` seconds is repeated within its turn, so that the clock's grain does not count.
    clock: time.process_time, with one thread, is what is left to compare by on a machine that others keep busy.
    """
    inner = {}
    for name, function in competitors.items():
        for _ in range(warmup):
            function()
        start = clock()
        function()
        inner[name] = max(1, int(min_time / max(clock() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, function in competitors.items():
            start = clock()
            for _ in range(inner[name]):
                function()
            times[name].append((clock() - start) / inner[name])
    return {name: statistics.median(values) for name, values in times.items()}


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
def fma_ceiling(threads: int | None = None, seconds: float = 0.3) -> float:
    """float32 FLOP/s of `threads` cores doing nothing but independent fused multiply-adds; 0 without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return 0.0
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        capability = torch.backends.cpu.get_cpu_capability()
        lanes, register = (16, "v") if capability.startswith("AVX512") else (8, "x")
        if capability == "DEFAULT":
            lanes, register = 4, "x" if "x86" in torch.__config__.show() else "w"
        source = folder + "/fma.c"
        with open(source, "w") as file:
            file.write(_FMA_SOURCE % (lanes, register))
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        flags = flags if lanes == 16 else [f for f in flags if "512" not in f]
        subprocess.run([compiler, *flags, source, "-o", folder + "/fma.so"], check=True)
        run = ctypes.CDLL(folder + "/fma.so").run
        run.restype, run.argtypes = ctypes.c_float, [ctypes.c_long]

        def timed(count: int) -> float:
            workers = [threading.Thread(target=run, args=(count,)) for _ in range(threads)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return time.perf_counter() - start

        count = 1 << 20
        count = max(count, int(count * seconds / timed(count) / 3))
        return threads * count * 10 * lanes * 2 / min(timed(count) for _ in range(3))


@functools.cache
def copy_ceiling(mib: int = 256) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    source = torch.ones(mib * MIB // 4)
    target = torch.empty_like(source)
    return 2 * mib * MIB / alternate({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]


def ceilings() -> dict[str, float]:
    return {
        "threads": torch.get_num_threads(),
        "fma_gflops": fma_ceiling() / 1e9,
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
