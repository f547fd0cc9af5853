"""Runs the numerical tests in other weathers, and prints a table: `make test-weather`.

What PyTorch's own numbers depend on (the instruction sets of ATen and MKL, the threads), the level of the kernels, and
the draws of every test. Not all combinations: each setting of each variable, and each with another seed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time

TESTS = [
    "python_tests/test_budget.py",
    "python_tests/ops",
    "python_tests/nn/test_block.py",
    "python_tests/nn/test_depth.py",
    "python_tests/nn/test_nonlocal2d.py",
    "python_tests/test_contracts.py",
]
INTERPRETER = [
    "python_tests/triton_backend/interpreter/" + name
    for name in ("test_dense_sum.py", "test_dense_linear.py", "test_nonlocal_attention.py")
]
NUMERICAL = "float64 or budget or float32 or dtype or torchvision or instruction_set or numerics or low_precision"


def weathers() -> list[dict[str, str]]:
    from dnl_kernels._extension import _C

    aten = [("ATEN_CPU_CAPABILITY", value) for value in ("default", "avx2", "avx512")]
    settings = [*aten, ("MKL_CBWR", "COMPATIBLE"), ("OMP_NUM_THREADS", "2")]
    settings += [("DNL_CPU_ISA", level) for level in (_C.isa_levels() if _C else [])]
    found = [{name: value, "DNL_TEST_SEED": str(i)} for i, (name, value) in enumerate(settings, 1)]
    return found + [{"DNL_TEST_SEED": str(seed)} for seed in range(len(found) + 1, 11)]


def run(weather: dict[str, str], tests: list[str], processes: int, selected: str | None):
    """What came of it, the seconds, and the names of the tests that failed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "OMP_WAIT_POLICY": "passive", **weather}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-rfE", "-m", "not slow", *tests]
    command += ["--numprocesses", str(processes), *(["-k", selected] if selected else [])]
    started = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", result.stdout, re.MULTILINE)
    summary = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr[-200:]
    return (
        f"{'green' if result.returncode == 0 else 'RED  '} {summary.strip('= ')}",
        time.perf_counter() - started,
        failed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 1) + 1)
    parser.add_argument("--first", type=int, default=0, help="run only the first so many weathers")
    parser.add_argument("-k", default=NUMERICAL, help="pytest's -k")
    arguments = parser.parse_args()
    rows = [(weather, TESTS) for weather in weathers()]
    rows += [({"TRITON_INTERPRET": "1", **weather}, INTERPRETER) for weather, _ in rows[:3]]
    red = 0
    for weather, tests in rows[: arguments.first or None]:
        outcome, seconds, failed = run(weather, tests, arguments.processes, arguments.k or None)
        name = " ".join(f"{key}={value}" for key, value in weather.items())
        print(f"| {name:48s} | {seconds:4.0f} s | {outcome}", flush=True)
        for test in failed:
            print(f"|     {test}", flush=True)
        red += bool(failed) or not outcome.startswith("green")
    print(f"make test-weather: {red} of {len(rows[: arguments.first or None])} weathers are red")
    sys.exit(red > 0)


if __name__ == "__main__":
    main()
