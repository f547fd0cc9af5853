"""Runs the numerical tests in other weathers, and prints a table: `make test-weather`.

What PyTorch's own numbers depend on (the instruction sets of ATen and MKL, the threads), the level of the kernels, and
the draws of every test (DNL_TEST_SEED). Not all combinations: each setting of each variable, each with other draws.
What came of a weather is kept in --kept, so that a run may be stopped, and goes on where it was; --afresh runs all
again. --markdown writes the table of what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
# Tests whose numbers depend on the weather: of every operator the one against float64, of the CPU kernels with and
# without tails, of blocks, modules, threads and contracts. A weather runs every EVERY-th of them, each another part, so
# that ten of them take minutes and most cases are seen; and always ALWAYS, which was red on AVX-512 processors once.
EVERY = 10
ALWAYS = ("test_nonlocal_attention.py::test_against_float64[softmax-several-parts]",
          "test_dnl_block.py::test_against_float64[torch.float32-conv1x1-softmax]",
          "test_dense_linear.py::test_activations_at_zero")  # fmt: skip
TESTS = """
test_budget.py::test_a_planted_error_is_out_of_bounds
test_budget.py::test_elementary_functions_need_half_of_the_safety
test_contracts.py::test_every_dtype_stays_within_the_budget
test_contracts.py::test_autocast_narrows_products_and_leaves_float64_alone
nn/test_block.py::test_equals_torchvision
nn/test_depth.py::test_low_precision
nn/test_nonlocal2d.py
ops/test_dense_conv2d.py::test_against_float64
ops/test_dense_conv2d.py::test_every_activation_near_zero_and_far_out
ops/test_dense_linear.py::test_against_float64
ops/test_dense_sum.py::test_against_float64
ops/test_dnl_block.py::test_against_float64
ops/test_dnl_block_cpu.py::test_against_float64_on_every_instruction_set
ops/test_dnl_block_nonlocal.py::test_every_number_within_the_budget
ops/test_dnl_bottleneck.py::test_every_activation
ops/test_dnl_layer.py::test_against_float64
ops/test_dnl_layer_cpu.py::test_against_float64
ops/test_nonlocal_attention.py::test_against_float64
ops/test_nonlocal_attention.py::test_what_keys_and_values_have_in_common_costs_no_accuracy
ops/test_norm_activation.py::test_every_gradient_in_float64_and_float32
ops/test_threads.py
ops/test_transition.py::test_transition_on_every_instruction_set
ops/test_wide_convolutions.py::test_blocks
""".split()
INTERPRETED = """
triton_backend/interpreter/test_dense_linear.py::test_against_float64
triton_backend/interpreter/test_dense_linear.py::test_activations_at_zero_at_nan_and_at_infinity
triton_backend/interpreter/test_dense_linear.py::test_every_activation_near_zero_and_far_out
triton_backend/interpreter/test_dense_sum.py::test_against_float64
""".split()
ATEN = [("ATEN_CPU_CAPABILITY", value) for value in ("default", "avx2", "avx512")]
SETTINGS = [*ATEN, ("MKL_CBWR", "COMPATIBLE"), ("OMP_NUM_THREADS", "2")]
SEEDS = 10


class Weather(NamedTuple):
    setting: dict[str, str]
    tests: list[str]

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.setting.items())


def weathers() -> list[Weather]:
    from dnl_kernels._extension import _C

    settings = [*SETTINGS, *(("DNL_CPU_ISA", level) for level in (_C.isa_levels() if _C else []))]
    found = [{name: value, "DNL_TEST_SEED": str(i)} for i, (name, value) in enumerate(settings, 1)]
    found += [{"DNL_TEST_SEED": str(seed)} for seed in range(len(found) + 1, SEEDS + 1)]
    interpreted = [
        {"TRITON_INTERPRET": "1", name: value, "DNL_TEST_SEED": str(i)} for i, (name, value) in enumerate(ATEN, 1)
    ]
    return [*(Weather(w, TESTS) for w in found), *(Weather(w, INTERPRETED) for w in interpreted)]


def collected(weather: Weather) -> list[str]:
    """The names of its tests, with their parameters."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only"]
    environment = {**os.environ, **weather.setting}
    command += [f"python_tests/{test}" for test in weather.tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith("python_tests/")]
    if run.returncode or not found:
        raise RuntimeError(run.stdout[-2000:] + run.stderr[-2000:])
    return found


