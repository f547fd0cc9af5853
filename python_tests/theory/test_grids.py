"""Grids are integers: the times derived from them are distinct, and a node belongs to its own piece, in every dtype."""

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.theory import LayerMap, ParameterCurves, forward

LEVELS = (7, 49, 103, 701, 1000, 1021)
REALS = (torch.float64, torch.float32)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("layers", LEVELS)
def test_a_node_belongs_to_its_own_piece(layers, dtype):
    """However the node was computed: as a quotient, or by linspace."""
    u = torch.arange(layers, dtype=dtype)[:, None]
    quotients = torch.arange(layers, dtype=dtype) / layers
    spaced = torch.linspace(0, 1, layers + 1, dtype=dtype)[:-1]
    for t in (quotients, spaced):
        assert torch.equal(theory.piecewise_constant(u)(t), u)
        assert torch.equal(theory.piecewise_linear(u)(t), u)
    middle = ((torch.arange(layers, dtype=torch.float64) + 0.5) / layers).to(dtype)
    assert torch.equal(theory.piecewise_constant(u)(middle), u)
    just_before = quotients[1:] - 0.01 / layers
    assert torch.equal(theory.piecewise_constant(u)(just_before), u[:-1])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_nodes_belong_to_their_pieces(dtype):
    """Wherever the half-precision nodes lie closer to their own node than a quarter of a cell."""
    for layers in (5, 10, 49, 100):
        u = torch.arange(layers, dtype=torch.float32)[:, None]
        t = (torch.arange(layers, dtype=torch.float64) / layers).to(dtype)
        assert torch.equal(theory.piecewise_constant(u)(t), u), layers


@pytest.mark.parametrize("dtype", REALS)
def test_prolonging_reads_the_grid_as_integers(dtype):
    """From L to any multiple of it: the old values are kept exactly, in every dtype."""
    curves = ParameterCurves.random_smooth(1, 4)
    for layers, factor in ((7, 3), (49, 2), (103, 1)):
        coarse = theory.sample_pointwise(curves, layers, dtype=dtype)
        again = theory.restrict(theory.prolong(coarse, factor * layers), layers)
        for name, value in coarse.items():
            assert torch.equal(getattr(again, name), value), (layers, name)


def test_derivatives_of_extensions_at_nodes_are_those_of_the_cell():
    u = torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)
    linear = theory.piecewise_linear(u)
    t = torch.arange(3, dtype=torch.float64) / 3
    slope = torch.func.jvp(linear, (t,), (torch.ones_like(t),))[1]
    assert torch.allclose(slope[:, 0], torch.tensor([3.0, 9.0, 0.0], dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("dtype", [*REALS, *HALVES])
@pytest.mark.parametrize("layers", [3, 49, 103, 300])
def test_toeplitz_kernels_take_every_uniform_grid(layers, dtype):
    d = 2
    matrices = torch.tensor([[[0.5, -0.2], [0.1, 0.3]]], dtype=torch.float64)
    K = theory.ToeplitzKernel(lambda lag: torch.cos(3 * lag)[..., None], matrices)
    eye = torch.eye(d)
    curves = ParameterCurves(
        lambda t: (1 + t)[..., None, None] * eye.to(t), lambda t: 0 * t[..., None].expand(*t.shape, d), K, dim=d
    )
    x = torch.tensor([0.5, -0.25], dtype=dtype)
    ours = forward(curves, x, LayerMap(), layers=layers)
    exact = forward(curves, x.double(), LayerMap(), layers=layers).states
    assert ours.states.dtype == dtype
    assert (ours.states.double() - exact).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-14) * max(1, layers / 50)
    with pytest.raises(ValueError, match="uniform grid"):
        times = torch.arange(layers + 1, dtype=torch.float32) / layers
        times[2] += 0.01 / layers
        K.history(times)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scheme", ["euler", "trapezoid", "trapezoid_implicit"])
def test_half_precision_times_stay_distinct(dtype, scheme):
    """701 layers: as many distinct times, and the states of float64 to the rounding of the result."""
    curves = ParameterCurves.random_smooth(3, 2)
    x = torch.tensor([0.5, -0.25, 0.125], dtype=dtype)
    path = forward(curves, x, LayerMap(), layers=701, scheme=scheme)
    assert path.times.unique().numel() == 702
    assert path.states.dtype == dtype
    exact = forward(curves, x.double(), LayerMap(), layers=701, scheme=scheme).states
    assert (path.states.double() - exact).abs().max() <= torch.finfo(dtype).eps
    sampled = theory.sample_pointwise(curves, 701, dtype=dtype)
    assert sampled.A.dtype == dtype
    exact_samples = theory.sample_pointwise(curves, 701)
    assert (sampled.A.double() - exact_samples.A).abs().max() <= torch.finfo(dtype).eps * 4
    averages = theory.sample_cell_average(curves, 301, dtype=dtype, quad_order=2)
    exact_averages = theory.sample_cell_average(curves, 301, quad_order=2)
    assert (averages.A.double() - exact_averages.A).abs().max() <= torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sampled_curves_of_low_precision_have_distinct_nodes(dtype):
    m = 701
    values = (torch.arange(m, dtype=torch.float64) / (m - 1)).to(dtype)
    K = (values[:, None] * values)[..., None, None]
    curves = ParameterCurves(values[:, None, None], values[:, None], K, dim=1)
    t = torch.linspace(0, 1, 31, dtype=torch.float64)
    assert (curves.A(t)[:, 0, 0] - t).abs().max() < 2 * torch.finfo(dtype).eps
    low = curves.A(t.to(dtype))
    assert low.dtype == dtype
    assert (low[:, 0, 0].double() - t).abs().max() < 4 * torch.finfo(dtype).eps
    square = curves.K.evaluate(t.to(dtype), t.to(dtype) / 2)[:, 0, 0]
    assert (square.double() - t * t / 2).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", REALS)
def test_dense_output_is_exact_at_the_nodes(dtype):
    for layers in (7, 49, 103):
        times = torch.arange(layers + 1, dtype=dtype) / layers
        states = torch.randn(layers + 1, 2, dtype=dtype)
        for degree in (1, 3):
            assert torch.equal(theory.Trajectory(times, states, degree)(times), states)
