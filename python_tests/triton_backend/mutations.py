"""Breaks the Triton kernels on purpose, one mask, offset or scale at a time, and demands that their tests fail.

`python python_tests/triton_backend/mutations.py [OPERATOR ...]` (make mutation-check). The package is copied to a
temporary folder, one line of a kernel is changed, and the interpreter tests named with the mutation run on the copy.
Another operator adds its list to MUTATIONS.
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
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Mutation(NamedTuple):
    """`old`, which occurs once in ops/<operator>/<file>, becomes `new`; the tests that `tests` selects must fail."""

    kind: str  # what is broken: mask, offset, scale, ..
    old: str
    new: str
    tests: str = ""  # pytest's -k
    file: str = "triton.py"


MUTATIONS: dict[str, list[Mutation]] = {
    "dense_sum": [
        Mutation("mask", "(row < rows)[:, None] & (column < columns)", "(row <= rows)[:, None] & (column < columns)"),
        Mutation("mask", "mask=mask & (j < count), other=0.0", "mask=mask & (j < count - 1), other=0.0"),
        Mutation("offset", "offset = outer.to(tl.int64) * stride", "offset = outer * stride.to(tl.int32)", "32_bits"),
        Mutation("offset", "at = (j * rows + row).to(tl.int64) * tiles + pid % tiles", "at = j * rows + row"),
        Mutation("scale", "dx = dy * _weight_tile(WEIGHT, j, count", "dx = dy * _weight_tile(WEIGHT, 0, count"),
        Mutation("sum", "y += x.to(tl.float32) * ", "y = x.to(tl.float32) * "),
    ],
    "nonlocal_attention": [
        Mutation(
            "mask", "s = tl.where(allowed, s, -INFINITY)", "s = tl.where(seen[None, :], s, -INFINITY)", "tiles and odd"
        ),
        Mutation("mask", "    seen = j < M\n", "    seen = j <= M\n", "float64 and softmax-odd"),
        Mutation(
            "mask",
            "w = tl.where(allowed, w, 0.0)\n        dout",
            "w = tl.where(j[:, None] >= 0, w, 0.0)\n        dout",
            "tiles and odd",
        ),
        Mutation(
            "offset",
            "position = first + tl.arange(0, BLOCK)",
            "position = first + tl.arange(0, BLOCK) // 2 * 2",
            "float64 and softmax-odd",
        ),
        Mutation(
            "offset",
            "return (b, h, y, x) if channels_first",
            "return (b, h, x, y) if channels_first",
            "float64 and softmax-channels",
        ),
        Mutation("offset", "return position.to(tl.int64) if WIDE else position", "return position", "32_bits"),
        Mutation(
            "scale",
            "total = total * decay + tl.sum(w, 1)",
            "total = total + tl.sum(w, 1)",
            "float64 and softmax-several",
        ),
        Mutation(
            "scale",
            "dq *= (inverse * (factor / LOG2E))[:, None]",
            "dq *= (inverse * factor)[:, None]",
            "float64 and softmax-odd",
        ),
        Mutation(
            "scale",
            "tl.sum(wide * wide, 1) * (-0.5 * factor)",
            "tl.sum(wide * wide, 1) * (-1.0 * factor)",
            "float64 and gaussian-odd",
        ),
        Mutation(
            "sum", "dk -= k.to(tl.float32) * column[:, None]", "dk -= k.to(tl.float32)", "float64 and gaussian-odd"
        ),
    ],
}


def source(operator: str, mutation: Mutation, root: pathlib.Path = ROOT) -> pathlib.Path:
    return root / "dnl_kernels" / "ops" / operator / mutation.file


def copy(target: pathlib.Path) -> None:
    """What the interpreter tests need; the compiled library by a link."""
    shutil.copytree(ROOT / "dnl_kernels", target / "dnl_kernels", symlinks=True,
                    ignore=shutil.ignore_patterns("__pycache__", "*.so", "experiments", "theory"))  # fmt: skip
    for library in (ROOT / "dnl_kernels").glob("*.so"):
        (target / "dnl_kernels" / library.name).symlink_to(library)
    for name in ("experiments", "theory"):
        (target / "dnl_kernels" / name).symlink_to(ROOT / "dnl_kernels" / name)
    for name in ("conftest.py", "triton_backend/interpreter"):
        path = target / "python_tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / "python_tests" / name).is_dir() else shutil.copy)(
            ROOT / "python_tests" / name, path
        )
    shutil.copy(ROOT / "pyproject.toml", target)


def run_tests(folder: pathlib.Path, operator: str, selected: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += [f"python_tests/triton_backend/interpreter/test_{operator}.py", *(["-k", selected] if selected else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def survives(operator: str, mutation: Mutation) -> str | None:
    """None when the tests fail on the mutated kernels, as they should; else what happened."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy(folder)
        path = source(operator, mutation, folder)
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return f"{text.count(mutation.old)} places match {mutation.old!r}, expected one"
        path.write_text(text.replace(mutation.old, mutation.new))
        result = run_tests(folder, operator, mutation.tests)
    if result.returncode == 1 and " failed" in result.stdout:
        return None
    return f"the tests passed, or did not run ({result.returncode}):\n{result.stdout[-800:]}{result.stderr[-400:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operators", nargs="*", choices=[[], *MUTATIONS])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(operator, m) for operator in arguments.operators or MUTATIONS for m in MUTATIONS[operator]]
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        for (operator, m), why in zip(jobs, pool.map(lambda job: survives(*job), jobs), strict=True):
            print(f"{'SURVIVED' if why else 'caught  '} {operator:20s} {m.kind:7s} {m.new}", flush=True)
            if why:
                print(why)
            survivors += why is not None
    print(f"{len(jobs) - survivors} of {len(jobs)} mutations were caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
