"""Results do not depend on the threads, bit by bit: one, two and three of them on inputs that are cut into more than
twice as many pieces, for every operator that has loops of its own. tests of parts have few pieces, or one thread."""

import pytest
import torch
from test_dnl_block_cpu import block, parameters_of, step
from test_dnl_bottleneck import block as bottleneck_of
from test_dnl_bottleneck import parameters_of as bottleneck_parameters_of
from test_dnl_layer_cpu import Case as LayerCase
from test_dnl_layer_cpu import ours as layer

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import bottleneck, fused
from dnl_kernels.ops.norm_activation import cpu as norm_activation
from dnl_kernels.ops.transition import cpu as transition
from dnl_kernels.testing import cotangent

pytestmark = pytest.mark.skipif(_backend.absence("cpu") is not None, reason="needs the C++ extension")


def gradients(function, leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent(y))]


def dense_sum():
    """Tasks of 16384 elements, and 64 chunks of the weight's gradient."""
    leaves = [torch.randn(2, 5), *(torch.randn(5, 30011) for _ in range(2))]
    return lambda: gradients(lambda w, *x: dnl.dense_sum(x, w, channel_dim=0, backend="cpu"), leaves)


def dense_conv2d():
    """A tile for each of 13 images."""
    leaves = [torch.randn(3, 5, 3, 3), torch.randn(3), torch.randn(5), torch.randn(5)]
    leaves += [torch.randn(13, 3, 37, 41), torch.randn(13, 2, 37, 41)]

    def call(w, b, s, h, *x):
        return dnl.dense_conv2d(x, w, b, norm_scale=s, norm_shift=h, activation="gelu", backend="cpu")

    return lambda: gradients(call, leaves)


def dense_linear():
    """torch's products, of integers: every order of the sums is exact."""
    leaves = [torch.randint(-3, 4, shape).float() for shape in ((9, 24), (9,), (24,), (24,), (300, 16), (300, 8))]

    def call(w, b, s, h, *x):
        return dnl.dense_linear(x, w, b, norm_scale=s, norm_shift=h, activation="relu", backend="cpu")

    return lambda: gradients(call, leaves)


def nonlocal_attention():
    """Nine pairs of a sample and a head, several tiles of queries and parts of keys each."""
    leaves = [torch.randn(3, 3, n, c) for n, c in ((140, 5), (530, 5), (530, 7))] + [torch.rand(3) + 0.5]

    def call(q, k, v, bandwidth):
        return dnl.nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=bandwidth, backend="cpu")

    return lambda: gradients(call, leaves)


def dnl_layer():
    """A group for each of 23 samples."""
    case = LayerCase(batch=23, height=17, width=19, heads=2, kernel="gaussian", biases="qvo")
    tensors = case.tensors(torch.float32)

    def call():
        x, found = layer(case, *tensors)
        return [x, *found.values()]

    return call


def dense_conv2d_of_many_channels():
    """In Winograd's form: ten runs of 48 tiles."""
    leaves = [torch.randn(17, 33, 3, 3), torch.randn(17), torch.randn(2, 33, 37, 43)]
    return lambda: gradients(lambda w, b, x: dnl.dense_conv2d([x], w, b, activation="relu", backend="cpu"), leaves)


def dnl_bottleneck():
    """Evaluated: panels of 48 of 3 x 713 pixels, 28 tiles of 3 x 192 at a time."""
    config = bottleneck_of(in_channels=5, layers=2, growth=17, bottleneck=2)
    layers, x = bottleneck_parameters_of(config, torch.float32), torch.randn(3, 5, 23, 31)
    return lambda: [bottleneck.dnl_block(x, layers, config)[0]]


def transition_():
    """Panels of 48 of 3 x 187 pixels, and 57 planes to take maxima of."""
    x, norm = torch.randn(3, 19, 22, 35), [torch.randn(19), torch.randn(19), torch.randn(19), torch.rand(19) + 0.5]
    weight = torch.randn(17, 19, 1, 1)
    return lambda: [
        transition.transition(x, weight, None, norm, "silu", True, 1e-5),
        transition.norm_activation_max_pool(x, norm, "relu", 1e-5),
    ]


def norm_activation_():
    """A task for each of 19 channels."""
    leaves = [torch.randn(3, 19, 81, 83), torch.randn(19), torch.randn(19)]

    def call(x, w, b):
        return norm_activation.norm_activation(x, w, b, None, None, "silu", "ceil", 1e-5)[0]

    return lambda: gradients(call, leaves)


def dnl_block(**options):
    """A tile for each of 17 images."""
    config = block(training=True, in_channels=3, growth=4, **options)
    layers, x = parameters_of(config, torch.float32, options.get("preactivation", True)), torch.randn(17, 3, 32, 31)

    def call():
        states, statistics, found = step(fused.dnl_block, x, layers, config)
        return [states, *(t for t in statistics[:2] if t is not None), *found.values()]

    return call


OPERATORS = {
    "dense_sum": dense_sum,
    "dense_conv2d": dense_conv2d,
    "dense_linear": dense_linear,
    "nonlocal_attention": nonlocal_attention,
    "dnl_layer": dnl_layer,
    "dense_conv2d-wide": dense_conv2d_of_many_channels,
    "norm_activation": norm_activation_,
    "dnl_bottleneck": dnl_bottleneck,
    "transition": transition_,
    "dnl_block": dnl_block,
    "dnl_block-paper": lambda: dnl_block(preactivation=False),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits_from_one_two_and_three_threads(name):
    call, threads, results = OPERATORS[name](), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
