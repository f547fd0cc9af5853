"""The compile gate: every Triton kernel within its budget on every architecture; and that the gate can fail."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from dnl_kernels.testing import triton_gate
from dnl_kernels.testing.sass import Report, occupancy
from dnl_kernels.testing.triton_compile import Compiled

# The smallest shared memory, and another family of tensor-core instructions; `make cuda-check` does them all.
ARCHITECTURES = (86, 90)


@pytest.fixture(scope="module")
def rows():
    return triton_gate.gather(ARCHITECTURES, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_within_its_budget(rows, architecture):
    mine = [row for row in rows if row.architecture == architecture]
    assert {row.compiled.name for row in mine} == set(triton_gate.BUDGETS)
    faults = {" ".join(triton_gate.cells(row)[:4]): row.faults() for row in mine}
    assert not any(faults.values()), {where: found for where, found in faults.items() if found}


GOOD = Report(32, 0, 1024, 1.0, "warps", "", (), 128)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spills": 3}, "3 spill instructions"),
        ({"shared": 100 * 1024}, "102400 bytes of shared memory, the limit is 101376"),
        ({"occupancy": 0.25, "limit": "registers"}, "occupancy 0.25 .registers."),
        ({"width": 32}, "global accesses of 32 bits"),
    ],
)
def test_each_fault_is_named(change, message):
    def faults(report):
        return triton_gate.Row("dense_sum", "-", "bf16", 86, Compiled("dense_sum_fwd_kernel", 8, 3, report)).faults()

    assert faults(GOOD) == []
    (fault,) = faults(GOOD._replace(**change))
    assert re.search(message, fault)


def test_occupancy_against_figures_from_the_programming_guide():
    assert occupancy(80, 32, 8, 0) == (1.0, "registers")
    assert occupancy(80, 64, 8, 0) == (0.5, "registers")
    assert occupancy(90, 32, 4, 113 * 1024) == (0.125, "shared")
    assert occupancy(86, 32, 1, 0) == (16 / 48, "blocks")


def test_planted_spill_is_seen():
    from dnl_kernels.ops.dense_sum import triton as kernels
    from dnl_kernels.testing.triton_compile import compiling

    states = [torch.empty(8, 4096, device="meta") for _ in range(3)]
    table = torch.empty(3, 2, dtype=torch.int64, device="meta")

    def launch(**options):
        with compiling(80) as found:
            kernels.dense_sum_bwd_kernel[(1,)](
                states[0], table, table, states[0], states[1], 3, 8, 4096, 1, 4096, 4096,
                PER="column", STATES_NEEDED=True, WEIGHT_NEEDED=True, ALIGNED=True, ROWS=64, COLUMNS=64, **options,
            )  # fmt: skip
        return found[0].report

    assert launch(num_warps=1).spills > 0
    assert launch(num_warps=8).spills == 0
