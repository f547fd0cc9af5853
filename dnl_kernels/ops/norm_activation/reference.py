"""z = act(gamma * (x - mean) / sqrt(var + eps) + beta), and the means of its 2 x 2 pixels if pooled."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate


def norm_activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, activation: str,
    pool: bool, eps: float,
) -> Tensor:  # fmt: skip
    """mean and var are None: those of x. An odd side is pooled to half of it rounded up, over the pixels there are."""
    z = activate(F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=eps), activation)
    return F.avg_pool2d(z, 2, ceil_mode=True) if pool else z
