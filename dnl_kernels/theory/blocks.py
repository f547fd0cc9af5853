"""DNLBlocks as samples of curves: made from Theta, carried to another depth by the extensions, and regularised.

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
from .extension import PiecewiseLinear, prolong, restrict
from .operators import LayerMap, LocalKernel, RBFKernel
from .parameters import DiscreteParameters, unpack
from .regularization import ANCHORS, check_weights, one_index_terms, power, two_index_terms

if TYPE_CHECKING:
    from dnl_kernels.nn import DNLBlock

WEIGHT = "affine.weight"
TWO_INDEX_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def refine(source: DNLBlock | DiscreteParameters) -> DNLBlock | DiscreteParameters:
    """The network of twice the depth whose parameters are the (bi)linear extensions of the given ones at l / (2 L).

    x'^{2j} - x^j = O(tau) where the parameters are samples of smooth curves. The step is halved: an explicit tau = 1/L
    becomes 1/(2 L); any other tau (1.0, the step absorbed) is kept and the weights are halved instead. The input's
    column is extended without halving if the block has no input skip.

    Args:
        source: Theta, or a DNLBlock with at least 2 layers and connectivity="dense"; it is not changed.

    Returns:
        The same kind of object with 2 L layers; for a block a new one, on the same device, in the same mode.

    Source: DNL Defs. 3-4, applied to a block's tensors (our construction).
    """
    if isinstance(source, DiscreteParameters):
        return prolong(source, 2 * source.layers)
    _check_block(source)
    return _rebuild(source, 2 * source.config.num_layers)


def coarsen(source: DNLBlock | DiscreteParameters) -> DNLBlock | DiscreteParameters:
    """Every second layer and state, the inverse of `refine`: coarsen(refine(block)) has the block's tensors exactly.

    Args:
        source: Theta, or a DNLBlock with connectivity="dense"; an even number of layers, at least 4 for a block.
    """
    layers = source.layers if isinstance(source, DiscreteParameters) else _check_block(source).num_layers
    if layers % 2:
        raise ValueError(f"source must have an even number of layers to be coarsened, got {layers}")
    if isinstance(source, DiscreteParameters):
        return restrict(source, layers // 2)
    if layers < 4:
        raise ValueError(f"source must have at least 4 layers to be coarsened, got {layers}")
    return _rebuild(source, layers // 2)


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


def _check_block(block: nn.Module, name: str = "source", minimum: int = 2) -> Any:
    config = getattr(block, "config", None)
    if config is None or not hasattr(config, "connectivity"):
        raise TypeError(f"{name} must be a DNLBlock or DiscreteParameters, got {type(block).__name__}")
    if not all(map(all, config.connectivity)):
        raise ValueError(f"{name} must have connectivity='dense': a masked pair has no value to extend")
    if config.num_layers < minimum:
        raise ValueError(f"{name} must have at least 2 layers: one layer reads no state but the input")
    return config


def _rebuild(block: DNLBlock, layers: int) -> DNLBlock:
    """A block of another depth with the tensors of `block` extended (refine) or subsampled (coarsen)."""
    from dnl_kernels.nn import DNLBlock

    config = block.config
    explicit = abs(config.tau * config.num_layers - 1) < 1e-12
    tau = 1 / layers if explicit else config.tau
    first: Any = block.layers[0]
    norm = first.norm if first.norm is not None else first.inner_norm
    weight = next(block.parameters())
    projection = next((p for p in (first.value, first.output, first.query) if p is not None), None)
    new = DNLBlock(
        config.in_channels,
        layers,
        config.growth_rate,
        affine=config.affine,
        kernel=config.kernel,
        norm=config.norm,
        preactivation=config.preactivation,
        activation=config.activation,
        bottleneck=config.bottleneck,
        heads=config.heads,
        head_dim=config.head_dim or None,
        tau=tau,
        input_skip=config.input_skip,
        residual=config.residual,
        backend=block.backend,
        projection_bias=projection is not None and projection.bias is not None,
        eps=config.eps,
        momentum=0.1 if norm is None else norm.momentum,
        track_running_stats=norm is None or norm.track_running_stats,
        device=weight.device,
        dtype=weight.dtype,
    )
    old = [dict(layer.state_dict()) for layer in block.layers]
    found: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    # S = tau * weight; S^{l,j} carries the quadrature weight 1/L, which changes with the depth.
    states = config.num_layers / layers * config.tau / tau
    column = states if config.input_skip else config.tau / tau
    for name in old[-1]:
        if name == WEIGHT or (config.preactivation and name in TWO_INDEX_NORM):
            factors = (column, states) if name == WEIGHT else (1.0, 1.0)
            for layer, value in zip(found, _carry(_Triangle(name, old, config), layers, *factors), strict=True):
                layer[name] = value
        else:
            values = torch.stack([layer[name] for layer in old])
            for layer, value in zip(found, _resample(values, layers), strict=True):
                layer[name] = value
    for module, tensors in zip(new.layers, found, strict=True):
        module.load_state_dict(tensors)
    return new.train(block.training)


def _resample(values: Tensor, layers: int) -> Tensor:
    """One-index values [L, ...] at the nodes l / layers: interpolated when refining, subsampled when coarsening."""
    if layers < values.shape[0]:
        return values[:: values.shape[0] // layers]
    if not values.is_floating_point():
        return values.repeat_interleave(layers // values.shape[0], 0)
    nodes = torch.arange(layers, dtype=torch.float64, device=values.device) / layers
    return PiecewiseLinear(values.double())(nodes).to(values.dtype)


class _Triangle:
    """A tensor over the channels that the layers read, cut into states.

    Attributes:
        base: 0 if the input's column belongs to the triangle, 1 if it has its own curve.
        packed: U^{l,j} for base <= j <= l < L, row by row, each with the state's channels on the original axis.
        column: [L, ...], the input's, or None for base 0.
    """

    def __init__(self, name: str, layers: list[dict[str, Tensor]], config: Any):
        self.axis, self.depth = int(name == WEIGHT), len(layers)
        inputs, growth = config.in_channels, config.growth_rate
        self.base = 0 if config.input_skip and inputs == growth else 1
        rows = []
        for index, layer in enumerate(layers[self.base :], self.base):
            count = index + 1 - self.base
            states = layer[name].narrow(self.axis, self.base * inputs, count * growth)
            rows.append(states.unflatten(self.axis, (count, growth)).movedim(self.axis, 0))
        columns = [layer[name].narrow(self.axis, 0, inputs) for layer in layers]
        self.packed = torch.cat(rows) if rows else columns[0].new_zeros(0)
        self.column = torch.stack(columns) if self.base else None


def _carry(source: _Triangle, layers: int, column_factor: float, factor: float) -> list[Tensor]:
    """The tensors of the layers of another depth: the bilinear extension of the flipped triangle at the new nodes."""
    base, axis = source.base, source.axis
    square = unpack(source.packed, source.depth - base)
    nodes = torch.arange(layers, dtype=torch.float64, device=square.device) * (source.depth / layers)
    nodes = nodes.clamp(base, source.depth - 1) - base
    low = nodes.long()
    if layers > source.depth:
        high, wide = (low + 1).clamp_max(square.shape[0] - 1), square.double()
        lam = (nodes - low).reshape(-1, *[1] * (square.ndim - 1))
        wide = (1 - lam) * wide[low] + lam * wide[high]
        wide = wide.transpose(0, 1)
        wide = ((1 - lam) * wide[low] + lam * wide[high]).transpose(0, 1)
        square = wide.to(square.dtype)
    else:
        square = square[low][:, low]
    columns = None if source.column is None else _resample(source.column, layers) * column_factor
    found = []
    for index in range(layers):
        states = square[index, base : index + 1] * factor
        parts = [states.movedim(0, axis).flatten(axis, axis + 1)] if len(states) else []
        found.append(torch.cat([*([] if columns is None else [columns[index]]), *parts], axis))
    return found


def block_regularizer(
    block: nn.Module, p: float = 4, weights: Mapping[str, float] | float | None = None, *, anchor: str = "mean"
) -> Tensor:
    """`regularizer` of a DNLBlock's own parameters, with gradient.

    A: the input skip, or the input's column where there is none. a: the layers' biases. K: L tau affine.weight. b: the
    per-pair gamma and beta of a preactivation. vartheta: the other parameters of a layer, together. An input's column
    outside the triangle (see the module) has no difference towards the states.
    """
    config = _check_block(block, "parameters", 1)
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
            K = _Triangle(name, [{name: layer[name] * (config.tau * depth)} for layer in layers], config)
            if not config.input_skip:
                forcing = torch.stack([layer[name][:, : config.in_channels] for layer in layers]) * config.tau
                total.append(lam["A"] * torch.stack(one_index_terms(forcing, anchor=anchor)).sum())
                K.column = None
            total.append(lam["K"] * _two_index_sum(K, p))
        elif config.preactivation and name in TWO_INDEX_NORM:
            total.append(lam["b"] * _two_index_sum(_Triangle(name, layers, config), p))
        else:
            group = {"skip.weight": "A", "skip.bias": "a", "affine.bias": "a"}.get(name, "vartheta")
            values = torch.stack([layer[name] for layer in layers])
            total.append(lam[group] * torch.stack(one_index_terms(values, anchor=anchor)).sum())
    return torch.stack(total).sum()


def _two_index_sum(source: _Triangle, p: float) -> Tensor:
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
