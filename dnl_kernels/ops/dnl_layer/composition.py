"""dnl_layer from the operators that it consists of: an accumulation, a non-local operator, a pointwise end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backend
from . import projected
from .config import LayerConfig, NonLocalParameters
from .non_local import affine, composed_non_local, folds, non_local_of_affine
from .pointwise import normalise_activate


def non_local(y: Tensor, theta: NonLocalParameters, kernel: str, heads: int, backend: str | None) -> Tensor:
    """N(y; theta): one function where kernels run, its parts where a compiler or a transform looks inside."""
    if kernel == "local":
        return y
    if kernel != "dot" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        assert theta.query_weight is not None and theta.value_weight is not None
        widths = (weight.shape[0] // heads for weight in (theta.query_weight, theta.value_weight))
        facts = dict(zip(("width", "value_width"), widths, strict=True))
        chosen = _backend.select("nonlocal_attention", backend, y, **facts)
        if chosen != "reference" and y.device.type != "meta":
            return projected.non_local(y, theta, projected.Config(kernel, heads, y.dim() == 4, chosen))
    return composed_non_local(y, theta, kernel, heads, backend)


def dnl_layer(
    states: Sequence[Tensor],
    affine_weight: Tensor,
    affine_bias: Tensor | None,
    theta: NonLocalParameters,
    norm: tuple[Tensor | None, Tensor | None],
    output_norm: tuple[Tensor | None, Tensor | None],
    skip: tuple[Tensor, Tensor, Tensor | None] | None,
    config: LayerConfig,
    backend: str | None,
) -> Tensor:
    prologue = {"norm_scale": norm[0], "norm_shift": norm[1], "activation": config.input_activation}
    if skip is None and folds(affine_weight, theta, config, backend):
        z = non_local_of_affine(
            states, affine_weight, affine_bias, theta, config, backend, scale=config.tau, **prologue
        )
    else:
        y = affine(states, affine_weight, affine_bias, scale=config.tau, backend=backend, **prologue)
        if skip is not None:
            y = y + affine([skip[0]], skip[1], skip[2], backend=backend)
        z = non_local(y, theta, config.kernel, config.heads, backend)
        z = z + y if config.residual else z
    return normalise_activate(z, *output_norm, config.activation, 1 if affine_weight.dim() == 4 else -1)
