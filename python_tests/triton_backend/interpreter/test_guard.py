"""The guard itself: numbers as on a GPU, and planted bugs that it must catch."""

import pytest
import torch
import triton
import triton.language as tl

from dnl_kernels.testing.triton_interpreter import OutOfBounds, traffic


@triton.jit
def cast_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    tl.store(Y + i, x.to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(X, Y, OUT, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    y = tl.load(Y + i, mask=i < n, other=1.0)
    if OP == "multiply-add":
        z = x * y + x
    elif OP == "divide-maximum":
        z = tl.maximum(x / y, -y)
    elif OP == "select":
        z = tl.where(x > y, x, y)
    else:
        z = x - tl.sum(x, 0)
    tl.store(OUT + i, z, mask=i < n)


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    ij = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(A + ij), tl.load(B + ij), input_precision=PRECISION)
    tl.store(C + ij, c)


@triton.jit
def sum_tuple_kernel(STATES, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(len(STATES)):
        y += tl.load(STATES[j] + i, mask=i < n, other=0.0)
    tl.store(Y + i, y, mask=i < n)


@triton.jit
def hint_kernel(X, Y, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(Y + place, tl.load(tl.multiple_of(X + place, (1, 16))))


@triton.jit
def atomic_kernel(Y):
    tl.atomic_add(Y, 1.0)


SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, 65519.0, 65520.0, float("inf"), float("nan")]


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_casts_round_to_nearest_even(source, target):
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(500) * 10.0 ** torch.randint(-8, 8, (500,))]).to(source)
    y = torch.empty(x.numel(), dtype=target)
    cast_kernel[(1,)](x, y, x.numel(), 512)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["multiply-add", "divide-maximum", "select", "center"])
def test_bfloat16_arithmetic_rounds_after_every_operation(op):
    x, y = torch.randn(2, 37).bfloat16()
    expected = {
        "multiply-add": x * y + x,
        "divide-maximum": torch.maximum(x / y, -y),
        "select": torch.where(x > y, x, y),
        "center": x - x.float().sum().bfloat16(),
    }[op]
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, 37, op, 64)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dot_of_half_types_accumulates_in_float32(dtype):
    a, b = torch.randn(2, 16, 16).to(dtype)
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 16, "ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_dot_of_float32_loses_bits_only_in_tf32():
    a, b = torch.randn(2, 16, 16)
    exact = (a.double() @ b.double()).float()
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 16, "ieee")
    torch.testing.assert_close(c, exact, rtol=1e-6, atol=1e-5)
    dot_kernel[(1,)](a, b, c, 16, "tf32")
    assert 1e-5 < (c - exact).abs().max() < 1e-2


@pytest.mark.parametrize("kernel", ["load", "store"])
def test_planted_bug_one_element_too_far(kernel):
    x, y = torch.zeros(32), torch.zeros(32)
    short = x[:31] if kernel == "load" else x
    target = y[:31] if kernel == "store" else y
    with pytest.raises(OutOfBounds, match=rf"{kernel} of 1 elements outside.*byte 124 of '{'XY'[kernel == 'store']}'"):
        cast_kernel[(1,)](short, target, 32, 32)
    cast_kernel[(1,)](x, y, 32, 32)


def test_planted_bug_in_a_tuple_of_tensors_is_named():
    states = (torch.ones(20), torch.ones(19))
    y = torch.empty(20)
    with pytest.raises(OutOfBounds, match=r"'STATES\[1\]', which has 76"):
        sum_tuple_kernel[(1,)](states, y, 20, 32)
    sum_tuple_kernel[(1,)](states, y[:19], 19, 32)
    assert y[:19].tolist() == [2.0] * 19


def test_planted_bug_misaligned_access():
    memory = torch.zeros(65, dtype=torch.uint8)
    offset = 1 if memory.data_ptr() % 2 == 0 else 2
    x = torch.frombuffer(memory.numpy(), dtype=torch.float16, count=8, offset=offset)
    with pytest.raises(OutOfBounds, match="no multiple of 2 bytes"):
        cast_kernel[(1,)](x, torch.empty(8), 8, 8)


def test_planted_bug_unwritten_output_is_nan():
    y = torch.empty(40)
    cast_kernel[(1,)](torch.zeros(40), y, 39, 64)
    assert y[39].isnan() and not y[:39].isnan().any()


def test_atomics_are_refused():
    with pytest.raises(Exception, match="deterministic"):
        atomic_kernel[(1,)](torch.zeros(1))


def test_traffic_counts_bytes_and_sectors():
    x, y = torch.zeros(64).half(), torch.zeros(64)
    with traffic() as count:
        cast_kernel[(1,)](x, y, 64, 64)
        cast_kernel[(1,)](x, y, 32, 64)
    assert (count.load, count.store, count.launches) == (192, 384, 2)
    assert count.by_tensor == {"X": {"load": 192, "store": 0}, "Y": {"load": 0, "store": 384}}
    assert count.unique_sector_bytes in range(128 + 256, 128 + 256 + 65)


def test_an_untrue_hint_of_alignment_is_an_error():
    x, y = torch.randn(40), torch.empty(40)
    hint_kernel[(1,)](x, y, 8, ROWS=4, COLUMNS=8)
    assert torch.equal(x[:32], y[:32])
    for start, stride, wrong in ((0, 9, 3), (1, 8, 4), (0, 6, 2)):
        with pytest.raises(OutOfBounds, match=f"hint_kernel: {wrong} of 4 runs of pointers .* multiples of 16 bytes"):
            hint_kernel[(1,)](x[start:], y, stride, ROWS=4, COLUMNS=8)
