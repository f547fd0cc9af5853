"""NonLocal2d against the plain N x N block."""

import copy

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels.testing import assert_within_budget, exactly


def plain(block, x):
    """Wang et al. 2018 with the matrix of all pairs of pixels."""
    batch, _, height, width = x.shape
    heads = block.heads

    def positions(conv):
        return conv(x).flatten(2).unflatten(1, (heads, -1)).mT  # [B, h, N, D]

    q, v = positions(block.theta), positions(block.g)
    if block.kernel == "gaussian":
        w = torch.exp(
            -(q[..., :, None, :] - q[..., None, :, :]).square().sum(-1) / 2 / torch.exp(block.rho)[:, None, None] ** 2
        )
        w = w / w.sum(-1, keepdim=True)
    else:
        score = q @ positions(block.phi).mT
        scale = q.shape[-1] ** -0.5 if block.scale is None else block.scale
        w = torch.softmax(scale * score, -1) if block.kernel == "softmax" else score / (height * width)
    y = (w @ v).mT.flatten(1, 2).unflatten(2, (height, width))
    z = block.out(y)
    return x + (z if block.norm is None else block.norm(z))


@pytest.mark.parametrize(
    "options", [{}, {"scale": 1.0}, {"kernel": "gaussian"}, {"kernel": "dot", "norm": None}], ids=str
)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_plain_block(options, heads, training):
    block = dnl.NonLocal2d(6, 4, heads=heads, zero_init=False, dtype=torch.float64, **options).train(training)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), plain(twin, x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *block.parameters()], dy)
    for a, e in zip(grads, torch.autograd.grad(expected, [x, *twin.parameters()], dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)
    for a, e in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("norm", ["batch", None])
def test_starts_as_the_identity_and_learns(norm):
    block = dnl.NonLocal2d(4, norm=norm)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    first = block.out if norm is None else block.norm
    assert first.weight.grad.abs().max() > 0


def test_no_matrix_of_all_pairs_is_kept():
    block = dnl.NonLocal2d(2, 2, kernel="softmax")
    x = torch.randn(1, 2, 40, 40, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        block(x)
    assert max(sizes) <= 2 * 40 * 40


def test_channels_last_half_state_dict_and_compile():
    block = dnl.NonLocal2d(4, kernel="gaussian", zero_init=False).eval()
    assert set(block.state_dict()) == {
        *(f"{name}.{kind}" for name in ("theta", "g", "out") for kind in ("weight", "bias")), "rho", "norm.weight",
        "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    x = torch.randn(2, 4, 5, 4)
    expected = block(x)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
    other = dnl.NonLocal2d(4, kernel="gaussian", backend="reference").eval()
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x), expected)
    half, x = copy.deepcopy(block).to(torch.bfloat16), x.to(torch.bfloat16)
    wide = copy.deepcopy(other).to(torch.bfloat16).double()
    exact = exactly(lambda: wide(x.double()), torch.bfloat16, torch.bfloat16)
    assert half(x).dtype == torch.bfloat16
    assert_within_budget("half", half(x), exact)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel": "local"}, "kernel is 'local'; expected one of softmax, gaussian, dot"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"inner_channels": 3, "heads": 2}, "inner_channels is 3; expected a positive multiple of heads = 2"),
        ({"kernel": "dot", "scale": 1.0}, "scale is 1.0; expected None: kernel='dot' has no scale"),
        ({"backend": "x"}, "backend is 'x'"),
    ],
)
def test_a_bad_block_is_named(arguments, message):
    with pytest.raises(ValueError, match="NonLocal2d: " + message):
        dnl.NonLocal2d(4, **arguments)
    with pytest.raises(ValueError, match=r"NonLocal2d: x is of shape \[1, 3, 2, 2\]; expected \[B, 4, H, W\]"):
        dnl.NonLocal2d(4)(torch.zeros(1, 3, 2, 2))
