"""The discrete Sobolev regularizer (5)-(6) and its continuous counterpart (12)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_exponent
from .curves import NAMES, ParameterCurves, derivative, kernel_derivatives
from .parameters import DiscreteParameters
from .quadrature import composite_rule, triangle_rule

ANCHORS = ("mean", "initial")


def power(u: Tensor, p: float, keep: int) -> Tensor:
    """|u|_F^p over all dimensions after the first `keep`, with the derivatives that it has at 0.

    For p > 2 it is twice differentiable there with value, gradient and Hessian 0. Of (|u|^2)^(p/2) the second
    derivative at 0 is inf * 0 for p < 4; so |u| below the square root of the smallest normal number counts as 0.
    """
    squares = u.flatten(keep).square().sum(-1) if u.ndim > keep else u.square()
    if p == 2:
        return squares
    present = squares > torch.finfo(squares.dtype).tiny
    powers = torch.where(present, squares, torch.ones_like(squares)) ** (p / 2)
    return torch.where(present, powers, torch.zeros_like(powers))


def one_index_terms(u: Tensor, *, p: float = 2, anchor: str = "mean") -> tuple[Tensor, Tensor]:
    """tau sum_l |u^l|^p and tau sum_{l <= L-2} |(u^{l+1} - u^l) / tau|^p for u [L, ...], eq. (6a) for p = 2.

    With anchor "initial" the first term is |u^0|^p (ours; the stripped text does not exclude it).
    """
    layers = u.shape[0]
    value = power(u, p, 1).sum() / layers if anchor == "mean" else power(u[:1], p, 1).sum()
    return value, power((u[1:] - u[:-1]) * layers, p, 1).sum() / layers


def two_index_terms(packed: Tensor, layers: int, p: float) -> tuple[Tensor, Tensor]:
    """The value sum and the two (equal) derivative sums together of eq. (6b), from the triangle alone.

    value = tau^2 (2 sum_{l>j} + sum_{l=j}) |U|^p;  derivatives = 2 tau^2 (sum |D_t U|^p + sum |D_s U|^p) with D_t over
    l >= j, l <= L-2 and D_s over l > j. No difference of the flipped square straddles the diagonal, so this equals the
    sum over the square at half the work.
    """
    device = packed.device
    i, j = torch.tril_indices(layers, layers, device=device)
    powers = power(packed, p, 1)
    value = (2 * powers.sum() - powers[i == j].sum()) / layers**2
    start = i * (i + 1) // 2 + j
    below = i < layers - 1  # (l + 1, j) lies l + 1 places further in the packed order
    in_t = (packed[start[below] + i[below] + 1] - packed[start[below]]) * layers
    inside = i > j  # (l, j + 1) is the next entry
    in_s = (packed[start[inside] + 1] - packed[start[inside]]) * layers
    return value, 2 * (power(in_t, p, 1).sum() + power(in_s, p, 1).sum()) / layers**2


def check_weights(weights: Mapping[str, float] | float | None) -> dict[str, float]:
    if weights is None or isinstance(weights, int | float):
        weights = dict.fromkeys(NAMES, 1.0 if weights is None else float(weights))
    unknown = set(weights) - set(NAMES)
    if unknown:
        raise ValueError(f"weights must name some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if any(not value >= 0 for value in weights.values()):
        raise ValueError(f"weights must be >= 0, got {dict(weights)}")
    return {name: float(weights.get(name, 0.0)) for name in NAMES}


def regularizer_terms(parameters: DiscreteParameters, p: float = 4, *, anchor: str = "mean") -> dict[str, Tensor]:
    """The value and derivative terms of eq. (6) by parameter: "A value", "A derivative", ..., "b derivative"."""
    p = check_exponent(p)
    check_choice("anchor", anchor, ANCHORS)
    terms = {}
    for name, u in parameters.items():
        if name in ("K", "b"):
            pair = two_index_terms(u, parameters.layers, p)
        else:
            pair = one_index_terms(u, anchor=anchor)
        terms[f"{name} value"], terms[f"{name} derivative"] = pair
    return terms


def regularizer(
    parameters: DiscreteParameters | torch.nn.Module,
    p: float = 4,
    weights: Mapping[str, float] | float | None = None,
    *,
    anchor: str = "mean",
) -> Tensor:
    """R_L = lambda_A R1(A) + lambda_a R1(a) + lambda_v R1(vartheta) + lambda_K R2(K) + lambda_b R2(b), with

    R1(u) = tau sum |u^l|^2 + tau sum |(u^{l+1} - u^l) / tau|^2,
    R2(U) = tau^2 sum |Uhat^{l,j}|^p + tau^2 sum |(Uhat^{l+1,j} - Uhat^{l,j}) / tau|^p + the same in j,

    Uhat the flip of U and |.| Euclidean (Frobenius).

    Args:
        parameters: Theta, or a `DNLBlock`, whose own parameters are read (see `block_parameters`).
        p: exponent of the two-index part; the paper's theory needs p > 2, p = 2 is allowed (the limit is then in L2
            only: sup norms may grow).
        weights: lambda by name, one number for all, or None for 1.
        anchor: "mean" as above, or "initial" for |u^0|^2 instead of the first sum of R1.

    Returns:
        A scalar, differentiable in the parameters.

    Source: DNL (5)-(6) (words in the paper; formula reconstructed, p a free constant).
    """
    if isinstance(parameters, torch.nn.Module):
        from .blocks import block_regularizer

        return block_regularizer(parameters, p, weights, anchor=anchor)
    if not isinstance(parameters, DiscreteParameters):
        raise TypeError(f"parameters must be DiscreteParameters or a DNLBlock, got {type(parameters).__name__}")
    terms, weights = regularizer_terms(parameters, p, anchor=anchor), check_weights(weights)
    return _total(terms, weights)


def _total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[key.split()[0]] * value for key, value in terms.items()]).sum()


def regularizer_continuous_terms(
    curves: ParameterCurves, p: float = 4, *, panels: int = 8, order: int = 8
) -> dict[str, Tensor]:
    """The terms of eq. (12), named as in `regularizer_terms`; derivatives by forward-mode differentiation."""
    p = check_exponent(p)
    check_count("panels", panels)
    t, w = composite_rule(panels, order)
    tt, ss, ww = triangle_rule(panels, order)
    terms = {}
    for name in NAMES:
        curve = getattr(curves, name)
        value = slope = t.new_zeros(())
        if curve is not None and name in ("K", "b"):
            # Over the square: twice the triangle for the value; d_t and d_s together twice their triangle integrals.
            in_t, in_s = kernel_derivatives(curve, tt, ss)
            value = 2 * (ww @ power(curve.evaluate(tt, ss), p, 1))
            slope = 2 * (ww @ (power(in_t, p, 1) + power(in_s, p, 1)))
        elif curve is not None:
            value, slope = w @ power(curve(t), 2, 1), w @ power(derivative(curve, t), 2, 1)
        terms[f"{name} value"], terms[f"{name} derivative"] = value, slope
    return terms


def regularizer_continuous(
    curves: ParameterCurves,
    p: float = 4,
    weights: Mapping[str, float] | float | None = None,
    *,
    panels: int = 8,
    order: int = 8,
) -> Tensor:
    """R = lambda_A ||A||_{H1}^2 + .. + lambda_K (||K||_p^p + ||d_t K||_p^p + ||d_s K||_p^p) + (the same for b).

    Args:
        curves: smooth, or extensions of L layers with panels = L (then exact up to the quadrature's degree).
        p, weights: as in `regularizer`.
        panels, order: composite Gauss rule; cells on the diagonal use the Duffy map, norms of K, b are over the square.

    Source: DNL (12) (reconstructed; weights as in (5)).
    """
    terms = regularizer_continuous_terms(curves, p, panels=panels, order=order)
    return _total(terms, check_weights(weights))
