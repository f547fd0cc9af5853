"""The one form of all named cases, which the tests on a GPU run: here on the CPU, and that a wrong result fails."""

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels.testing import named


def test_every_operator_has_its_cases_in_this_form():
    assert set(named.CASES) == set(_backend.SUPPORTS)


@pytest.mark.parametrize("op", named.CASES)
def test_the_first_and_the_last_case_on_the_cpu(op):
    for case in (list(named.CASES[op])[0], list(named.CASES[op])[-1]):
        named.check(named.CASES[op][case](torch.float32), None)


def test_a_wrong_gradient_is_named():
    call = named.CASES["dense_sum"]["odd"](torch.float32)

    def wrong(leaves, backend):
        output, weight = call.run(leaves, backend), leaves["weight"]
        return output if backend == "reference" else output + 0.01 * (weight - weight.detach()).sum() * output.detach()

    with pytest.raises(AssertionError, match="weight: error .* times what rounding to torch.float32 explains"):
        named.check(call._replace(run=wrong), None)
