"""Against a Volterra solver that nobody here wrote: `voles` (collocation), on linear convolution kernels.

It is a separate program under the GPL, imported by this test only and not part of the package.
"""

import pytest
import torch

from dnl_kernels import theory

voles = pytest.importorskip("voles", reason="the outside Volterra solver: pip install voles")

SAMPLES = 1025


def solve_with_voles(kernel, forcing):
    """y = g + int_0^t K(t - s) y(s) ds from samples of K and g at i / (SAMPLES - 1)."""
    return torch.as_tensor(
        voles.solve_VIE_2(
            kernel_values=kernel.numpy(), g_values=forcing.numpy(), time_step=1 / (SAMPLES - 1), coll_divs=4
        )
    )


@pytest.mark.parametrize("kind", ["toeplitz", "dense", "exponential"])
@pytest.mark.parametrize("dim", [1, 3])
def test_linear_convolution_equations(dim, kind):
    """sigma = N = id: agreement to 1e-8 at all grid points, for scalar and for matrix-valued kernels."""
    generator = torch.Generator().manual_seed(dim)
    M = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(dim, generator=generator, dtype=torch.float64)
    rates = torch.tensor([0.7, 3.0], dtype=torch.float64)

    def profile(lag):
        return torch.stack([torch.cos(3 * lag), 1 / (1 + lag)], -1)

    if kind == "exponential":
        K = theory.ExponentialSumKernel(rates, M)
    else:
        K = theory.ToeplitzKernel(profile, M)
    kernel = theory.CallableKernel(K.evaluate, (dim, dim)) if kind == "dense" else K
    eye = torch.eye(dim, dtype=torch.float64)
    curves = theory.ParameterCurves(
        lambda t: (1 + t * t)[..., None, None] * eye, lambda t: torch.sin(4 * t)[..., None] * v, kernel, dim=dim
    )
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    ours = theory.solve_integral_equation(curves, x, theory.LayerMap(None, "identity"), rtol=1e-11, layers=64)
    times = torch.arange(SAMPLES, dtype=torch.float64) / (SAMPLES - 1)
    values, forcing = K.evaluate(times, torch.zeros_like(times)), curves.A(times) @ x + curves.a(times)
    if dim == 1:
        values, forcing = values[:, 0, 0], forcing[:, 0]
    theirs = solve_with_voles(values, forcing).reshape(SAMPLES, dim)
    scale = theirs.abs().max()
    assert (ours.states - theirs[:: (SAMPLES - 1) // 64]).abs().max() < 1e-8 * scale
    assert (ours(times) - theirs).abs().max() < 1e-8 * scale  # dense output
