"""z = act(gamma * (x - mean) / sqrt(var + eps) + beta), or the means of its 2 x 2 pixels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate


def norm_activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, activation: str,
    pool: str | None, eps: float,
) -> Tensor:  # fmt: skip
    """mean and var are None: those of x. pool: None, or how half of an odd side is rounded, "ceil" (the last means are
    those of the pixels that there are) or "floor"."""
    z = activate(F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=eps), activation)
    return F.avg_pool2d(z, 2, ceil_mode=pool == "ceil") if pool else z
