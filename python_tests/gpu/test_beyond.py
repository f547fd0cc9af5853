"""Tensors of more than 2^31 elements, where an index of 32 bits ends: every operator, forward and backward.

Samples are independent of each other, so what happens to the last ones of a huge batch is what happens to them alone:
the batch repeats a few samples, the gradient of the output is zero but at the last ones, and everything that belongs
to them is held to twice eager's error against float64. These tests need gigabytes; `bench.gpu_day` runs them alone on
the card.
"""

import gc

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, dense_conv2d, dense_linear, dense_sum, dnl_layer, exactly, named
from dnl_kernels.testing.nonlocal_attention import Case as Attention

from . import large
from .refusals import skipped_where_refused
from .targets import DEVICE, EMULATED, PAIRS

BEYOND = 2**31 if not EMULATED else 2**15  # a rehearsal of the test itself
DTYPE = torch.bfloat16
# Operator -> the call on a few samples, and the leaves whose first dimension is the batch: by the beginnings of names.
FEW = {
    "dense_sum": (lambda: named._dense_sum(dense_sum.Case((4, 8, 56, 56), 2, 1), DTYPE), ("states",)),
    "dense_linear": (lambda: named._dense_linear(dense_linear.Case((64, 32), (64, 64), 32), DTYPE), ("states",)),
    "dense_conv2d": (
        lambda: named._dense_conv2d(dense_conv2d.Case(4, (16, 16), 32, 32, 8), DTYPE), ("states",)),
    "nonlocal_attention": (
        lambda: named._nonlocal_attention("softmax")(Attention(4, 4, 128, 128, 64, 64), DTYPE),
        ("query", "key", "value")),
    "dnl_layer": (
        lambda: named._dnl_layer(
            dnl_layer.Case((8, 8), (16, 16), 16, size=1, kernel="softmax", batch=16), DTYPE), ("states",)),
    "dnl_block": (lambda: named._dnl_block(large.block(4, 8, (32, 32), 4), DTYPE), ("x0",)),
}  # fmt: skip
COPIES = 8  # of the largest tensor: inputs, outputs and their gradients, with what a backward pass keeps


def _need(bytes):
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        if (free := torch.cuda.mem_get_info()[0]) < bytes:
            pytest.skip(f"needs {bytes >> 30} GiB, of which {free >> 30} are free")


def _gradients(call, leaves, backend, dy_of, wanted):
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in leaves.items()}
    y = call.run(leaves, backend)
    found = torch.autograd.grad(y, [leaves[n] for n in wanted], dy_of(y)) if wanted else ()
    return y.detach(), dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("op, backend", PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_more_than_two_to_the_31_elements(op, backend):
    make, batched = FEW[op]
    call = make()
    few = {n: t.to(DEVICE) for n, t in call.leaves.items()}
    samples = next(t.shape[0] for n, t in few.items() if n.startswith(batched))
    # The fused layers and blocks of CUDA keep partial sums of every sample for the gradients of their parameters.
    wanted = [n for n in few if n.startswith(batched) or op not in ("dnl_layer", "dnl_block")]
    if op == "dnl_block" and backend.startswith("cuda"):
        wanted = []  # the resident block has no gradients
    with skipped_where_refused(), torch.no_grad():
        output = call.run(few, backend)
    widest = max([t.numel() for n, t in few.items() if n.startswith(batched)] + [output.numel()])
    repeats = BEYOND // widest + 2
    _need(COPIES * BEYOND * DTYPE.itemsize)

    def huge(t):
        return t.expand(repeats, *t.shape).reshape(repeats * t.shape[0], *t.shape[1:])

    leaves = {n: huge(t) if n.startswith(batched) else t for n, t in few.items()}
    assert max(repeats * output.numel(), *(t.numel() for t in leaves.values())) > BEYOND

    def ramp(y):
        steps = torch.linspace(-1, 1, y[-samples:].numel(), dtype=torch.float64).reshape(y[-samples:].shape)
        dy = torch.zeros_like(y)
        dy[-samples:] = steps.to(dy)
        return dy

    y, found = _gradients(call, leaves, backend, ramp, wanted)
    for n in wanted:
        if n.startswith(batched):  # a piece at a time: nothing large is allocated
            assert not any(part.any() for part in found[n][:-samples].split(1 << 14)), n
    assert torch.equal(y[:samples], y[-samples:])
    last = {"output": y[-samples:]} | {n: g[-samples:] if n.startswith(batched) else g for n, g in found.items()}
    del y, found, leaves
    wide = {n: t.cpu().double() for n, t in few.items()}
    exact_y, exact = exactly(lambda: _gradients(call, wide, "reference", ramp, wanted), DTYPE, DTYPE)
    for name, value in last.items():
        assert_within_budget(name, value.cpu(), exact_y if name == "output" else exact[name])


def test_every_operator_has_a_case():
    assert set(FEW) == set(_backend.SUPPORTS)
