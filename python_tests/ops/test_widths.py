"""Every kernel that has lanes at every width from 1 to 49: shorter than a vector, whole vectors, and every rest, on
every instruction-set level and in both dtypes that are computed in.

Where a kernel only multiplies and adds, inputs are small integers: every order of the sums is exact, and results must
equal the reference's bit by bit. Otherwise float32 is held to the budget, found once for all levels; in float64, where
a lane that is wrong is off by much more than any rounding, to 1e-10, which saves finding the budget.
"""

import pytest
import torch
from test_dnl_block_cpu import block, cast, parameters_of, step
from test_dnl_layer_cpu import Case as LayerCase
from test_dnl_layer_cpu import eager
from test_dnl_layer_cpu import ours as layer
from torch.utils._pytree import tree_map

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import fused
from dnl_kernels.ops.dnl_block import reference as block_reference
from dnl_kernels.ops.dnl_layer.config import NonLocalParameters
from dnl_kernels.ops.norm_activation import cpu as norm_activation
from dnl_kernels.ops.norm_activation import reference as norm_activation_reference
from dnl_kernels.testing import Exact, assert_within_budget, exactly

pytestmark = pytest.mark.skipif(_backend.absence("cpu") is not None, reason="needs the C++ extension")
WIDTHS = range(1, 50)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def bounded(compute, dtype):
    if dtype == torch.float32:
        return exactly(compute, dtype)
    return tree_map(lambda t: Exact(t, 1e-10 * (1 + t.abs())) if isinstance(t, torch.Tensor) else t, compute())


def integers(*shape, dtype, most=3):
    return torch.randint(-most, most + 1, shape).to(dtype)


