"""Breaks the CPU kernels on purpose, one tail, term or piece at a time, and demands that their tests fail.

`python python_tests/cpu_backend/mutations.py [WORD ...]` (make mutation-check); words choose mutants by their number,
their kind or a part of their file's name. All mutants of `mutants.py` are compiled into one library, for one
instruction-set level, each behind a switch that the environment sets: `old` becomes `(dnl_mutant == k ? (new) :
(old))`. The package, the library and the tests are copied to a temporary folder; with no mutant chosen its tests pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(pathlib.Path(__file__).parent))
from mutants import MUTATIONS, Mutation  # noqa: E402

SWITCH = "DNL_MUTANT"  # the number of the mutant that is alive, from 1
# Included before everything; the number itself lives in module.cpp.
DECLARATION = 'extern "C" __attribute__((visibility("hidden"))) int dnl_mutant;\n'
DEFINITION = f"""
#include <cstdlib>
extern "C" {{
int dnl_mutant = std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : 0;
}}
"""


def switched(number: int, mutation: Mutation) -> str:
    """The expression that is the old one unless the mutant is alive."""
    if mutation.file.endswith(".py"):
        alive = f'__import__("os").environ.get("{SWITCH}") == "{number}"'
        return f"(({mutation.new}) if {alive} else ({mutation.old}))"
    return f"(dnl_mutant == {number} ? ({mutation.new}) : ({mutation.old}))"


def mutated(text: str, path: str) -> str:
    """The source file at `path` with a switch for each of its mutants."""
    for number, mutation in enumerate(MUTATIONS, 1):
        if mutation.file == path:
            if text.count(mutation.old) != 1:
                raise ValueError(f"{path}: {text.count(mutation.old)} places match {mutation.old!r}, expected one")
            text = text.replace(mutation.old, switched(number, mutation))
    return text


def copy(target: pathlib.Path) -> None:
    """The sources, broken, and what tests need beside them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "dnl_kernels", "bench", "python_tests/ops"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "python_tests" / "conftest.py", target / "python_tests")
    shutil.copy(ROOT / "pyproject.toml", target)
    for path in sorted({m.file for m in MUTATIONS}):
        (target / path).write_text(mutated((ROOT / path).read_text(), path))
    (target / "csrc" / "mutant.h").write_text(DECLARATION)
    with open(target / "csrc" / "module.cpp", "a") as module:
        module.write(DEFINITION)


def build(target: pathlib.Path, level: str) -> None:
    environment = {**os.environ, "DNL_ISA_LEVELS": level, "DNL_CUDA": "0"}
    environment["DNL_CXXFLAGS"] = f'-include "{target / "csrc" / "mutant.h"}"'
    command = [sys.executable, str(target / "dnl_kernels" / "_builder.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)


def run_tests(folder: pathlib.Path, number: int, mutation: Mutation) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=line", "-m", "not slow"]
    command += [f"python_tests/ops/{mutation.tests}", *(["-k", mutation.selected] if mutation.selected else [])]
    environment = {**os.environ, SWITCH: str(number), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    environment.pop("DNL_CPU_ISA", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def survives(folder: pathlib.Path, number: int, mutation: Mutation) -> str | None:
    """None when a test fails on the mutant, or the process dies of it; else what happened."""
    result = run_tests(folder, number, mutation)
    if (result.returncode == 1 and " failed" in result.stdout) or result.returncode < 0:
        return None
    return f"the tests passed, or did not run ({result.returncode}):\n{result.stdout[-800:]}{result.stderr[-400:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--level", help="the instruction-set level (default: the best one of this processor)")
    arguments = parser.parse_args()
    level = arguments.level
    if level is None:
        from dnl_kernels._extension import _C

        level = _C.isa()
    jobs = [
        (number, m) for number, m in enumerate(MUTATIONS, 1)
        if not arguments.words or any(word in (m.kind, str(number)) or word in m.file for word in arguments.words)
    ]  # fmt: skip
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy(folder)
        build(folder, level)
        with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
            found = pool.map(lambda job: survives(folder, *job), jobs)
            for (number, m), why in zip(jobs, found, strict=True):
                outcome, file = "SURVIVED" if why else "caught  ", m.file.removeprefix("csrc/")
                print(f"{outcome} {number:2d} {file:38s} {m.kind:10s} {m.new}", flush=True)
                if why:
                    print(why)
                survivors += why is not None
    print(f"{len(jobs) - survivors} of {len(jobs)} mutants of the CPU kernels were caught ({level})")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
