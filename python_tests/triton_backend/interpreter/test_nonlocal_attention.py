"""nonlocal_attention's Triton kernels against float64: the named cases of every backend, and their own corners."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.nonlocal_attention import triton as kernels
from dnl_kernels.testing import assert_within_budget, named
from dnl_kernels.testing.nonlocal_attention import CASES, KERNELS, Case, inputs, keywords
from dnl_kernels.testing.triton_interpreter import traffic

EXPONENTIAL = [kernel for kernel in KERNELS if "dot" not in kernel]
every_kernel = pytest.mark.parametrize("kernel", EXPONENTIAL)
every_dtype = pytest.mark.parametrize("dtype", _backend.TRITON.dtypes, ids=str)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 or 32 positions, so that small cases take several, of queries and of keys, in every kernel."""
    sizes = {"forward": (32, 16), "query": (16, 32), "key": (16, 32)}
    small = {k: {256: kernels.Config(*sizes[k[0]], 1, 1)} for k in kernels.TILES}
    monkeypatch.setattr(kernels, "TILES", small)
    monkeypatch.setattr(kernels, "TILES_LARGE_SHARED", {})


def check(case, kernel, dtype):
    named.check(named._nonlocal_attention(kernel)(case, dtype), "triton")


def run(tensors, backend="triton", **words):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = dnl.nonlocal_attention(*leaves[:3], bandwidth=leaves[3], backend=backend, **words)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)
    return out, torch.autograd.grad(out, [t for t in leaves if t is not None], dout)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_kernel
def test_against_float64(case, kernel):
    check(case, kernel, torch.float32)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("several-parts", "large-scores")])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_against_float64(name, dtype):
    check(CASES[name], EXPONENTIAL[list(CASES).index(name) % 4], dtype)
