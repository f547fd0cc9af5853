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


def test_flops_and_floors_are_those_of_the_products():
    """softmax D64: two products of 256 x 256 x 64 forward, five backward, of which the scores are formed twice."""
    half = [r for r in triton_traffic.rows(["nonlocal_attention"]) if (r.case, r.dtype) == ("softmax D64", "bf16")]
    product = 2 * 256 * 256 * 64
    assert [(r.direction, r.flops) for r in half] == [("forward", 2 * product), ("backward", 7 * product)]
    forward = half[0]
    assert forward.once == 4 * 256 * 64 * 2 + 2 * 256 * 4  # q, k, v, out; shift, sum
    assert forward.floors()["A100"] == pytest.approx(max(forward.once / 1555e3, forward.flops / 312e6))
    single = forward._replace(dtype="fp32", flops=10**9)
    assert single.floors()["H100"] == pytest.approx(1e9 / 67e6)
