"""DNLBlocks as samples of curves: made from Theta, and regularised. (Carried to another depth: `cascade`.)

A block's layer l reads the input (state 0) and states j = 1 .. l with weights S^{l,j} = tau * affine.weight, the step
absorbed. How its tensors are curves:

- S^{l,j}, j >= 1, is (1/L) K(t_l, s_j): two-index. So are a preactivation's per-consumer gamma, beta and statistics.
- S^{l,0}, the input's column: with an input skip it is (1/L) K(t_l, 0), as in eq. (1), and part of the same triangle if
  the input is as wide as the states. Without a skip it is the only way in for the input, hence the forcing A(t_l):
  O(1), not divided by L.
- everything else (skip, projections, bandwidth, biases, inner convolutions, norms of the layer's output): one-index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_exponent
from .operators import LayerMap, LocalKernel, RBFKernel
from .parameters import DiscreteParameters
from .regularization import ANCHORS, check_weights, one_index_terms, power, two_index_terms

if TYPE_CHECKING:
    from dnl_kernels.nn import DNLBlock

WEIGHT = "affine.weight"
TWO_INDEX_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def as_block(parameters: DiscreteParameters, phi: LayerMap, *, backend: str | None = None) -> DNLBlock:
    """The DNLBlock that computes eq. (1): Theta acts on the d channels of every position alike.

    On x [B, N, d] its states are those of `forward` with Theta's matrices repeated for all positions, I_N (x) Theta,
    through `dnl_kernels.dnl_block`. The row-normalised kernels become the block's projections: exp(y_i^T M y_j) by
    W_q = sqrt(d) M^T and W_k = I, RBF by rho = log h, the value by W_v.

    Args:
        parameters: Theta of one position, d its channels.
        phi: the layer map; its `positions` may be any (vartheta does not depend on them).
        backend: of the block.

    Raises:
        ValueError: a normalisation other than "row", or an activation that blocks do not have.

    Source: DNL (1) (reconstructed).
    """
    from dnl_kernels.nn import DNLBlock

    if not isinstance(phi, LayerMap):
        raise TypeError(f"phi must be a LayerMap, got {type(phi).__name__}: a block needs to know its kernel")
    d, operator = parameters.dim, phi.operator
    local = operator is None or isinstance(operator.kernel, LocalKernel)
    if operator is not None and operator.normalization != "row":
        raise ValueError(f"phi must have normalization 'row', got {operator.normalization!r}")
    rbf = operator is not None and isinstance(operator.kernel, RBFKernel)
    A = parameters.A
    block = DNLBlock(
        d,
        parameters.layers,
        d,
        affine="linear",
        kernel="local" if local else "gaussian" if rbf else "softmax",
        norm=None,
        preactivation=False,
        activation=phi.activation,
        tau="1/L",
        input_skip=True,
        backend=backend,
        device=A.device,
        dtype=A.dtype,
    )
    eye = torch.eye(d, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        for index, layer in enumerate(block.layers):
            shape = value = None
            if operator is not None:
                shape, value = operator.unpack(parameters.vartheta[index], d * operator.positions, A)
            value = eye if value is None else value
            modules: Any = layer
            row = torch.cat(list(parameters.row("K", index)), 1)
            forcing, bias = A[index], parameters.a[index] + parameters.tau * parameters.row("b", index).sum(0)
            if local:  # N is the identity for a block: the value goes into what is summed
                row, forcing, bias = value @ row, value @ forcing, value @ bias
            else:
                modules.value.weight.copy_(value)
                modules.output.weight.copy_(eye)
                if rbf:
                    modules.query.weight.copy_(eye)
                    modules.rho.copy_(torch.log(eye.new_ones(()) if shape is None else shape))
                else:
                    modules.query.weight.copy_(math.sqrt(d) * (eye if shape is None else shape.T))
                    modules.key.weight.copy_(eye)
            modules.affine.weight.copy_(row)
            modules.skip.weight.copy_(forcing)
            modules.skip.bias.copy_(bias)
    return block


def check_block(block: nn.Module, name: str = "source", minimum: int = 2) -> Any:
    config = getattr(block, "config", None)
    if config is None or not hasattr(config, "connectivity"):
        raise TypeError(f"{name} must be a DNLBlock, a DNLNet or DiscreteParameters, got {type(block).__name__}")
    if not isinstance(config.growth_rate, int):
        raise ValueError(f"{name} must have one growth rate for all layers, got {config.growth_rate}")
    if not all(map(all, config.connectivity)):
        raise ValueError(f"{name} must have connectivity='dense': a masked pair has no value to extend")
    if config.num_layers < minimum:
        raise ValueError(f"{name} must have at least 2 layers: one layer reads no state but the input")
    return config


class Triangle:
    """A tensor over the channels that the layers read, cut into states.

    Attributes:
        base: 0 if the input's column belongs to the triangle, 1 if it has its own curve.
        packed: U^{l,j} for base <= j <= l < L, row by row, each with the state's channels on the original axis.
        column: [L, ...], the input's, or None for base 0.
    """

    def __init__(self, name: str, layers: list[dict[str, Tensor]], config: Any, *, own_column: bool = False):
        self.axis, self.depth = int(name == WEIGHT), len(layers)
        inputs, growth = config.in_channels, config.growth_rate
        self.base = 0 if config.input_skip and inputs == growth and not own_column else 1
        rows = []
        for index, layer in enumerate(layers[self.base :], self.base):
            count = index + 1 - self.base
            states = layer[name].narrow(self.axis, self.base * inputs, count * growth)
            rows.append(states.unflatten(self.axis, (count, growth)).movedim(self.axis, 0))
        columns = [layer[name].narrow(self.axis, 0, inputs) for layer in layers]
        self.packed = torch.cat(rows) if rows else columns[0].new_zeros(0)
        self.column = torch.stack(columns) if self.base else None


def block_regularizer(
    block: nn.Module, p: float = 4, weights: Mapping[str, float] | float | None = None, *, anchor: str = "mean"
) -> Tensor:
    """`regularizer` of a DNLBlock's own parameters, with gradient.

    A: the input skip, or the input's column where there is none. a: the layers' biases. K: L tau affine.weight. b: the
    per-pair gamma and beta of a preactivation. vartheta: the other parameters of a layer, together. An input's column
    outside the triangle (see the module) has no difference towards the states.
    """
    config = check_block(block, "parameters", 1)
    p = check_exponent(p)
    check_choice("anchor", anchor, ANCHORS)
    lam = check_weights(weights)
    modules: Any = block.layers
    layers = [dict(layer.named_parameters()) for layer in modules]
    depth = config.num_layers
    total: list[Tensor] = []
    for name in sorted(layers[-1]):
        if name == WEIGHT:
            # L S for what carries the quadrature weight 1/L, S itself for a forcing.
            K = Triangle(name, [{name: layer[name] * (config.tau * depth)} for layer in layers], config)
            if not config.input_skip:
                forcing = torch.stack([layer[name][:, : config.in_channels] for layer in layers]) * config.tau
                total.append(lam["A"] * torch.stack(one_index_terms(forcing, anchor=anchor)).sum())
                K.column = None
            total.append(lam["K"] * _two_index_sum(K, p))
        elif config.preactivation and name in TWO_INDEX_NORM:
            total.append(lam["b"] * _two_index_sum(Triangle(name, layers, config), p))
        else:
            group = {"skip.weight": "A", "skip.bias": "a", "affine.bias": "a"}.get(name, "vartheta")
            values = torch.stack([layer[name] for layer in layers])
            total.append(lam[group] * torch.stack(one_index_terms(values, anchor=anchor)).sum())
    return torch.stack(total).sum()


def _two_index_sum(source: Triangle, p: float) -> Tensor:
    """R2 with tau = 1/L of the triangle, and of the input's column j = 0 where it has its own."""
    layers, size = source.depth, source.depth - source.base
    total = source.packed.new_zeros(())
    if size:
        value, slope = two_index_terms(source.packed, size, p)
        ratio = layers / size  # two_index_terms scales by its own size: value by tau^2, slopes by tau^(2 - p)
        total = value / ratio**2 + slope * ratio ** (p - 2)
    if source.column is None:
        return total
    powers = power(source.column, p, 1)
    rises = power((source.column[1:] - source.column[:-1]) * layers, p, 1).sum()
    return total + (2 * powers.sum() - powers[0] + 2 * rises) / layers**2
