"""Structured depth kernels equal the dense recursion to rounding, and cost what they promise."""

import math

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory import CallableKernel, LayerMap, ParameterCurves, forward
from dnl_kernels.theory import structured as structured_module

SCHEMES = ("euler", "trapezoid", "trapezoid_implicit")


def matrices(rank, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d, d, dtype=torch.float64, generator=generator) / math.sqrt(d)


def vectors(rank, d):
    return torch.randn(rank, d, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def separable(d, rank=3):
    left = lambda t: torch.stack([torch.cos((r + 1) * t) for r in range(rank)], -1)  # noqa: E731
    right = lambda s: torch.stack([torch.exp(-r * s) for r in range(rank)], -1)  # noqa: E731
    kernel = theory.SeparableKernel.of_rank(left, right, matrices(rank, d))
    return kernel, theory.SeparableKernel.of_rank(left, right, vectors(rank, d))


def exponential(d, rank=3):
    rates = torch.tensor([0.0, 3.0, 40.0], dtype=torch.float64)[:rank]
    return theory.ExponentialSumKernel(rates, matrices(rank, d)), theory.ExponentialSumKernel(rates, vectors(rank, d))


def toeplitz(d, rank=2):
    profile = lambda lag: torch.stack([(1 + lag) ** -(r + 0.5) for r in range(rank)], -1)  # noqa: E731
    return theory.ToeplitzKernel(profile, matrices(rank, d)), theory.ToeplitzKernel(profile, vectors(rank, d))


KINDS = {"separable": separable, "exponential": exponential, "toeplitz": toeplitz}


def network(K, b, d):
    eye = torch.eye(d, dtype=torch.float64)
    return ParameterCurves(
        lambda t: (1 + t)[..., None, None] * eye,
        lambda t: torch.sin(t)[..., None] * torch.ones(d).double(),
        K,
        b,
        dim=d,
    )


def dense(kernel):
    return CallableKernel(kernel.evaluate, kernel.value_shape)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_dense_recursion(kind, scheme):
    """300 layers cross several strides of the Toeplitz scheme; small layer counts stay inside one."""
    d, phi = 4, LayerMap.of("gaussian", positions=2)
    K, b = KINDS[kind](d)
    x = torch.randn(3, d, dtype=torch.float64)
    for layers in (1, 2, 63, 64, 65, 300):
        ours = forward(network(K, b, d), x, phi, layers=layers, scheme=scheme).states
        expected = forward(network(dense(K), dense(b), d), x, phi, layers=layers, scheme=scheme).states
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max(), layers


def test_two_levels_of_fft_blocks(monkeypatch):
    """Small blocks make three levels out of 600 layers, with parents that end in between."""
    monkeypatch.setattr(structured_module, "NEAR", 4)
    monkeypatch.setattr(structured_module, "STRIDE", 2)
    monkeypatch.setattr(structured_module, "FAN_OUT", 4)
    d, phi = 2, LayerMap()
    K, b = toeplitz(d)
    x = torch.randn(2, d, dtype=torch.float64)
    for layers in (255, 256, 257, 600):
        for scheme in SCHEMES[:2]:
            ours = forward(network(K, b, d), x, phi, layers=layers, scheme=scheme).states
            expected = forward(network(dense(K), dense(b), d), x, phi, layers=layers, scheme=scheme).states
            assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max(), (layers, scheme)


@pytest.mark.parametrize("kind", KINDS)
def test_row_sums_equal_the_dense_ones(kind):
    _, b = KINDS[kind](3)
    times = torch.arange(151, dtype=torch.float64) / 150
    expected = dense(b).row_sums(times)
    assert (b.row_sums(times) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_dense_row_sums_equal_loops():
    kernel = CallableKernel(lambda t, s: torch.stack([t * s, t - s], -1), (2,))
    times = torch.arange(7, dtype=torch.float64) / 6
    for i, total in enumerate(kernel.row_sums(times)):
        expected = sum(torch.stack([times[i] * times[j], times[i] - times[j]]) for j in range(i + 1))
        assert (total - expected).abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_dense_ones(kind):
    d, phi = 2, LayerMap()
    K, b = KINDS[kind](d)
    gradients = []
    for kernels in ((K, b), (dense(K), dense(b))):
        x = torch.full((d,), 0.4, dtype=torch.float64, requires_grad=True)
        final = forward(network(*kernels, d), x, phi, layers=150).final
        gradients.append(torch.autograd.grad(final.square().sum(), x)[0])
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12 * gradients[1].abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_cost_does_not_grow_with_depth_squared(kind):
    """Totals per row are counted, not timed: 16 times more rows read at most 32 times more elements."""
    d, reads = 2, []
    K, _ = KINDS[kind](d)
    for layers in (1024, 16384):
        times = torch.arange(layers, dtype=torch.float64) / layers
        history, work = K.history(times), _Counter()
        with work:
            for i in range(layers):
                history.push(torch.ones(1, d, dtype=torch.float64))
                history.total(i)
        reads.append(work.elements)
    assert reads[1] < 32 * reads[0]


class _Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.elements += out.numel()
        return out


def test_large_rates_do_not_overflow():
    K = theory.ExponentialSumKernel(torch.tensor([1e6], dtype=torch.float64), matrices(1, 1))
    states = forward(network(K, None, 1), torch.ones(1).double(), LayerMap(), layers=50).states
    assert torch.isfinite(states).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_thousand_layers(kind):
    """L = 16384: the states satisfy eq. (1), whose sum is evaluated directly at a few layers of all sizes."""
    d, layers, phi = 4, 16384, LayerMap()
    K, b = KINDS[kind](d)
    curves, x = network(K, b, d), torch.randn(2, d, dtype=torch.float64)
    states = forward(curves, x, phi, layers=layers).states
    t = torch.arange(layers, dtype=torch.float64) / layers
    for row in (0, 63, 64, 1023, 1024, 5000, 16383):
        past = t[: row + 1]
        memory = torch.einsum("jab,jnb->na", K.evaluate(t[row], past), states[: row + 1])
        y = x @ curves.A(t[row]).T + curves.a(t[row]) + (memory + b.evaluate(t[row], past).sum(0)) / layers
        assert (states[row + 1] - phi(y)).abs().max() <= 1e-12, row


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="coefficients must have shape"):
        theory.SeparableKernel(torch.cos, torch.cos, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"rates must be >= 0, got -1"):
        theory.ExponentialSumKernel(torch.tensor([-1.0]), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"rates must have shape \[2\]"):
        theory.ExponentialSumKernel(torch.tensor([1.0]), torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="matrices must have shape"):
        theory.ToeplitzKernel(torch.cos, torch.zeros(3))
    with pytest.raises(ValueError, match="uniform grid"):
        toeplitz(2)[0].history(torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64))