def gradients(function, leaves):
    """The output and every gradient, from a gradient of small integers."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    dy = (torch.arange(y.numel()) * 5 % 7 - 3).to(y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_equal(levels, width, ours, exact, leaves):
    expected = gradients(exact, [None if t is None else t.double() for t in leaves])
    for level in levels():
        for i, (a, e) in enumerate(zip(gradients(ours, leaves), expected, strict=True)):
            assert torch.equal(a.double(), e), f"{level}, width {width}, result {i}: {(a.double() - e).abs().max()}"


@both_dtypes
@pytest.mark.parametrize("channel_dim", [None, 1, 2])
def test_dense_sum(levels, dtype, channel_dim):
    for width in WIDTHS:
        channels = () if channel_dim is None else ((2, 3, width)[channel_dim],)
        leaves = [integers(2, *channels, dtype=dtype), *(integers(2, 3, width, dtype=dtype) for _ in range(2))]
        ours, exact = (
            lambda w, *states, b=b: dnl.dense_sum(states, w, channel_dim=channel_dim or 0, backend=b)
            for b in ("cpu", "reference")
        )
        assert_equal(levels, width, ours, exact, leaves)


@both_dtypes
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_dense_conv2d(levels, dtype, size, norm):
    for width in WIDTHS:
        channels = 3
        leaves = [integers(2, channels, size, size, dtype=dtype), integers(2, dtype=dtype)]
        leaves += [integers(channels, dtype=dtype) if norm else None for _ in range(2)]
        leaves += [integers(2, 2, 3, width, dtype=dtype), integers(2, 1, 3, width, dtype=dtype)]

        def call(w, b, s, h, *states, backend):
            words = {"norm_scale": s, "norm_shift": h, "activation": "relu", "backend": backend}
            return dnl.dense_conv2d(states, w, b, **words)

        ours, exact = (lambda *t, b=b: call(*t, backend=b) for b in ("cpu", "reference"))
        assert_equal(levels, width, ours, exact, leaves)


@both_dtypes
@pytest.mark.parametrize("pool", [None, "ceil"])
def test_norm_activation(levels, dtype, pool):
    for width in WIDTHS:
        leaves = [integers(2, 3, 3, width, dtype=dtype), integers(3, dtype=dtype), integers(3, dtype=dtype)]
        mean = integers(3, dtype=dtype)

        def ours(x, w, b, mean=mean):
            return norm_activation.norm_activation(x, w, b, mean, torch.ones_like(mean), "relu", pool, 0.0)[0]

        def exact(x, w, b, mean=mean):
            mean = mean.double()
            return norm_activation_reference.norm_activation(x, w, b, mean, torch.ones_like(mean), "relu", pool, 0.0)

        assert_equal(levels, width, ours, exact, leaves)


def moments(x):
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


@both_dtypes
def test_statistics(levels, dtype):
    for width in WIDTHS:
        x = integers(2, 3, 4, width, dtype=dtype)
        exact = bounded(lambda x=x: moments(x.double()), dtype)
        for level in levels():
            found = norm_activation.norm_activation(x, None, None, None, None, "identity", None, 1e-5)[1:]
            for a, e in zip(found, exact, strict=True):
                assert_within_budget(f"{level}, width {width}", a, e)


BLOCKS = {
    "preactivation": block(((True,), (True, True)), growth=3, in_channels=2),
    "paper": block(((True,), (True, True)), growth=3, in_channels=2, preactivation=False),
    "pointwise": block(((True,), (True, True)), growth=3, in_channels=2, affine="conv1x1"),
}


@both_dtypes
@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_dnl_block(levels, dtype, config):
    """Five rows: a group of four, and one that is cut off."""
    for width in WIDTHS:
        x, layers = torch.randn(1, 2, 5, width, dtype=dtype), parameters_of(config, dtype)
        wide = x.double(), cast(layers, torch.float64)
        exact, _, exact_grads = bounded(lambda wide=wide: step(block_reference.dnl_block, *wide, config), dtype)
        for level in levels():
            states, _, grads = step(fused.dnl_block, x, layers, config)
            assert_within_budget(f"{level}, width {width}: states", states, exact)
            for name, e in exact_grads.items():
                assert_within_budget(f"{level}, width {width}: {name}", grads[name], e)


@both_dtypes
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("side", ["queries", "keys", "features", "values"])
def test_nonlocal_attention(levels, dtype, kernel, side):
    for width in WIDTHS:
        sizes = {"queries": 3, "keys": 5, "features": 2, "values": 3, side: width}
        shapes = [(sizes["queries"], sizes["features"]), (sizes["keys"], sizes["features"])]
        shapes.append((sizes["keys"], sizes["values"]))
        leaves = [torch.randn(1, 1, *shape, dtype=dtype) for shape in shapes]
        leaves.append(torch.full((1,), 1.5, dtype=dtype) if kernel == "gaussian" else None)

        def call(backend, leaves):
            def function(q, k, v, bandwidth):
                return dnl.nonlocal_attention(q, k, v, kernel=kernel, bandwidth=bandwidth, backend=backend)

            return gradients(function, leaves)

        wide = [None if t is None else t.double() for t in leaves]
        exact = bounded(lambda wide=wide, call=call: call("reference", wide), dtype)
        for level in levels():
            for i, (a, e) in enumerate(zip(call("cpu", leaves), exact, strict=True)):
                assert_within_budget(f"{level}, {width} {side}: result {i}", a, e)


@both_dtypes
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_dnl_layer(levels, dtype, kernel):
    """Samples of 1 to 49 positions, of which several stand side by side."""
    for width in WIDTHS:
        case = LayerCase(batch=9, channels=3, height=1, width=width, query=2, value=2, outputs=2, kernel=kernel)
        y, dx, theta = case.tensors(dtype, width)
        wide = y.double(), dx.double(), NonLocalParameters(*(None if t is None else t.double() for t in theta))
        exact, exact_grads = bounded(lambda case=case, wide=wide: eager(case, *wide), dtype)
        for level in levels():
            x, grads = layer(case, y, dx, theta)
            assert_within_budget(f"{level}, width {width}", x, exact)
            for name, e in exact_grads.items():
                assert_within_budget(f"{level}, width {width}: {name}", grads[name], e)
