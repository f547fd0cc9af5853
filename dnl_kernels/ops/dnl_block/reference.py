"""Meaning of dnl_block: eager PyTorch, any device, any floating dtype. Every layer concatenates and normalises what it
reads, as a plain DenseNet does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._activations import activate
from ..dnl_layer.reference import affine, non_local
from .config import BlockConfig, Statistics


def dnl_block(x0: Tensor, parameters: Sequence[Any], config: BlockConfig) -> tuple[Tensor, Statistics | None]:
    """x_{l+1} = N(tau sum_j K_{l,j} act(BN(x_j))), or act(BN(N(tau sum_j K_{l,j} x_j + a_l))) in the paper's order."""
    axis = -1 if config.affine == "linear" else 1
    normalised: dict[str, list[Tensor]] = {"inner": [], "output": []}

    def norm_activate(x, weight, bias, mean, var):
        if config.norm is not None:
            mean, var = (None, None) if config.training else (mean, var)
            x = F.batch_norm(x.movedim(axis, 1), mean, var, weight, bias, config.training, 0.0, config.eps)
            x = x.movedim(1, axis)
        return activate(x, config.activation)

    states = [x0]
    for layer, p in enumerate(parameters):
        y: Any = None
        if read := [states[j] for j in config.reads(layer)]:
            x = torch.cat(read, axis)
            if config.preactivation:
                x = norm_activate(x, p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var)
            y = affine(x, p.affine_weight, p.affine_bias, config.tau)
            if config.bottleneck is not None:
                normalised["inner"].append(y)
                inner = (p.inner_norm_weight, p.inner_norm_bias, p.inner_norm_mean, p.inner_norm_var)
                y = affine(norm_activate(y, *inner), p.inner_weight, None)
        if config.input_skip:
            skip = affine(x0, p.skip_weight, p.skip_bias)
            y = skip if y is None else y + skip
        x = non_local(y, p.theta(), config.kernel, config.heads)
        x = x + y if config.residual else x
        if not config.preactivation:
            normalised["output"].append(x)
            x = norm_activate(x, p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var)
        states.append(x)
    buffer = torch.cat(states, axis)
    if config.norm is None or not config.training:
        return buffer, None

    def moments(xs):
        rows = [x.detach().movedim(axis, 0).flatten(1) for x in xs]
        means = [x.mean(1) for x in rows]
        return means, [(x - mean[:, None]).square().mean(1) for x, mean in zip(rows, means, strict=True)]

    shared = moments([buffer])
    mean, var = (m[0] if config.preactivation else None for m in shared)
    inner, output = moments(normalised["inner"]), moments(normalised["output"])
    elements = x0.numel() // max(x0.shape[axis], 1)
    return buffer, Statistics(mean, var, inner[0], inner[1], output[0], output[1], elements)
