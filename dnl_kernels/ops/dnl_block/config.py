"""The static description of a block and the names of its tensors: what every backend of dnl_block agrees on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..dnl_layer.config import NonLocalParameters

AFFINES = {"conv3x3": (3, 3), "conv1x1": (1, 1), "linear": ()}  # the trailing dimensions of a weight, for images
NORMS = ("batch", None)


class BlockConfig(NamedTuple):
    """Static and hashable. Symbols: C0 = in_channels, L = num_layers, G = growth_rate, b = bottleneck, h = heads.

    State 0 is the input (C0 channels), state j >= 1 the output of layer j - 1 (G channels). In modules growth_rate
    may be a tuple, one number for each layer; an operator takes one for all.
    connectivity[l][j] (0 <= j <= l) says whether layer l reads state j; C(l) is the sum of the channels it reads. A
    layer that reads none has no affine_weight; it needs the input skip.
    training: norm="batch" uses the statistics of this batch, otherwise the given means and variances.
    spatial_dims: 2 for images [B, C, H, W]; 1 and 3 have no non-local N. "conv3x3" is then 3 or 3x3x3.
    """

    in_channels: int
    num_layers: int
    growth_rate: int
    connectivity: tuple[tuple[bool, ...], ...]
    affine: str = "conv3x3"
    kernel: str = "local"
    norm: str | None = "batch"
    preactivation: bool = True
    activation: str = "relu"
    bottleneck: int | None = None
    heads: int = 1
    head_dim: int = 0
    tau: float = 1.0
    input_skip: bool = False
    residual: bool = False
    eps: float = 1e-5
    training: bool = False
    spatial_dims: int = 2

    def growth(self, layer: int) -> int:
        """G of a layer."""
        return self.growth_rate if isinstance(self.growth_rate, int) else self.growth_rate[layer]

    def state_channels(self, j: int) -> int:
        return self.growth(j - 1) if j else self.in_channels

    def reads(self, layer: int) -> list[int]:
        """The states that a layer reads."""
        return [j for j, connected in enumerate(self.connectivity[layer]) if connected]

    def spans(self, layer: int) -> list[tuple[int, int]]:
        """The channels of the states buffer that a layer reads, as maximal ranges [start, end)."""
        spans: list[tuple[int, int]] = []
        end = 0
        for j, connected in enumerate(self.connectivity[layer]):
            start, end = end, end + self.state_channels(j)
            if connected:
                joins = spans and spans[-1][1] == start
                spans.append((spans.pop()[0] if joins else start, end))
        return spans

    def layer_channels(self, layer: int) -> int:
        """C(l), the channels that a layer reads."""
        return sum(self.state_channels(j) for j in self.reads(layer))

    def filter_size(self) -> tuple[int, ...]:
        """The trailing dimensions of a convolution's weight; none for a linear map."""
        return AFFINES[self.affine][:1] * self.spatial_dims

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that a layer of this configuration has, by its name in LayerParameters."""
        size, growth, channels = self.filter_size(), self.growth(layer), self.layer_channels(layer)
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(prefix: str, width: int) -> None:
            shapes.update({f"{prefix}_{name}": (width,) for name in ("weight", "bias", "mean", "var")})

        if channels:
            width = growth * (self.bottleneck or 1)
            shapes["affine_weight"] = (width, channels, *(size if self.bottleneck is None else (1,) * len(size)))
            shapes["affine_bias"] = (width,)
            if self.bottleneck is not None:
                shapes["inner_weight"] = (growth, width, *size)
                if self.norm is not None:
                    norm("inner_norm", width)
        if self.norm is not None and (channels or not self.preactivation):
            norm("norm", channels if self.preactivation else growth)
        if self.kernel != "local":
            width = self.heads * self.head_dim
            for name in ("query", "value") if self.kernel == "gaussian" else ("query", "key", "value"):
                shapes |= {f"{name}_weight": (width, growth), f"{name}_bias": (width,)}
            shapes |= {"output_weight": (growth, width), "output_bias": (growth,)}
            if self.kernel == "gaussian":
                shapes["rho"] = (self.heads,)
        if self.input_skip:
            shapes |= {"skip_weight": (growth, self.in_channels, *size), "skip_bias": (growth,)}
        return shapes

    def may_be_none(self, name: str) -> bool:
        """Whether a tensor that the configuration has may be left out: biases are zero then, norm_weight is one."""
        running = name.endswith(("norm_mean", "norm_var"))
        return self.training if running else name.endswith(("bias", "norm_weight"))


class LayerParameters(NamedTuple):
    """The tensors of one layer; what a configuration does not have is None. k is 3 or 1.

    affine_weight [A, C(l), k, k] ([A, C(l)] for "linear") with A = b * G under a bottleneck (k = 1), else G.
    affine_bias [A]. norm_* of the states read [C(l)] (preactivation) or of the layer's output [G].
    inner_norm_* [b * G] and inner_weight [G, b * G, 3, 3]: the second half of a bottleneck.
    query_weight, key_weight [h * D, G] (key None for "gaussian", which shares query's), value_weight [h * E, G],
    output_weight [G, h * E], and their optional biases. rho [h]: log of the Gaussian bandwidth.
    skip_weight [G, C0, k, k] or [G, C0], skip_bias [G]: A_l and a_l of the input skip.
    """

    affine_weight: Tensor | None = None
    affine_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_mean: Tensor | None = None
    norm_var: Tensor | None = None
    inner_norm_weight: Tensor | None = None
    inner_norm_bias: Tensor | None = None
    inner_norm_mean: Tensor | None = None
    inner_norm_var: Tensor | None = None
    inner_weight: Tensor | None = None
    query_weight: Tensor | None = None
    query_bias: Tensor | None = None
    key_weight: Tensor | None = None
    key_bias: Tensor | None = None
    value_weight: Tensor | None = None
    value_bias: Tensor | None = None
    output_weight: Tensor | None = None
    output_bias: Tensor | None = None
    rho: Tensor | None = None
    skip_weight: Tensor | None = None
    skip_bias: Tensor | None = None

    def theta(self) -> NonLocalParameters:
        """The parameters of N."""
        return NonLocalParameters(*(getattr(self, name) for name in NonLocalParameters._fields))


class Statistics(NamedTuple):
    """Batch means and biased variances of a training step, float32 at least; empty where there is no such norm.

    states_* [C0 + (L - 1) * G] (or longer): of every channel of the states buffer, shared by all its consumers
    (preactivation); unspecified for a channel that no layer reads. inner_*: L tensors [b * G], of each layer's
    bottleneck. output_*: L tensors [G], of N(y_l) in the post-activation order. elements: how many each mean is over.
    """

    states_mean: Tensor | None
    states_var: Tensor | None
    inner_mean: list[Tensor]
    inner_var: list[Tensor]
    output_mean: list[Tensor]
    output_var: list[Tensor]
    elements: int
