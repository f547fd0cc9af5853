"""Curves, discrete parameters, flip and norms: what is stored, what is read, what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnl_kernels import theory
from dnl_kernels.theory.curves import derivative, kernel_derivatives


def test_flip_is_symmetric_idempotent_and_copies_values():
    U = torch.randn(6, 6, 2, 3, dtype=torch.float64)
    V = theory.flip(U)
    assert torch.equal(V, V.transpose(0, 1))
    assert torch.equal(theory.flip(V), V)
    for row in range(6):
        for j in range(row + 1):
            assert torch.equal(V[j, row], U[row, j])  # the matrix itself, not its transpose


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 12), size=st.integers(1, 3))
def test_packing_loses_nothing(layers, size):
    packed = torch.arange(layers * (layers + 1) // 2 * size, dtype=torch.float64).reshape(-1, size)
    assert torch.equal(theory.pack(theory.unpack(packed, layers)), packed)


def test_rows_are_the_rows_of_the_square():
    curves = theory.ParameterCurves.random_smooth(2, 1)
    parameters = theory.sample_pointwise(curves, 5)
    for row in range(5):
        assert torch.equal(parameters.row("K", row), parameters.square("K")[row, : row + 1])
        assert parameters.row("K", row).untyped_storage().data_ptr() == parameters.K.untyped_storage().data_ptr()


def test_norm_is_the_largest_of_the_five():
    zeros = theory.DiscreteParameters.zeros(4, 3, 2)
    assert zeros.norm() == 0
    for name in ("A", "a", "K", "b", "vartheta"):
        parameters = theory.DiscreteParameters.zeros(4, 3, 2)
        getattr(parameters, name)[2] = 2.0
        # the all-2 matrix has spectral norm 2 * 3, a vector of twos the norm 2 sqrt(size)
        size = getattr(parameters, name).shape[-1]
        assert parameters.norm().item() == pytest.approx(6.0 if name in "AK" else 2 * math.sqrt(size), rel=1e-14)


def test_sampled_curves_interpolate_and_follow_dtype():
    values = torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)
    curve = theory.SampledCurve(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64), values)
    t = torch.tensor([0.0, 0.125, 0.25, 0.625, 1.0], dtype=torch.float64)
    assert torch.allclose(curve(t)[:, 0], torch.tensor([0, 0.5, 1, 2.5, 4], dtype=torch.float64), atol=1e-15)
    assert curve(t.float()).dtype == torch.float32
    assert torch.allclose(derivative(curve, t[1:2])[0], torch.tensor([4.0], dtype=torch.float64))


def test_arrays_are_curves():
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)
    A = (1 + grid)[:, None, None] * torch.eye(2, dtype=torch.float64)
    K = (grid[:, None] + 2 * grid)[..., None, None] * torch.ones(2, 2, dtype=torch.float64)
    a = torch.zeros(9, 2, dtype=torch.float64)
    curves = theory.ParameterCurves(A, a, K, dim=2)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    s = torch.tensor([0.1, 0.35], dtype=torch.float64)
    assert torch.allclose(curves.A(t)[:, 0, 0], 1 + t)
    assert torch.allclose(curves.K(t, s)[:, 0, 1], t + 2 * s)  # bilinear data away from the diagonal: exact
    assert torch.equal(curves.K(s, t), curves.K(t, s))  # symmetric extension, eq. (8)
    same = theory.ParameterCurves(A.numpy(), a.float().numpy(), K.numpy(), dim=2)
    assert torch.equal(same.A(t), curves.A(t))
    assert torch.equal(same.K(t, s), curves.K(t, s))


def test_a_curve_that_is_not_finite_is_named_by_the_solvers():
    """A pole between the points that are probed at construction: found, and named, at whatever grid meets it."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    fine = {
        "A": lambda t: t[..., None, None] * ones,
        "a": lambda t: t[..., None],
        "K": lambda t, s: (t - s)[..., None, None] * ones,
        "b": lambda t, s: (t * s)[..., None],
        "vartheta": lambda t: t[..., None],
    }
    phi = lambda y, v: torch.tanh(y if v is None else y + v)  # noqa: E731
    for name, curve in fine.items():

        def pole(*points, curve=curve):
            gap = (points[-1] - 0.3125).reshape(*points[-1].shape, *[1] * (curve(*points).ndim - points[-1].ndim))
            return curve(*points) / gap.abs()

        curves = theory.ParameterCurves(**{**fine, name: pole}, dim=1)
        x = torch.ones(1, dtype=torch.float64)
        for scheme in ("euler", "trapezoid", "trapezoid_implicit"):
            with pytest.raises(ValueError, match=f"the curve {name} must be finite"):
                theory.forward(curves, x, phi, layers=16, scheme=scheme)
        with pytest.raises(ValueError, match=f"the curve {name} must be finite"):
            theory.sample_pointwise(curves, 16)
        assert torch.isfinite(theory.forward(curves, x, phi, layers=10).states).all()


