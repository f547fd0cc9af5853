"""The compile gate of the CUDA C++ kernels: every kernel of the built library, for every architecture, on a budget.

`python -m dnl_kernels.testing.cuda_gate` (make cuda-check) reads the library that `make build` compiled with warnings
as errors, prints the table, and fails if a kernel leaves its budget. Everything here is computed from the compiled
code; nothing is measured on a GPU. An operator adds its kernels to `BUDGETS`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from typing import NamedTuple

from .. import _builder, _extension
from .sass import MULTIPROCESSORS, Report, architectures, kernels, occupancy

HEADER = "Computed from the compiled code, not measured on a GPU."
LIBRARY = str(_builder.HERE / _extension.CUDA_LIBRARY)
LARGEST = 20 << 20  # bytes of the fat binary
DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


class Budget(NamedTuple):
    """A typical launch: threads, dynamic shared memory in bytes. What the kernel must reach in it: no spills, at least
    this occupancy (or what threads and shared memory allow on the architecture), tensor cores for half types and tf32
    where it multiplies matrices, and, in its widest instance, global accesses of this many bits."""

    threads: int
    occupancy: float
    shared: int = 0
    tensor_core: bool = False
    width: int = 128


BUDGETS = {  # dense_conv2d: images of 32x32, as many outputs as the instance takes
    "dense_sum_fwd_kernel": Budget(256, 0.5),
    "dense_sum_bwd_kernel": Budget(256, 0.37),
    "sum_partials_kernel": Budget(256, 0.5, width=32),
    "dense_conv2d_fwd_kernel": Budget(448, 0.2, shared=39 << 10, tensor_core=True),
    "dense_conv2d_bwd_kernel": Budget(448, 0.2, shared=92 << 10, tensor_core=True),
    "dense_conv2d_reduce_kernel": Budget(256, 0.5, width=32),
    "dnl_layer_fwd_kernel": Budget(256, 0.25, shared=64 << 10, tensor_core=True),
    "dnl_layer_bwd_kernel": Budget(256, 0.12, shared=96 << 10, tensor_core=True),
    "dnl_block_fwd_kernel": Budget(288, 0.14, shared=90 << 10, tensor_core=True),  # 16x16, 108 channels of a half type
    "sum_samples_kernel": Budget(256, 0.5, width=32),
}


class Row(NamedTuple):
    kernel: str
    dtype: str
    constants: str  # the other template arguments
    architecture: int
    threads: int
    report: Report

    def faults(self) -> list[str]:
        """Every way in which this instance leaves its budget."""
        r, budget = self.report, BUDGETS.get(self.kernel)
        if budget is None:
            return ["has no budget: add it to BUDGETS"]
        limit = MULTIPROCESSORS[self.architecture].shared_per_block * 1024
        found = []
        if r.spills:
            found.append(f"{r.spills} spill instructions")
        if r.shared > limit:
            found.append(f"{r.shared} bytes of shared memory, the limit is {limit}")
        # What the launch's threads and shared memory leave possible: 64 KiB allow one block in 100 KiB, two in 164.
        possible, _ = occupancy(self.architecture, 1, self.threads // 32, r.shared)
        if r.occupancy < min(budget.occupancy, possible):
            found.append(f"occupancy {r.occupancy:.2f} ({r.limit}), budget {budget.occupancy}")
        if budget.tensor_core and not r.tensor_core and self.dtype != "fp32":
            found.append("no tensor-core instruction in the hot loop")
        return found


def parse(mangled: str) -> tuple[str, str, str]:
    """Name, element type and the other template arguments of a kernel dnl::name<..>; tf32 is one of the latter."""
    name = re.match(r"_ZN3dnl(?:\d+_GLOBAL__N__\w*?)?\d+([a-z]\w*?_kernel)(I(.*?)EEv)?", mangled)
    if name is None:
        return mangled, "-", ""
    arguments = name[3] or ""
    dtype = next((DTYPES[key] for key in sorted(DTYPES, key=len, reverse=True) if arguments.startswith(key)), "-")
    constants = re.findall(r"L[a-z](\d+)E?", arguments)
    if re.fullmatch(r"dense_conv2d_(fwd|bwd)_kernel", name[1]) and int(constants.pop()):
        dtype = "tf32"
    return name[1], dtype, ",".join(constants)


def rows(library: str = LIBRARY) -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture, cubins in sorted(architectures(library, folder).items()):
            for cubin in cubins:
                for mangled, kernel in kernels(cubin).items():
                    name, dtype, constants = parse(mangled)
                    budget = BUDGETS.get(name, Budget(256, 0))
                    report = kernel.report(architecture, budget.threads // 32, budget.shared)
                    found.append(Row(name, dtype, constants, architecture, budget.threads, report))
    return sorted(found)


def faults(found: list[Row], size: int, expected: set[int]) -> list[str]:
    """Every way in which the library leaves its budget."""
    lines = [f"{' '.join(cells(row)[:4])}: {fault}" for row in found for fault in row.faults()]
    if missing := expected - {row.architecture for row in found}:
        lines.append(f"the library has no code for sm_{', sm_'.join(map(str, sorted(missing)))}")
    if size >= LARGEST:
        lines.append(f"the library has {size} bytes, the limit is {LARGEST}")
    for name, budget in BUDGETS.items():
        for architecture in sorted({row.architecture for row in found}):
            mine = [row for row in found if (row.kernel, row.architecture) == (name, architecture)]
            width = max((row.report.width for row in mine), default=0)
            if width < budget.width:
                lines.append(f"{name} sm_{architecture}: global accesses of {width} bits, budget {budget.width}")
    return lines


COLUMNS = "kernel dtype arguments sm threads regs spills smem occupancy limit mma bits hot".split()


def cells(row: Row) -> tuple[str, ...]:
    r = row.report
    hot = " ".join(f"{kind}:{n}" for kind, n in r.hot_loop if kind != "OTHER")
    facts = (row.threads, r.registers, r.spills, r.shared, f"{r.occupancy:.2f}", r.limit, r.tensor_core or "-", r.width)
    name = row.kernel.removesuffix("_kernel")
    return (name, row.dtype, row.constants or "-", str(row.architecture), *map(str, facts), hot)


def table(found: list[Row]) -> str:
    """The report as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(found: list[Row], size: int) -> str:
    return (
        f"# CUDA C++ kernels: compile report\n\n{HEADER} `make cuda-check` prints it.\n\nCompiled with warnings as "
        f"errors; the library has {size / 2**20:.1f} MiB. smem: bytes per block of a typical launch; bits: the widest "
        f"global access; hot: the instructions of the hottest loop.\n\n{table(found)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default=LIBRARY)
    parser.add_argument("--markdown", help="also write the table to this file")
    arguments = parser.parse_args()
    if not os.path.exists(arguments.library):
        sys.exit(f"{arguments.library} is not there: no nvcc? install the extra 'cuda-check', then `make build`")
    found, size = rows(arguments.library), os.path.getsize(arguments.library)
    report = text(found, size)
    print(report)
    if arguments.markdown:
        with open(f"{arguments.markdown}.tmp", "w") as file:
            file.write(report)
        os.replace(f"{arguments.markdown}.tmp", arguments.markdown)
    expected = {int(a.removesuffix("+PTX").replace(".", "")) for a in _builder.architectures().split(";") if a}
    lines = faults(found, size, expected)
    print("\n".join(lines) or "every kernel is within its budget")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
