"""dense_sum's Triton kernels against float64: the same named cases as every other backend, and their own corners."""

import pytest
import torch
import triton
import triton.language as tl

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dense_sum import triton as kernels
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_sum import CASES, Case, inputs
from dnl_kernels.testing.triton_interpreter import traffic

every_dtype = pytest.mark.parametrize("dtype", _backend.TRITON.dtypes, ids=str)
OWN_CASES = {
    "several-column-tiles": Case((70, 130), 3, -1),
    "several-row-tiles": Case((3, 5, 1100), 2, 1),
    "several-tiles": Case((5000,), 2),
    "several-tiles-of-a-row": Case((2, 2, 4100), 2, 1),
}


def run(weight, states, channel_dim, backend):
    weight, states = weight.detach().requires_grad_(), [s.detach().requires_grad_() for s in states]
    y = dnl.dense_sum(states, weight, channel_dim=channel_dim, backend=backend)
    dy = cotangent(y)
    return y, torch.autograd.grad(y, [weight, *states], dy)


def check(weight, states, channel_dim):
    y, grads = run(weight, states, channel_dim, "triton")
    wide = weight.double(), [s.double() for s in states]
    exact, exact_grads = exactly(lambda: run(*wide, channel_dim, "reference"), weight.dtype)
    assert_within_budget("y", y, exact)
    names = ["dweight", *(f"dstates[{j}]" for j in range(len(states)))]
    for name, a, e in zip(names, grads, exact_grads, strict=True):
        assert_within_budget(name, a, e)


@pytest.mark.parametrize("case", {**CASES, **OWN_CASES}.values(), ids={**CASES, **OWN_CASES})
@every_dtype
def test_against_float64(case, dtype):
    weight, states = inputs(case, dtype)
    check(weight, states, 0 if case.channel_dim is None else case.channel_dim)


def test_more_states_than_one_launch_writes_pointers():
    weight, states = inputs(Case((2, 3), 70, 1), torch.float32)
    check(weight, states, 1)


@every_dtype
def test_slices_of_a_prefix_buffer_are_read_in_place(dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a state was copied"))
    images, tokens = torch.randn(3, 12, 4, 5).to(dtype), torch.randn(3, 7, 12).to(dtype)
    for buffer, dim in ((images, 1), (tokens, 2)):
        states = list(buffer.split(3, dim))
        layout = kernels._layout(states, torch.ones(4, 3, dtype=dtype), dim)
        assert [s.data_ptr() for s in layout.states] == [s.data_ptr() for s in states]
        assert kernels._layout(states, torch.ones(4, dtype=dtype), 0).states[3] is states[3]


@every_dtype
def test_strided_states(dtype):
    weight = torch.randn(3, 6, dtype=dtype)
    wide = torch.randn(3, 2, 12, 5, dtype=dtype)
    states = [wide[0, :, ::2], wide[1].transpose(1, 2)[:, :, :6].transpose(1, 2), wide[2, :, 6:].flip(1)]
    check(weight, states, 1)
    check(weight[:, 0], states, 1)
    check(torch.randn(6, 3, dtype=dtype).T, [wide[j, :, 3:9] for j in range(3)], 1)


@pytest.mark.parametrize("wanted", ["weight", "states"])
def test_only_the_wanted_gradients_are_computed(wanted):
    w, x = torch.randn(2, 3), torch.randn(2, 4, 3)
    leaf = (w if wanted == "weight" else x).requires_grad_()
    with traffic() as count:
        y = dnl.dense_sum([x[0], x[1]], w, backend="triton")
        torch.autograd.grad(y.sum(), leaf)
    written = {name.split("[")[0] for name, bytes_ in count.by_tensor.items() if bytes_["store"]} - {"TABLE"}
    assert written == {"weight": {"Y", "PARTIAL"}, "states": {"Y", "TENSORS"}}[wanted]


def test_offsets_beyond_32_bits(sparse_memory):
    stride = 2**31 + 64
    wide = sparse_memory(stride + 8, torch.float16).as_strided((2, 8), (stride, 1))
    wide.copy_(torch.arange(16).view(2, 8))
    for weight, dim in ((torch.tensor([2.0]), 0), (torch.full((1, 8), 2.0), 1)):
        y, (dweight, dx) = run(weight.half(), [wide], dim, "triton")
        assert torch.equal(y, 2 * torch.arange(16).view(2, 8).half())
        assert dweight.isfinite().all() and dx.shape == (2, 8)


@triton.jit
def offset_kernel(X, OUT, outer, inner, columns, stride):
    """Where the first element of a row lies, as the kernels of dense_sum find it."""
    row = tl.arange(0, 1)
    places = kernels._pointers(X, row + outer, row + inner, row, stride, columns, False)
    tl.store(OUT + row[:, None], places.to(tl.int64, bitcast=True) - X.to(tl.int64, bitcast=True))


def test_offsets_beyond_32_bits_inside_one_sample():
    """Rows are channels of images: the last of 64 channels of 2^26 pixels begins behind 2^31 elements."""
    x, out = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)
    offset_kernel[(1,)](x, out, 1, 63, 2**26, 2**32)
    assert out.item() == 2 * (2**32 + 63 * 2**26)
