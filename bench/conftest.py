"""Options of the benchmarks by environment: see bench/comparison.py. Run them as `python -m pytest bench`."""

import os
import platform
import zlib

import pytest
import torch

from bench import harness
from bench.comparison import DEVICE, SMOKE, Case, measure, steps

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.exit("DNL_BENCH_DEVICE=cuda, and torch finds no CUDA device", returncode=0)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the numbers are to be read against."""
    import dnl_kernels
    from dnl_kernels import info

    machine_info["dnl"] = {
        "versions": {"dnl_kernels": dnl_kernels.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "instruction set": info.facts()["instruction set"],
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
        "ceilings": {} if SMOKE else harness.ceilings(),
        "smoke": SMOKE,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def seed(request):
    """Inputs of a case are the same in every run: a pre-activation within rounding of ReLU's kink, once in some hundred
    draws of a small case, gives either side a wrong mask, and the check an error of per cents."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def record(benchmark, request):
    """Measures a Case and leaves its row in the benchmark's extra_info; fails if ours does not compute it."""

    def run(case: Case, seconds: float = 1.0):
        torch.manual_seed(0)
        row = measure(case, float(os.environ.get("DNL_BENCH_SECONDS", seconds)))
        benchmark.extra_info.update(row)
        ours = list(steps(case.ways["ours"], case.train).values())[-1]
        benchmark.pedantic(ours, rounds=1 if SMOKE else 3)
        assert row["check"]["passed"], row["check"]

    yield run
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def threads():
    if count := os.environ.get("DNL_BENCH_THREADS"):
        torch.set_num_threads(int(count))
