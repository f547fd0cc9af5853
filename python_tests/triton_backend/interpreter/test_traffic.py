"""The bytes that each operator's Triton kernels request, against its bar; and that a second reading would be seen."""

import pytest
import torch

from dnl_kernels.testing import triton_traffic


@pytest.mark.parametrize("operator", triton_traffic.CASES)
def test_every_kernel_is_within_its_bar(operator):
    found = triton_traffic.rows([operator])
    assert found and not [fault for row in found if (fault := row.fault())]


def test_a_state_read_twice_exceeds_the_bar():
    from dnl_kernels.ops.dense_sum import triton as kernels

    states, weight = [torch.ones(64, 64) for _ in range(3)], torch.ones(3)
    once = 4 * 64 * 64 * 4 + 12

    def call(given):
        def run():
            kernels.dense_sum_fwd(given, weight[: len(given)], 0)

        return triton_traffic.measure("dense_sum", "-", "forward", torch.float32, run, once, 1.05)

    assert call(states).fault() is None
    weight = torch.ones(4)
    assert "1.2" in call([*states, states[0]]).fault()
