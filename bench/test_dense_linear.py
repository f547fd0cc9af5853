"""dense_linear against concatenation and one product, eager and compiled."""

import functools
import math

import pytest
import torch

from bench.comparison import DEVICE, SMOKE, Case, compiled, way
from dnl_kernels.ops.dense_linear.api import dense_linear
from dnl_kernels.testing.dense_linear import CASES, SIZES, inputs

NAMES = ("tiny", "preactivation")


def comparison(name: str) -> Case:
    case = (CASES | SIZES)[name]
    if SMOKE:
        case = case._replace(shape=(2, *case.shape[1:]))
    tensors = inputs(case, torch.float32, DEVICE)
    states = tensors.pop("states")
    given = [*tensors.values(), *states]

    def call(weight, bias, norm_scale, norm_shift, *states, backend=None):
        return dense_linear(states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift,
                            activation=case.activation, scale=case.scale, backend=backend)  # fmt: skip

    eager = functools.partial(call, backend="reference")
    rows, channels = math.prod(case.shape), sum(case.channels)
    ways = {"ours": way(call, given), "eager": way(eager, given)}
    ways["compile"] = compiled(ways["eager"]) if name in SIZES else "the small cases are not compiled"
    return Case(
        "dense_linear", name, ways, way(eager, [t if t is None else t.double() for t in given]),
        flops=2.0 * rows * channels * case.width, bytes=4.0 * (rows * (channels + case.width) + channels * case.width),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *SIZES])
def test_dense_linear(record, name):
    record(comparison(name))