def test_lipschitz_constants_of_known_curves():
    def K(t, s):
        return (3 * t - 5 * s)[..., None, None] * torch.ones(1, 1, dtype=t.dtype)

    curves = theory.ParameterCurves(
        lambda t: torch.sin(2 * t)[..., None, None],
        lambda t: 7 * t[..., None],
        K,
        vartheta=lambda t: t[..., None],
        dim=1,
    )
    slopes, norms = curves.lipschitz_constants(), curves.sup_norms()
    assert slopes["A"] == pytest.approx(2, rel=1e-12)
    assert (slopes["a"], slopes["K"], slopes["vartheta"]) == pytest.approx((7, 5, 1), rel=1e-12)
    assert norms["K"] == pytest.approx(3, rel=1e-12)
    assert norms["a"] == pytest.approx(7)
    assert curves.norm() == pytest.approx(7)
    t = torch.tensor([0.5], dtype=torch.float64)
    in_t, in_s = kernel_derivatives(curves.K, t, t / 2)
    assert (in_t.item(), in_s.item()) == pytest.approx((3, -5))


def test_random_curves_depend_on_their_seed_only():
    torch.manual_seed(0)
    first = theory.ParameterCurves.random_smooth(3, 5)
    torch.manual_seed(1)
    again, other = theory.ParameterCurves.random_smooth(3, 5), theory.ParameterCurves.random_smooth(3, 6)
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    assert torch.equal(first.A(t), again.A(t))
    assert not torch.allclose(first.A(t), other.A(t))


GRID = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: theory.SampledCurve(torch.tensor([0.0, 0.6, 0.5, 1.0]), torch.zeros(4)), ValueError, "increasing"),
        (lambda: theory.SampledCurve(torch.tensor([0.0, 0.5, 0.5, 1.0]), torch.zeros(4)), ValueError, "increasing"),
        (lambda: theory.SampledCurve(torch.tensor([0.1, 1.0]), torch.zeros(2)), ValueError, "from 0 to 1"),
        (lambda: theory.SampledCurve(GRID, torch.zeros(2, 2)), ValueError, "3 rows"),
        (lambda: theory.SampledCurve(GRID, torch.tensor([0, math.nan, 1])), ValueError, "finite"),
        (lambda: theory.SampledKernel(GRID, torch.zeros(3, 2, 2, 2)), ValueError, r"\[3, 3"),
        (lambda: theory.ParameterCurves(EYE, EYE, EYE, dim=2), ValueError, r"A must hold samples \[m, 2, 2\]"),
        (lambda: theory.ParameterCurves(3.0, 3.0, 3.0, dim=2), TypeError, "A must be"),
        (
            lambda: theory.ParameterCurves(
                lambda t: t[..., None, None], lambda t: t[..., None], lambda t, s: 1 / (t - t), dim=1
            ),
            ValueError,
            "K",
        ),
        (
            lambda: theory.ParameterCurves(
                lambda t: 1 / (t[..., None, None] - 0.5), lambda t: t[..., None], lambda t, s: t[..., None, None], dim=1
            ),
            ValueError,
            "A must be finite",
        ),
        (lambda: theory.ParameterCurves.random_smooth(0), ValueError, "dim must be >= 1"),
        (lambda: theory.DiscreteParameters.zeros(0, 1), ValueError, "layers must be >= 1"),
        (lambda: theory.sample_pointwise(theory.ParameterCurves.random_smooth(1), 0), ValueError, "layers"),
        (lambda: theory.sample_cell_average(theory.ParameterCurves.random_smooth(1), -3), ValueError, "layers"),
        (lambda: theory.sample_pointwise(theory.ParameterCurves.random_smooth(1), 2.0), TypeError, "layers"),
        (lambda: theory.pack(torch.zeros(2, 3)), ValueError, "square"),
        (lambda: theory.unpack(torch.zeros(4, 1), 2), ValueError, "3 rows for 2 layers"),
        (
            lambda: theory.DiscreteParameters(EYE[None], EYE, EYE[None], EYE[:1], EYE[:1, :0]),
            ValueError,
            r"a must have shape \[1, 2\]",
        ),
    ],
)
def test_bad_input_is_named(build, error, says):
    with pytest.raises(error, match=says):
        build()
