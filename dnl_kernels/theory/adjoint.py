"""The discrete adjoint of eq. (1): gradients of a loss of x^L without a graph over the depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_choice, check_shape
from .grids import working_dtype
from .parameters import DiscreteParameters, triangle_size
from .solvers import LayerFunction, Trajectory, flatten_batch, forward


@dataclass(frozen=True)
class AdjointResult:
    """Gradients of J, summed over the batch.

    Attributes:
        gradient: dJ/dTheta, shaped like Theta.
        preactivation: q^l = dJ/dy^l [L, ..., d]; q^{L-1} = O(1) and the others O(tau), because x(1) is a point value.
        state: p^j = dJ/dx^j [L + 1, ..., d]; p^0 counts x^0's role as a state only.
    """

    gradient: DiscreteParameters
    preactivation: Tensor
    state: Tensor


def adjoint(
    parameters: DiscreteParameters,
    x: Tensor,
    phi: LayerFunction,
    loss_gradient: Tensor,
    trajectory: Trajectory | None = None,
    *,
    first: str | None = None,
) -> AdjointResult:
    """q^l = (D phi_l(y^l))^T p^{l+1},  p^L = dJ/dx^L,  p^j = tau sum_{l >= j} (K^{l,j})^T q^l, and

    dJ/dA^l = q^l x^T, dJ/da^l = q^l, dJ/dK^{l,j} = tau q^l (x^j)^T, dJ/db^{l,j} = tau q^l,
    dJ/dvartheta^l = (D_v phi_l)^T p^{l+1}. With first="lifted", x^0 = phi_0(A^0 x + a^0) adds to those of layer 0

    q^ = (D phi_0(A^0 x + a^0))^T p^0:  q^ x^T, q^ and (D_v phi_0)^T p^0.

    Args:
        parameters: Theta.
        x: inputs [..., d].
        phi: the layer map; only its own derivative is taken by autograd, layer by layer.
        loss_gradient: dJ/dx^L [..., d].
        trajectory: the states of `forward(parameters, x, phi)`, with either first state, or None to compute them.
        first: "input" or "lifted", see `forward`; by default the trajectory's, else "input".

    Returns:
        An AdjointResult; memory O(L) states, no graph over the depth. Half precision is computed in float32.

    Raises:
        ValueError: wrong shapes, or a trajectory that is not eq. (1)'s for these parameters, x, phi and first.

    Source: section 9 of the specification (derived).
    """
    check_shape("loss_gradient", loss_gradient, tuple(x.shape))
    if first is None:
        first = "input" if trajectory is None else trajectory.first
    check_choice("first", first, ("input", "lifted"))
    work = working_dtype(x.dtype)
    values = parameters.map(lambda value: value.detach().to(work))
    layers, dim, tau = parameters.layers, parameters.dim, parameters.tau
    flat = flatten_batch(x.detach(), dim).to(work)
    if trajectory is None:
        with torch.no_grad():
            trajectory = forward(values, flat.reshape(x.shape), phi, first=first)
    check_shape("trajectory.states", trajectory.states, (layers + 1, *x.shape))
    states = trajectory.states.detach().reshape(layers + 1, *flat.shape).to(work)
    slack = 100 * torch.finfo(trajectory.states.dtype).eps

    def check_state(index: int, expected: Tensor) -> None:
        gap = (states[index] - expected).abs().max() if expected.numel() else expected.new_zeros(())
        if not bool(gap <= slack * (1 + expected.abs().max() if expected.numel() else 1)):
            raise ValueError(
                f"trajectory must hold the states of eq. (1) for these parameters, x, phi and first={first!r}: state "
                f"{index} differs by {gap.item():.1e}"
            )

    def pull_back(y: Tensor, layer: int, weights: Tensor, index: int) -> Tensor:
        """(D phi_l(y))^T weights, having added the derivative in vartheta^l; phi_l(y) must be the state `index`."""
        y, v = y.requires_grad_(), values.vartheta[layer].clone().requires_grad_()
        with torch.enable_grad():
            out = phi(y, v if v.numel() else None)
            dy, dv = torch.autograd.grad(out, (y, v), weights, allow_unused=True)
        check_state(index, out.detach())
        if dv is not None:
            dvartheta[layer] += dv
        return torch.zeros_like(y) if dy is None else dy

    p = torch.zeros_like(states)
    p[layers] = flatten_batch(loss_gradient.detach(), dim)
    q = torch.zeros_like(states[:layers])
    dK, db = torch.zeros_like(values.K), torch.zeros_like(values.b)
    dvartheta = torch.zeros_like(values.vartheta)
    if first == "input":
        check_state(0, flat)
    for layer in reversed(range(layers)):
        row, past = values.row("K", layer), states[: layer + 1]
        memory = torch.einsum("jab,jnb->na", row, past) + values.row("b", layer).sum(0)
        q[layer] = pull_back(flat @ values.A[layer].T + values.a[layer] + tau * memory, layer, p[layer + 1], layer + 1)
        p[: layer + 1] += tau * torch.einsum("jab,na->jnb", row, q[layer])
        entries = slice(triangle_size(layer), triangle_size(layer + 1))
        dK[entries] = tau * torch.einsum("na,jnb->jab", q[layer], past)
        db[entries] = tau * q[layer].sum(0)
    dA, da = torch.einsum("lna,nb->lab", q, flat), q.sum(1)
    if first == "lifted":
        start = pull_back(flat @ values.A[0].T + values.a[0], 0, p[0], 0)
        dA[0] += start.T @ flat
        da[0] += start.sum(0)
    gradient = DiscreteParameters(dA, da, dK, db, dvartheta)
    shapes = ((q, layers), (p, layers + 1))
    preactivation, state = (z.reshape(count, *x.shape).to(x.dtype) for z, count in shapes)
    return AdjointResult(gradient.map(lambda value: value.to(parameters.A.dtype)), preactivation, state)