def run(weather: Weather, every: list[str], stride: int, processes: int) -> dict[str, object]:
    part = int(weather.setting["DNL_TEST_SEED"])
    chosen = [t for i, t in enumerate(every) if (i + part) % stride == 0 or any(name in t for name in ALWAYS)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "OMP_WAIT_POLICY": "passive", **weather.setting}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    command += [*chosen, *(["--numprocesses", str(processes)] if processes > 1 else [])]
    started = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines() or [result.stderr[-200:]]
    return {
        "green": result.returncode == 0,
        "seconds": round(time.perf_counter() - started),
        "summary": re.sub(r" in [0-9.]+s.*", "", lines[-1].strip("= ")),
        "failed": re.findall(r"^(?:FAILED|ERROR) (.*)$", result.stdout, re.MULTILINE),
    }


def table(kept: dict[str, dict], wanted: list[Weather]) -> str:
    from dnl_kernels import info

    facts = info.facts()
    lines = [
        "# The numerical tests in other weathers",
        "",
        f"Written by `make test-weather` on {processor()} ({os.cpu_count()} cores; the kernels' levels:"
        f" {facts['instruction set']}), torch {facts['torch']}.",
        f"Each weather runs another {EVERY}th of the numerical tests, and always the ones that were red elsewhere.",
        "",
        "| weather | | tests |",
        "|---|---|---|",
    ]
    for weather in wanted:
        outcome = kept.get(weather.name)
        if outcome is None:
            lines.append(f"| {weather.name} | not run | |")
            continue
        lines.append(f"| {weather.name} | {'green' if outcome['green'] else '**red**'} | {outcome['summary']} |")
        lines += [f"| | | `{test}` |" for test in outcome["failed"]]
    return "\n".join(lines) + "\n"


def processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set((re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE) or [""])[0].split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{found[1] if found else platform.machine()} with {', '.join(known)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="run the weathers whose name has one of these")
    parser.add_argument("--every", type=int, default=EVERY, help="run each so many-th of the tests")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kept", type=pathlib.Path, default=ROOT / "out" / "weather.json")
    parser.add_argument("--afresh", action="store_true", help="run also what has an outcome")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no weather after that many")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table of what is kept there")
    arguments = parser.parse_args()
    every, started = weathers(), time.perf_counter()
    wanted = [w for w in every if not arguments.words or any(word in w.name for word in arguments.words)]
    kept = json.loads(arguments.kept.read_text()) if arguments.kept.is_file() else {}
    names: dict[str, list[str]] = {}
    for weather in wanted:
        if weather.name in kept and not arguments.afresh:
            continue
        if time.perf_counter() - started > arguments.seconds:
            break
        kind = " ".join(weather.tests)
        names[kind] = names.get(kind) or collected(weather)
        kept[weather.name] = outcome = run(weather, names[kind], arguments.every, arguments.processes)
        arguments.kept.parent.mkdir(parents=True, exist_ok=True)
        arguments.kept.write_text(json.dumps(kept, indent=1))
        print(f"{'green' if outcome['green'] else 'RED  '} {outcome['seconds']:5d} s {weather.name}", flush=True)
        print("".join(f"      {line}\n" for line in [outcome["summary"], *outcome["failed"]]), end="", flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(table(kept, every))
    red = [w.name for w in wanted if w.name in kept and not kept[w.name]["green"]]
    left = sum(w.name not in kept for w in wanted)
    print(
        f"make test-weather: {len(wanted) - left - len(red)} of {len(wanted)} weathers are green, {left} were not run"
    )
    sys.exit(bool(red) or left > 0)


if __name__ == "__main__":
    main()
