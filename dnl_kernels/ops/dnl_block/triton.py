"""dnl_block as one autograd node in Triton, for blocks with a local kernel: the kernels of _triton_conv.py on the
states buffer. A layer reads the prefix in place and writes its slot, with the batch statistics of the new channels in
the epilogue; nothing is concatenated, no launch waits for the host. In the paper's order it writes to a second buffer,
from which the slot is normalised and activated: the normalisation has one reader there, and nothing is deferred.

Backward, the gradient of the buffer is kept in float32 and every layer adds to it. What the batch statistics contribute
to a channel's gradient is linear in the channel: its coefficients are summed over all layers that read the channel, and
applied once, when the gradient is used (deferred batch-norm backward).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton_conv import Images, Operand, Problem, accumulate, operand, pull, weight_gradient
from ..dnl_layer.pointwise import activate_normalised, pull_normalised
from .statistics import fold, gather


class _Layer(NamedTuple):
    """What a layer reads (ranges of channels), where it writes, and its part of the packed vectors."""

    spans: list[tuple[int, int]]
    slot: slice
    channels: slice  # of gamma and beta, under pre-activation
    outputs: slice  # of the bias; of gamma, beta and the second buffer in the paper's order
    filters: slice  # of the weight


def _plan(in_channels: int, connectivity: list[int], growth: int, size: int) -> list[_Layer]:
    plan: list[_Layer] = []
    row = norms = filters = 0
    while row < len(connectivity):
        layer = len(plan)
        spans: list[tuple[int, int]] = []
        for j in range(layer + 1):
            if connectivity[row + j]:
                start = in_channels + (j - 1) * growth if j else 0
                end = in_channels + j * growth
                spans.append((spans.pop()[0] if spans and spans[-1][1] == start else start, end))
        channels = sum(end - start for start, end in spans)
        count = growth * channels * size * size
        start = in_channels + layer * growth
        plan.append(
            _Layer(
                spans,
                slice(start, start + growth),
                slice(norms, norms + channels),
                slice(layer * growth, (layer + 1) * growth),
                slice(filters, filters + count),
            )
        )
        row, norms, filters = row + layer + 1, norms + channels, filters + count
    return plan


class _Block(NamedTuple):
    """The tensors of a call, forward and backward."""

    states: Tensor
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    growth: int
    size: int
    preactivation: bool
    training: bool
    activation: str
    tau: float
    eps: float

    def statistics(self, layer: _Layer) -> tuple[Tensor, Tensor]:
        """Mean and variance of the channels that a layer reads: shared ones of this batch, or its own, given ones."""
        assert self.mean is not None and self.var is not None
        if self.training:
            return gather(self.mean, layer.spans), gather(self.var, layer.spans)
        return self.mean[layer.channels], self.var[layer.channels]

    def problem(self, layer: _Layer) -> Problem:
        images, _, height, width = self.states.shape
        weight = self.weight[layer.filters].view(self.growth, -1, self.size, self.size).to(self.states.dtype)
        at = Images(images, height, width)
        if not self.preactivation:
            return Problem(at, weight, None, None, "identity", self.tau, False)
        scale = shift = None
        if self.mean is not None:
            gamma, beta = (None if t is None else t[layer.channels] for t in (self.gamma, self.beta))
            scale, shift = fold(*self.statistics(layer), gamma, beta, self.eps)
        return Problem(at, weight, scale, shift, self.activation, self.tau, False)

    def output_norm(self, layer: _Layer) -> tuple[Tensor | None, Tensor | None]:
        """The paper's order: scale and shift of what the layer made."""
        if self.mean is None or self.var is None:
            return None, None
        gamma, beta = (None if t is None else t[layer.outputs] for t in (self.gamma, self.beta))
        return fold(self.mean[layer.outputs], self.var[layer.outputs], gamma, beta, self.eps)


def _operand(buffer: Tensor, spans: list[tuple[int, int]]) -> Operand:
    return operand([buffer[:, start:end] for start, end in spans], False)


def dnl_block_fwd(
    x0, weight, bias, gamma, beta, mean, var, connectivity, growth_rate, size, preactivation, norm, training,
    activation, tau, eps,
):  # fmt: skip
    images, in_channels, height, width = x0.shape
    plan = _plan(in_channels, connectivity, growth_rate, size)
    grown = len(plan) * growth_rate
    states = x0.new_empty((images, in_channels + grown, height, width))
    states[:, :in_channels] = x0
    outputs = x0.new_empty((images, 0 if preactivation else grown, height, width))
    measures = norm and training
    measured = weight.new_zeros((2, in_channels * preactivation + grown if measures else 0))
    if states.numel():
        if measures:
            mean, var = measured
            if preactivation:
                var[:in_channels], mean[:in_channels] = torch.var_mean(x0.to(weight.dtype), (0, 2, 3), correction=0)
        with torch.cuda.device_of(x0):
            block = _Block(
                states, weight, gamma, beta, mean, var, growth_rate, size, preactivation, training, activation, tau, eps
            )
            for layer in plan:
                to, at = (states, layer.slot) if preactivation else (outputs, layer.outputs)
                own = None if bias is None else bias[layer.outputs]
                problem, read = block.problem(layer), _operand(states, layer.spans)
                moments = accumulate(problem, read, own, to[:, at], to.stride(0), measures)
                if moments is not None:
                    mean[at], var[at] = moments
                if not preactivation:
                    scale, shift = block.output_norm(layer)
                    states[:, layer.slot] = activate_normalised(outputs[:, at], scale, shift, activation, 1)
    return states, measured[0].clone(), measured[1].clone(), outputs


