"""NonLocal2d: the non-local block for images, without the matrix of all pairs of pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._backend import check_backend
from .._checks import check_choice, fail, shape
from ..ops.nonlocal_attention.api import nonlocal_attention
from .running_statistics import normalised

OP = "NonLocal2d"
KERNELS = ("softmax", "gaussian", "dot")


class NonLocal2d(nn.Module):
    """z = x + BN(W_z y), y_i = (1 / Z_i) sum_j w(theta(x_i), phi(x_j)) g(x_j) over all pixels i, j.

    kernel     | w                                    | Z_i               | in Wang et al.
    "softmax"  | exp(scale theta(x_i).phi(x_j))       | sum_j w           | embedded Gaussian (scale=1.0)
    "gaussian" | exp(-|theta(x_i) - theta(x_j)|^2 / (2 exp(rho)^2)) | sum_j w | (none: a distance, and symmetric)
    "dot"      | theta(x_i).phi(x_j)                  | number of pixels  | dot product

    Args:
        channels: C of the images.
        inner_channels: of theta, phi and g together; default max(1, C // 2). A multiple of heads.
        kernel: see above.
        heads: the inner channels are split among them.
        norm: "batch" for BN behind W_z, or None.
        zero_init: gamma of BN (or W_z for norm=None) starts at zero: the block is the identity at first and can be put
            into a trained network.
        scale: of softmax; default (inner_channels / heads)^-1/2, and 1.0 as in the paper.
        backend: of nonlocal_attention.

    The state_dict has theta, phi (not for "gaussian"), g, out (1x1 convolutions with bias), norm, and rho [heads] for
    "gaussian". `forward` takes [B, C, H, W] in any memory format and returns the same shape.

    Raises:
        ValueError: an unknown kernel or norm, or sizes that do not fit.

    Source: Wang, Girshick, Gupta, He 2018, "Non-local neural networks", eqs. (1) to (6).
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int | None = None,
        kernel: str = "softmax",
        *,
        heads: int = 1,
        norm: str | None = "batch",
        zero_init: bool = True,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice(OP, "kernel", kernel, KERNELS)
        check_choice(OP, "norm", norm, ("batch", None))
        check_backend(OP, backend)
        inner = max(1, channels // 2) if inner_channels is None else inner_channels
        if heads < 1 or inner < 1 or inner % heads:
            fail(OP, "inner_channels", inner, f"a positive multiple of heads = {heads}")
        if scale is not None and kernel != "softmax":
            fail(OP, "scale", scale, f"None: kernel='{kernel}' has no scale")
        self.channels, self.kernel, self.heads, self.scale, self.backend = channels, kernel, heads, scale, backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.theta = nn.Conv2d(channels, inner, 1, **options)
        self.phi = None if kernel == "gaussian" else nn.Conv2d(channels, inner, 1, **options)
        self.g = nn.Conv2d(channels, inner, 1, **options)
        self.out = nn.Conv2d(inner, channels, 1, **options)
        self.norm = nn.BatchNorm2d(channels, **options) if norm == "batch" else None
        # At this bandwidth the exponent's q.k term has softmax's default scale.
        rho = torch.full((heads,), math.log(inner // heads) / 4, **options)
        self.rho = nn.Parameter(rho) if kernel == "gaussian" else None
        if zero_init:
            for parameter in (self.out if self.norm is None else self.norm).parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            fail(OP, "x", shape(x), f"[B, {self.channels}, H, W]")

        def positions(projected: Tensor) -> Tensor:  # [B, C, H, W] -> [B, h, D, N], a view
            return projected.flatten(2).unflatten(1, (self.heads, -1))

        query = positions(self.theta(x))
        key = query if self.phi is None else positions(self.phi(x))
        bandwidth = None if self.rho is None else torch.exp(self.rho)
        y = nonlocal_attention(query, key, positions(self.g(x)), kernel=self.kernel, scale=self.scale,
                               bandwidth=bandwidth, layout="channels_first", backend=self.backend)  # fmt: skip
        z = self.out(y.flatten(1, 2).unflatten(2, x.shape[2:]))
        return x + (z if self.norm is None else normalised(self.norm, z))

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel={self.kernel!r}, heads={self.heads}"
