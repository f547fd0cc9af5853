"""y = W mean_2x2(act(gamma * (x - mean) / sqrt(var + eps) + beta)) + b; maxima of 3 x 3 such numbers, 2 apart, and
their means over all pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..norm_activation.reference import norm_activation


def transition(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Sequence[Tensor | None], activation: str, pool: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """norm: gamma, beta, mean, var; pool=True: half of an odd side is rounded down."""
    gamma, beta, mean, var = norm
    return F.conv2d(
        norm_activation(x, gamma, beta, mean, var, activation, "floor" if pool else None, eps), weight, bias
    )


def norm_activation_max_pool(x: Tensor, norm: Sequence[Tensor | None], activation: str, eps: float) -> Tensor:
    gamma, beta, mean, var = norm
    return F.max_pool2d(norm_activation(x, gamma, beta, mean, var, activation, None, eps), 3, 2, 1)


def norm_activation_mean(x: Tensor, norm: Sequence[Tensor | None], activation: str, eps: float) -> Tensor:
    gamma, beta, mean, var = norm
    return norm_activation(x, gamma, beta, mean, var, activation, None, eps).flatten(2).mean(2)
