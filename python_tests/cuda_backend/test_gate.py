"""The compile gate of the CUDA C++ kernels: that the built library passes, and that each fault is named."""

import os
import re

import pytest

pytest.importorskip("triton", reason="cuobjdump comes with Triton")

from dnl_kernels.testing import cuda_gate
from dnl_kernels.testing.cuda_gate import BUDGETS, Row, parse
from dnl_kernels.testing.sass import Report

GOOD = Report(32, 0, 1024, 1.0, "warps", "HMMA", (), 128)


def faults(report=GOOD, kernel="dense_conv2d_fwd_kernel", size=1, expected=(80,), dtype="bf16"):
    others = [Row(name, "bf16", "", 80, 256, GOOD) for name in BUDGETS if name != kernel]
    return cuda_gate.faults([Row(kernel, dtype, "1", 80, 256, report), *others], size, set(expected))


def test_a_good_library_has_no_faults():
    assert faults() == []
    assert faults(GOOD._replace(tensor_core=""), dtype="fp32") == []
    assert "no tensor-core instruction" in faults(GOOD._replace(tensor_core=""), dtype="tf32")[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"report": GOOD._replace(spills=3)}, "3 spill instructions"),
        ({"report": GOOD._replace(shared=170000)}, "170000 bytes of shared memory, the limit is 166912"),
        ({"report": GOOD._replace(occupancy=0.1, limit="registers")}, "occupancy 0.10 .registers."),
        ({"report": GOOD._replace(tensor_core="")}, "no tensor-core instruction"),
        ({"report": GOOD._replace(width=32)}, "global accesses of 32 bits, budget 128"),
        ({"size": 21 << 20}, "22020096 bytes, the limit is 20971520"),
        ({"expected": (80, 90)}, "no code for sm_90"),
    ],
)
def test_each_fault_is_named(change, message):
    (fault,) = faults(**change)
    assert re.search(message, fault)


def test_the_occupancy_asked_for_is_one_that_the_launch_can_have():
    """64 KiB of shared memory: two blocks of 8 warps on sm_80, one on sm_86, where a quarter is out of reach."""
    report = GOOD._replace(shared=65 << 10, occupancy=8 / 48, limit="shared")
    one, two = (Row("dnl_layer_fwd_kernel", "fp32", "", sm, 256, report) for sm in (86, 80))
    assert one.faults() == [] and "occupancy 0.17" in two.faults()[0]
    assert one._replace(report=report._replace(occupancy=7 / 48)).faults()


def test_a_kernel_without_a_budget_is_a_fault():
    assert any("has no budget" in fault for fault in faults(kernel="new_kernel"))


def test_names_are_read():
    assert parse("_ZN3dnl23dense_conv2d_fwd_kernelI13__nv_bfloat16Li4ELb0EEEvNS_11ConvForwardE") == (
        "dense_conv2d_fwd_kernel", "bf16", "4",
    )  # fmt: skip
    for tf32, dtype in enumerate(("fp32", "tf32")):
        assert parse(f"_ZN3dnl23dense_conv2d_bwd_kernelIfLb{tf32}EEEvNS_12ConvBackwardE") == (
            "dense_conv2d_bwd_kernel", dtype, "",
        )  # fmt: skip
    assert parse("_ZN3dnl20dense_sum_fwd_kernelIfLi4ELb0EEEvNS_15DenseSumForwardE") == (
        "dense_sum_fwd_kernel", "fp32", "4,0",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(cuda_gate.LIBRARY), reason="the CUDA library is not built")
def test_the_built_library_is_within_its_budget():
    found = cuda_gate.rows()
    assert cuda_gate.faults(found, os.path.getsize(cuda_gate.LIBRARY), {row.architecture for row in found}) == []