def dnl_block_bwd(
    dstates, states, outputs, weight, bias, gamma, beta, mean, var, connectivity, growth_rate, size, preactivation,
    norm, training, activation, tau, eps,
):  # fmt: skip
    total = states.shape[1]
    in_channels = total - growth_rate * _layers(connectivity)
    plan = _plan(in_channels, connectivity, growth_rate, size)
    dx = dstates.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)  # of the buffer, added to
    dweight = torch.zeros_like(weight)
    dbias = weight.new_zeros(0 if bias is None else growth_rate * len(plan))
    norms = (plan[-1].channels if preactivation else plan[-1].outputs).stop if norm else 0
    dgamma, dbeta = weight.new_zeros((2, norms))
    deferred = norm and training and preactivation
    if states.numel():
        block = _Block(
            states, weight, gamma, beta, mean, var, growth_rate, size, preactivation, training, activation, tau, eps
        )
        dmean, dvar = weight.new_zeros((2, total))
        with torch.cuda.device_of(states):
            for layer in reversed(plan):
                gradient = dx[:, layer.slot]
                if deferred:
                    gradient = _settled(dx, states, layer.slot, mean, dmean, dvar)
                elif not preactivation:
                    gradient = _output_backward(block, layer, gradient, outputs[:, layer.outputs], dgamma, dbeta)
                if bias is not None:
                    dbias[layer.outputs] = gradient.sum((0, 2, 3))
                problem, read = block.problem(layer), _operand(states, layer.spans)
                dy = operand([gradient.to(states.dtype)], False)
                dweight[layer.filters] = weight_gradient(problem, dy, read).flatten()
                sums = pull(problem, dy, read, _operand(dx, layer.spans), norm and preactivation, add=True)
                if sums is not None:
                    _statistics_backward(block, layer, sums, dgamma, dbeta, dmean, dvar)
            first = slice(0, in_channels)
            dx0 = _settled(dx, states, first, mean, dmean, dvar) if deferred else dx[:, first]
    else:
        dx0 = dx[:, :in_channels]
    return dx0.to(states.dtype, copy=True).contiguous(), dweight, dbias, dgamma, dbeta


def _output_backward(block: _Block, layer: _Layer, dx, y, dgamma, dbeta) -> Tensor:
    """The paper's order: from the gradient of act(scale y + shift) to that of y, also through y's statistics."""
    scale, shift = block.output_norm(layer)
    du = pull_normalised(dx, y, scale, shift, block.activation, 1)
    if scale is None or block.mean is None or block.var is None:
        return du
    mean, inverse = block.mean[layer.outputs], torch.rsqrt(block.var[layer.outputs] + block.eps)
    centred = (y.to(du.dtype) - mean[:, None, None]) * inverse[:, None, None]
    dshift, dscale = du.sum((0, 2, 3)), (du * centred).sum((0, 2, 3))
    dgamma[layer.outputs], dbeta[layer.outputs] = dscale, dshift
    if block.training:
        elements = y.numel() // y.shape[1]
        du = du - (dshift[:, None, None] + centred * dscale[:, None, None]) / elements
    return du * scale[:, None, None]


def _statistics_backward(block: _Block, layer: _Layer, sums, dgamma, dbeta, dmean, dvar) -> None:
    """From the gradients of u = scale x + shift to those of gamma, beta, and of the shared statistics, summed up."""
    dscale, dshift = sums
    mean, var = block.statistics(layer)
    inverse = torch.rsqrt(var + block.eps)
    centred = dscale - mean * dshift
    dgamma[layer.channels], dbeta[layer.channels] = inverse * centred, dshift
    if not block.training:
        return
    gamma = 1.0 if block.gamma is None else block.gamma[layer.channels]
    of_mean, of_var = -gamma * inverse * dshift, -0.5 * gamma * inverse.pow(3) * centred
    start = 0
    for first, end in layer.spans:
        part = slice(start, start + end - first)
        dmean[first:end] += of_mean[part]
        dvar[first:end] += of_var[part]
        start = part.stop


def _settled(dx, states, slot, mean, dmean, dvar) -> Tensor:
    """The gradient of finished channels with what came through their statistics, d mean / dx = 1 / M and
    d var / dx = 2 (x - mean) / M; written back."""
    elements = states.numel() // states.shape[1]
    slope = (2 / elements) * dvar[slot]
    offset = dmean[slot] / elements - slope * mean[slot]
    x = states[:, slot].to(dx.dtype)
    dx[:, slot] += torch.addcmul(offset[:, None, None], x, slope[:, None, None])
    return dx[:, slot]


def _layers(triangle: list[int]) -> int:
    layers = 0
    while layers * (layers + 1) // 2 < len(triangle):
        layers += 1
    return layers
