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

    kind: str  # what is broken: mask, offset, scale, rounding, ..
    old: str
    new: str
    tests: str = ""  # pytest's -k
    file: str = "triton.py"


CONV = "../../_triton_conv.py"
TESTS = {"dnl_layer": "layer_and_block", "dnl_block": "layer_and_block"}  # where an operator's tests are elsewhere


MUTATIONS: dict[str, list[Mutation]] = {
    "dense_sum": [
        Mutation("mask", "(row < rows)[:, None] & (column < columns)", "(row <= rows)[:, None] & (column < columns)"),
        Mutation("mask", "mask=mask & (j < count), other=0.0", "mask=mask & (j < count - 1), other=0.0"),
        Mutation("offset", "offset = outer.to(tl.int64) * stride", "offset = outer * stride.to(tl.int32)", "32_bits"),
        Mutation("offset", "at = (tl.cast(j, tl.int64) * rows + row) * tiles + pid % tiles", "at = j * rows + row"),
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
            "offset",
            "j_exists, FEATURES, PART, first)",
            "j_exists, FEATURES, PART, 0)",
            "in_parts",
        ),
        Mutation("rounding", "1e-30)), 1.0, 0.0)", "1e-30)), 0.0, 0.0)", "mostly_themselves"),
        Mutation("rounding", "typical = mean * inverse if", "typical = 0.0 * inverse if", "mostly_themselves"),
        Mutation(
            "sum", "dk -= k.to(tl.float32) * column[:, None]", "dk -= k.to(tl.float32)", "float64 and gaussian-odd"
        ),
    ],
    "dense_linear": [
        Mutation(
            "mask",
            "    mask = inside[:, None] & (n < outputs)[None, :]\n    tl.store(_pointers(Y",
            "    mask = inside[:, None] & (n <= outputs)[None, :]\n    tl.store(_pointers(Y",
            "float64 and float32",
            CONV,
        ),
        Mutation("scale", "    y *= scale\n", "    y *= 1.0\n", "float64 and float32", CONV),
        Mutation(
            "offset",
            "((first + c) * channel_stride)[:, None]",
            "(c * channel_stride)[:, None]",
            "float64 and float32",
            CONV,
        ),
        Mutation("sum", "tl.dot(tl.trans(dy), z, dw,", "tl.dot(tl.trans(dy), z,", "several_steps", CONV),
        Mutation("scale", "_pull(g * scale,", "_pull(g,", "float64 and float32", CONV),
        Mutation("derivative", "g * (s * (1.0 + u * (1.0 - s)))", "g * s", "float32", CONV),
        Mutation("sum", "tl.sum(g * x.to(tl.float32), 0)", "tl.sum(g, 0)", "float64 and float32", CONV),
    ],
    "dense_conv2d": [
        Mutation("mask", "(row >= 0) & (row < plane // width)", "(row >= 0)", "float64 and seven", CONV),
        Mutation("mask", "(column >= 0) & (column < width)", "(column >= 0)", "float64 and seven", CONV),
        Mutation("offset", "inside, TAPS - 1 - tap, plane", "inside, tap, plane", "float64 and seven", CONV),
        Mutation(
            "mask",
            "z = tl.where(valid[:, None], u, 0.0).to(x.dtype)  # the padding",
            "z = u.to(x.dtype)  # the padding",
            "float64 and seven",
            CONV,
        ),
        Mutation("offset", "(pid - start) * C", "pid * C", "float64 and densenet", CONV),
        Mutation("offset", "(image * stride + place)[:, None]", "place[:, None]", "float64 and densenet", CONV),
        Mutation("sum", "+ total, tl.sum(g, 0)", "+ total, 0.5 * tl.sum(g, 0)", "float64 and densenet", CONV),
    ],
    "dnl_layer": [
        Mutation("mask", "i, i_exists, _activate(z", "i, i >= 0, _activate(z", "float64 and softmax"),
        Mutation("offset", "(heads * E) + h * E + e[:, None]", "(heads * E) + e[:, None]", "float64 and softmax"),
        Mutation("offset", "K_BIAS, OUT, q_rows, q_rows", "K_BIAS, OUT, 0, q_rows", "float64 and softmax"),
        Mutation("scale", "tl.exp(-2.0 * tl.load(RHO", "tl.exp(-1.0 * tl.load(RHO", "float64 and gaussian"),
        Mutation("scale", "    y *= tau\n", "    y *= 1.0\n", "float64 and gaussian"),
        Mutation("scale", "(out / total[:, None])", "(out * 1.0)", "float64 and gaussian"),
        Mutation("sum", "z += _load(OUT", "z = _load(OUT", "float64 and gaussian"),
        Mutation("mask", "full = N // BLOCK_N * BLOCK_N", "full = N", "several and dtype2"),
        Mutation("sum", "for start in range(0, rows, R):", "for start in range(0, R, R):", "several and softmax"),
        Mutation("offset", "TENSORS[k].to(tl.int64", "TENSORS[0].to(tl.int64", "many_states", CONV),
        Mutation("sum", "dy = dy + dz if layer.residual else dy", "dy = dy", "float64 and gaussian"),
        Mutation("scale", "= dbandwidth * bandwidth", "= dbandwidth", "float64 and gaussian"),
    ],
    "dnl_block": [
        Mutation("scale", "(2 / elements) * dvar", "(1 / elements) * dvar", "plain and densenet"),
        Mutation("offset", "elements - slope * mean[slot]", "elements", "plain and densenet"),
        Mutation("sum", "dmean[first:end] += of_mean", "dmean[first:end] = of_mean", "plain and densenet"),
        Mutation("scale", "-0.5 * gamma * inverse.pow(3)", "-0.5 * gamma * inverse", "plain and densenet"),
        Mutation(
            "sum", "+ means[-1] * last) / at.pixels", "+ means[-1] * t.rows) / at.pixels", "plain and densenet", CONV
        ),
        Mutation("sum", "g += tl.load(to,", "g += 0.0 * tl.load(to,", "plain and densenet", CONV),
        Mutation("mask", "tl.where(inside[:, None], y, 0.0), 0)", "y, 0)", "plain and densenet", CONV),
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
    command += [
        f"python_tests/triton_backend/interpreter/test_{TESTS.get(operator, operator)}.py",
        *(["-k", selected] if selected else []),
    ]
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
