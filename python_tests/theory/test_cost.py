"""What gradients through the depth cost: operations and saved memory, counted and not timed."""

import math

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory import LayerMap, ParameterCurves, forward

D, BATCH = 2, 16


class Written(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that operators write, backward ones included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for z in out if isinstance(out, tuple | list) else (out,):
            if isinstance(z, torch.Tensor) and z._base is None:
                self.elements += z.numel()
        return out


def cost(run):
    """(elements written by forward and backward, bytes of distinct storages that the graph saves)."""
    saved = {}

    def pack(z):
        saved[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
        keep.append(z)
        return z

    keep: list = []
    work = Written()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        with work:
            run().square().sum().backward()
    return work.elements, sum(saved.values())


def discrete(layers):
    P = theory.DiscreteParameters.zeros(layers, D).requires_grad_()
    x = torch.ones(BATCH, D, dtype=torch.float64)
    return lambda: forward(P, x, LayerMap()).final


def curves(kernel):
    eye = torch.eye(D, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    return ParameterCurves(
        lambda t: scale * (1 + t)[..., None, None] * eye,
        lambda t: 0 * t[..., None].expand(*t.shape, D),
        kernel,
        dim=D,
    )


def from_curves(kernel, scheme="euler"):
    x = torch.ones(BATCH, D, dtype=torch.float64)
    return lambda layers: lambda: forward(curves(kernel), x, LayerMap(), layers=layers, scheme=scheme).final


M = torch.ones(1, D, D, dtype=torch.float64) / 4
ONE = lambda t: torch.cos(t)[..., None]  # noqa: E731
DENSE = theory.CallableKernel(lambda t, s: torch.cos(t - s)[..., None, None] * M[0], (D, D))
STRUCTURED = {
    "separable": theory.SeparableKernel.of_rank(ONE, ONE, M),
    "exponential": theory.ExponentialSumKernel(torch.tensor([2.0], dtype=torch.float64), M),
}


@pytest.mark.parametrize("build", [discrete, from_curves(DENSE), from_curves(DENSE, "trapezoid")])
def test_dense_gradients_cost_the_square_of_the_depth(build):
    """The bar is a slope of 2.2; rows cut one by one have 3."""
    few, many = cost(build(64)), cost(build(256))
    assert math.log(many[0] / few[0], 4) <= 2.2
    # The triangle of K and O(L) states: no copy of the earlier states per layer, which would be L^2 / 2 B d numbers.
    triangle = 256 * 257 / 2 * D * D * 8
    assert many[1] <= 3 * triangle + 40 * 256 * BATCH * D * 8


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_gradients_cost_the_depth(kind):
    build = from_curves(STRUCTURED[kind])
    few, many = cost(build(256)), cost(build(2048))
    assert math.log(many[0] / few[0], 8) <= 1.1
    assert math.log(many[1] / few[1], 8) <= 1.1


def test_gradients_of_the_two_orders_of_summation_agree():
    """With gradients columns are added ahead; without them rows are contracted: the same states and derivatives."""
    P = theory.sample_pointwise(ParameterCurves.random_smooth(3, 1), 12)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = P.requires_grad_()
    path = forward(free, x, LayerMap())
    with torch.no_grad():
        assert (path.states - forward(P, x, LayerMap()).states).abs().max() < 1e-14
    names = [name for name, value in free.items() if value.numel()]
    found = torch.autograd.grad(path.final.square().sum() / 2, [getattr(free, name) for name in names])
    expected = theory.adjoint(P, x, LayerMap(), path.final.detach()).gradient
    for name, value in zip(names, found, strict=True):
        assert (value - getattr(expected, name)).abs().max() < 1e-13, name
    small = theory.sample_pointwise(ParameterCurves.random_smooth(1, 1), 3)

    def final(A, K):
        return forward(theory.DiscreteParameters(A, small.a, K, small.b, small.vartheta), x[:, :1], LayerMap()).final

    inputs = (small.A.clone().requires_grad_(), small.K.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(final, inputs)
