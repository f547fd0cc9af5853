"""The discrete adjoint of eq. (1): gradients of a loss of x^L without a graph over the depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_shape
from .parameters import DiscreteParameters, triangle_size
from .solvers import LayerFunction, Trajectory, forward


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
) -> AdjointResult:
    """q^l = (D phi_l(y^l))^T p^{l+1},  p^L = dJ/dx^L,  p^j = tau sum_{l >= j} (K^{l,j})^T q^l, and

    dJ/dA^l = q^l x^T, dJ/da^l = q^l, dJ/dK^{l,j} = tau q^l (x^j)^T, dJ/db^{l,j} = tau q^l,
    dJ/dvartheta^l = (D_v phi_l)^T p^{l+1}.

    Args:
        parameters: Theta.
        x: inputs [..., d], the first state (first="input").
        phi: the layer map; only its own derivative is taken by autograd, layer by layer.
        loss_gradient: dJ/dx^L [..., d].
        trajectory: the states of `forward(parameters, x, phi)`, or None to compute them.

    Returns:
        An AdjointResult; memory O(L) states, no graph over the depth.

    Source: section 9 of the specification (derived).
    """
    check_shape("loss_gradient", loss_gradient, tuple(x.shape))
    with torch.no_grad():
        trajectory = forward(parameters, x, phi) if trajectory is None else trajectory
    layers, dim, tau = parameters.layers, parameters.dim, parameters.tau
    flat = x.detach().reshape(-1, dim)
    states = trajectory.states.detach().reshape(layers + 1, -1, dim)
    p = torch.zeros_like(states)
    p[layers] = loss_gradient.detach().reshape(-1, dim)
    q = torch.zeros_like(states[:layers])
    dK, db = torch.zeros_like(parameters.K), torch.zeros_like(parameters.b)
    dvartheta = torch.zeros_like(parameters.vartheta)
    values = parameters.map(torch.Tensor.detach)
    for layer in reversed(range(layers)):
        row, past = values.row("K", layer), states[: layer + 1]
        memory = torch.einsum("jab,jnb->na", row, past) + values.row("b", layer).sum(0)
        y = (flat @ values.A[layer].T + values.a[layer] + tau * memory).requires_grad_()
        v = values.vartheta[layer].clone().requires_grad_()
        with torch.enable_grad():
            out = phi(y, v if v.numel() else None)
            dy, dv = torch.autograd.grad(out, (y, v), p[layer + 1], allow_unused=True)
        q[layer] = dy
        if dv is not None:
            dvartheta[layer] = dv
        p[: layer + 1] += tau * torch.einsum("jab,na->jnb", row, dy)
        entries = slice(triangle_size(layer), triangle_size(layer + 1))
        dK[entries] = tau * torch.einsum("na,jnb->jab", dy, past)
        db[entries] = tau * dy.sum(0)
    dA = torch.einsum("lna,nb->lab", q, flat)
    gradient = DiscreteParameters(dA, q.sum(1), dK, db, dvartheta)
    return AdjointResult(gradient, q.reshape(layers, *x.shape), p.reshape(layers + 1, *x.shape))
