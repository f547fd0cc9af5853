"""Strides beyond 31 bits in the CUDA kernels, in memory of holes: only the pages that are touched exist."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels.testing import dnl_block, dnl_layer

FAR = 2**31 + 64  # elements between two samples


@pytest.fixture
def apart(emulated, tmp_path):
    """A function that copies a batch of two into memory where its samples lie FAR apart."""

    def move(x):
        path = tmp_path / f"holes-{len(list(tmp_path.iterdir()))}"
        with open(path, "wb") as file:
            file.truncate((FAR + x[0].numel()) * x.element_size())
        memory = torch.from_file(str(path), shared=True, size=FAR + x[0].numel(), dtype=x.dtype)
        strides = (FAR, *x.contiguous().stride()[1:])
        return memory.as_strided(x.shape, strides).copy_(x)

    return move


def gradients(run, x):
    x = x.detach().requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution(apart, dtype):
    x, weight = torch.randn(2, 8, 4, 8).to(dtype), torch.randn(4, 8, 3, 3).to(dtype)

    def run(x):
        return dnl.dense_conv2d([x], weight, backend="cuda_emulated")

    for near, far in zip(gradients(run, x), gradients(run, apart(x)), strict=True):
        assert torch.equal(near, far)


@pytest.mark.parametrize("positions", [(3, 4), (12,)], ids=["images", "tokens"])
def test_a_layer(apart, positions):
    case = dnl_layer.Case(positions, (8, 8), size=1, kernel="softmax", batch=2)
    states, tensors = dnl_layer.inputs(case, torch.float32)

    def run(x):
        return dnl_layer.call(case, [x, states[1]], tensors, "cuda_emulated")

    for near, far in zip(gradients(run, states[0]), gradients(run, apart(states[0])), strict=True):
        assert torch.equal(near, far)


def test_a_resident_block(apart):
    case = dnl_block.CASES["densenet-eval"]
    x0, layers = dnl_block.inputs(case._replace(batch=2), torch.float32)
    parameters = [dnl_block.LayerParameters(**layer) for layer in layers]
    with torch.no_grad():
        near, far = (dnl.dnl_block(x, parameters, case.config, backend="cuda_emulated") for x in (x0, apart(x0)))
    assert torch.equal(near, far)
