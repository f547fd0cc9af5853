"""The parameters of the non-local operator N, and the static options of a layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NonLocalParameters(NamedTuple):
    """theta of N(y; theta). Symbols: G channels of y, h heads, D query and key width, E value width.

    query_weight, key_weight [h * D, G] (key None for "gaussian": one shared matrix makes the kernel symmetric),
    value_weight [h * E, G], output_weight [G', h * E], and optional biases. rho [h]: log of the Gaussian bandwidth.
    """

    query_weight: Tensor | None = None
    query_bias: Tensor | None = None
    key_weight: Tensor | None = None
    key_bias: Tensor | None = None
    value_weight: Tensor | None = None
    value_bias: Tensor | None = None
    output_weight: Tensor | None = None
    output_bias: Tensor | None = None
    rho: Tensor | None = None


class LayerConfig(NamedTuple):
    """Static and hashable: what `dnl_layer` is given besides tensors."""

    kernel: str = "local"
    activation: str = "identity"
    tau: float = 1.0
    input_activation: str = "identity"
    heads: int = 1
    residual: bool = False
