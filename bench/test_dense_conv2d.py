"""dense_conv2d against normalise-activate-convolve of the concatenation, eager and compiled."""

import functools

import pytest
import torch

from bench.comparison import DEVICE, SMOKE, Case, compiled, way
from dnl_kernels.ops.dense_conv2d.api import dense_conv2d
from dnl_kernels.testing.dense_conv2d import CASES, SIZES, inputs

NAMES = ("densenet-layer", "pointwise")


def comparison(name: str) -> Case:
    case = (CASES | SIZES)[name]
    if SMOKE:
        case = case._replace(batch=min(case.batch, 2))
    parameters, states = inputs(case, torch.float32, DEVICE)
    given = [*parameters, *states]

    def call(weight, bias, norm_scale, norm_shift, *states, backend=None):
        return dense_conv2d(states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift,
                            activation=case.activation, scale=case.scale, backend=backend)  # fmt: skip

    eager = functools.partial(call, backend="reference")
    pixels, channels = case.batch * case.height * case.width, sum(case.channels)
    ways = {"ours": way(call, given), "eager": way(eager, given)}
    ways["compile"] = compiled(ways["eager"]) if name in SIZES else "the small cases are not compiled"
    return Case(
        "dense_conv2d", name, ways, way(eager, [t if t is None else t.double() for t in given]),
        flops=2.0 * pixels * channels * case.outputs * case.size**2, bytes=4.0 * pixels * (channels + case.outputs),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *SIZES])
def test_dense_conv2d(record, name):
    record(comparison(name))
