"""The CUDA source of dense_conv2d, run by the emulator: every case against float64, schedules, reasons, traffic."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels._checks import ACTIVATIONS
from dnl_kernels.ops.dense_conv2d.api import CUDA_SIZES, _cuda_limit
from dnl_kernels.testing import assert_within_budget
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dense_conv2d import CASES, NAMES, Case, inputs

every_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)


def limit(case: Case) -> str | None:
    return _cuda_limit(len(case.channels), case.outputs, case.size, case.width)


TAKEN = {name: case for name, case in CASES.items() if limit(case) is None}
MORE = {  # every octet of outputs, 16-byte accesses, several tiles and chunks, images that share a tile
    "growth-8": Case(2, (8, 8, 8), 8, 16, 8),
    "growth-12": Case(1, (16, 12), 9, 8, 12, activation="silu"),
    "growth-24": Case(1, (5, 24), 6, 8, 24),
    "growth-32": Case(1, (20,), 5, 9, 32, size=1, activation="gelu"),
    "bands": Case(1, (4, 3), 70, 40, 6),
    "seven-images": Case(7, (3, 3), 8, 8, 6, activation="leaky_relu"),
    "widest": Case(1, (2,), 3, 128, 17),
}


def run(parameters, states, backend, activation, scale):
    parameters = [p if p is None else p.detach().requires_grad_() for p in parameters]
    states = [s.detach().requires_grad_() for s in states]
    weight, bias, norm_scale, norm_shift = parameters
    y = dnl.dense_conv2d(
        states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift, activation=activation, scale=scale,
        backend=backend,
    )  # fmt: skip
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(y)
    return y, torch.autograd.grad(y, [p for p in parameters if p is not None] + states, dy)


def check(parameters, states, activation="relu", scale=1.0):
    double = [p if p is None else p.double() for p in parameters], [s.double() for s in states]
    y, grads = run(parameters, states, BACKEND, activation, scale)
    eager, eager_grads = run(parameters, states, "reference", activation, scale)
    exact, exact_grads = run(*double, "reference", activation, scale)
    assert_within_budget("y", y, exact, eager)
    names = [n for n, p in zip(NAMES, parameters, strict=True) if p is not None]
    names += [f"states[{j}]" for j in range(len(states))]
    for name, a, e, b in zip(names, grads, exact_grads, eager_grads, strict=True):
        assert_within_budget("d" + name, a, e, b)


@pytest.mark.parametrize("case", [*TAKEN.values(), *MORE.values()], ids=[*TAKEN, *MORE])
@every_dtype
def test_against_float64(emulated, case, dtype):
    check(*inputs(case, dtype), case.activation, case.scale)
