"""dnl_block: validate -> select -> the block's implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend
from ..._autograd import autocast, outside_autocast
from ..._checks import KERNELS, check_activation, check_choice, check_positive, check_shape, check_tensor, fail, shape
from . import bottleneck, composition, fused, non_local, reference, resident
from .config import AFFINES, NORMS, BlockConfig, LayerParameters, Statistics

OP = "dnl_block"
_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON, cuda=_backend.CUDA)


def dnl_block(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, *, backend: str | None = None
) -> Tensor:
    """[x_0 .. x_L], x_{l+1} = N(tau * sum_j K_{l,j} act(BN_{l,j}(x_j))): L densely connected layers in one call.

    With config.preactivation=False the paper's order: x_{l+1} = act(BN(N(tau * sum_j K_{l,j} x_j + a_l))). A channel's
    batch statistics are computed once and shared by all layers that read it, which gives the values and gradients of
    one batch normalisation per layer. What is kept for backward grows linearly with the number of layers.

    Args:
        x0: [B, C0, H, W], or [B, N, C0] for config.affine="linear"; any strides.
        parameters: the tensors of each of the L layers; shapes as in LayerParameters, dtype and device of x0 (those of
            a normalisation may be float32 where x0 is of a half type).
        config: the static description.
        backend: None (the best), "reference", "cpu", "triton" or "cuda". On a GPU, in evaluation or without a norm and
            without gradients, a block whose states fit in shared memory is one launch (`resident.limit` says what
            does not fit; the log names it).

    Returns:
        The states buffer [B, C0 + L * G, H, W] or [B, N, C0 + L * G].

    Raises:
        ValueError, TypeError: a tensor that is missing, superfluous, or of the wrong shape, dtype or device; an unknown
        name in config; batch statistics of a single value per channel.

    Source: DNL (1), and its equivalent (1') with the normalisation of a pre-activation DenseNet.
    """
    return dnl_block_with_statistics(x0, parameters, config, backend=backend)[0]


def dnl_block_with_statistics(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, *, backend: str | None = None
) -> tuple[Tensor, Statistics | None]:
    """`dnl_block`, and the batch statistics from which running statistics are updated (None without any)."""
    check_tensor(OP, "x0", x0)
    (x0,) = autocast(x0)  # type: ignore[assignment]
    parameters = [_autocast(p) if isinstance(p, LayerParameters) else p for p in parameters]
    _check_parameters(x0, parameters, config)
    if backend is not None:
        _backend.select(OP, backend, x0)
    with outside_autocast(x0):
        for route in ROUTES:
            if (why := route.limit(x0, parameters, config, backend)) is None:
                return route.run(x0, parameters, config, backend)
            if route.logged(x0, backend):
                _backend.log_fallback(OP, route.name, why)
    raise AssertionError("the last route takes every call")


def prepare(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str | None = None
) -> Callable[[Tensor], Tensor] | None:
    """The block as a function of x0 alone, for evaluation without gradients: everything checked, the weights packed. It
    takes every input of the dtype, device and channels of x0. None if the implementation of the call has no such form.
    """
    if config.training and config.norm is not None:
        return None
    _check_parameters(x0, parameters, config)
    for route in ROUTES:
        if route.limit(x0, parameters, config, backend) is None:
            return None if route.prepare is None else route.prepare(x0, parameters, config, backend)
    return None


def explain(
    x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig, backend: str | None = None
) -> tuple[str, dict[str, str]]:
    """The implementation that runs a call, and why every faster one does not."""
    refused: dict[str, str] = {}
    for route in ROUTES:
        if (why := route.limit(x0, parameters, config, backend)) is None:
            return route.name, refused
        if route is not ROUTES[0]:
            refused[route.name] = why
    raise AssertionError("the last route takes every call")


class Route(NamedTuple):
    """One implementation of the block.

    limit(x0, parameters, config, backend): why it cannot run the call, or None.
    run(x0, parameters, config, backend): the states buffer, and the batch statistics if it measured any.
    logged(x0, backend): whether a refusal is worth a line in the log.
    prepare: see the function of this name.
    """

    name: str
    limit: Callable[..., str | None]
    run: Callable[..., tuple[Tensor, Statistics | None]]
    logged: Callable[..., bool] = lambda x0, backend: False
    prepare: Callable[..., Callable[[Tensor], Tensor] | None] | None = None


def _asked_for_reference(x0, parameters, config, backend) -> str | None:
    return None if backend == "reference" or _backend.decomposes() else "PyTorch's own operators were not asked for"


def _limit_of_composition(x0, parameters, config, backend) -> str | None:
    return None if config.spatial_dims == 2 else f"its operators take images, not {config.spatial_dims} dimensions"


ROUTES = (  # best first
    Route("eager PyTorch, as asked", _asked_for_reference, lambda x, p, c, b: reference.dnl_block(x, p, c)),
    Route(
        "resident block", resident.limit,
        lambda x, p, c, b: (resident.dnl_block(x, p, c, resident.choose(x, b) or ""), None),
        lambda x, b: resident.choose(x, b) is not None,
    ),
    Route(
        "whole block", fused.limit, lambda x, p, c, b: fused.dnl_block(x, p, c, fused.choose(x, b) or ""),
        prepare=fused.prepare,
    ),
    Route(
        "bottleneck block", bottleneck.limit, lambda x, p, c, b: bottleneck.dnl_block(x, p, c),
        prepare=bottleneck.prepare,
    ),
    Route("non-local block", non_local.limit, lambda x, p, c, b: non_local.dnl_block(x, p, c)),
    Route("one operator after the other", _limit_of_composition, composition.dnl_block),
    Route("eager PyTorch", lambda *_: None, lambda x, p, c, b: reference.dnl_block(x, p, c)),
)  # fmt: skip


def _autocast(p: LayerParameters) -> LayerParameters:
    """As autocast treats PyTorch's modules: products in its dtype, normalisations in that of their parameters."""
    names = [name for name in p._fields if "norm" not in name and isinstance(getattr(p, name), Tensor)]
    if not names:
        return p
    return p._replace(**dict(zip(names, autocast(*(getattr(p, name) for name in names)), strict=True)))


def check_config(config: BlockConfig, op: str = OP) -> None:
    """Every value is allowed, and none contradicts another. `op` is who asks."""
    check_choice(op, "affine", config.affine, tuple(AFFINES))
    check_choice(op, "kernel", config.kernel, KERNELS)
    check_activation(op, "activation", config.activation)
    check_choice(op, "norm", config.norm, NORMS)
    check_positive(op, "tau", config.tau)
    check_positive(op, "eps", config.eps)
    for name in ("in_channels", "num_layers", "growth_rate", "heads", "bottleneck", "head_dim"):
        value = getattr(config, name)
        unused = (name == "bottleneck" and value is None) or (name == "head_dim" and config.kernel == "local")
        if not unused and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            fail(op, name, repr(value), "an integer >= 1")
    if config.bottleneck is not None and config.affine != "conv3x3":
        why = "None: a bottleneck reduces the channels in front of a 3x3 convolution, which is affine='conv3x3'"
        fail(op, "bottleneck", f"{config.bottleneck} with affine='{config.affine}'", why)
    if config.kernel == "local":
        for name, plain in (("heads", 1), ("head_dim", 0), ("residual", False)):
            if getattr(config, name) != plain:
                why = "no other value with kernel='local', where N is the identity and has no projections"
                fail(op, name, getattr(config, name), f"{plain or None}, and {why}")
    if config.spatial_dims not in (1, 2, 3):
        fail(op, "spatial_dims", config.spatial_dims, "1, 2 or 3")
    if config.spatial_dims != 2 and (config.affine == "linear" or config.kernel != "local"):
        given = f"{config.spatial_dims} with affine={config.affine!r} and kernel={config.kernel!r}"
        fail(op, "spatial_dims", given, "2: only convolutions with kernel='local' have 1 or 3 dimensions")
    _check_connectivity(config, op)


def _check_connectivity(config: BlockConfig, op: str) -> None:
    if [len(row) for row in config.connectivity] != list(range(1, config.num_layers + 1)):
        fail(op, "connectivity", f"rows of lengths {[len(row) for row in config.connectivity]}", "1, 2, .. num_layers")
    for layer, row in enumerate(config.connectivity):
        if not any(row) and not (config.input_skip and config.bottleneck is None):
            why = "at least one state for each layer (or input_skip=True and bottleneck=None)"
            fail(op, f"connectivity[{layer}]", "without any state", why)


def _check_parameters(x0: Tensor, parameters: Sequence[LayerParameters], config: BlockConfig) -> None:
    # torch.compile does not trace a cache; it runs this once anyway.
    expected = (_plan.__wrapped__ if torch.compiler.is_compiling() else _plan)(config)
    sizes = {1: "N", 2: "H, W", 3: "D, H, W"}.get(config.spatial_dims)
    rank, axis, form = (
        (3, 2, "[B, N, C0]") if config.affine == "linear" else (config.spatial_dims + 2, 1, f"[B, C0, {sizes}]")
    )
    if x0.dim() != rank or x0.shape[axis] != config.in_channels:
        fail(OP, "x0", shape(x0), f"{form} with C0 = {config.in_channels}")
    if len(parameters) != config.num_layers:
        fail(OP, "parameters", f"of {len(parameters)} layers", f"{config.num_layers}")
    if config.norm is not None and config.training and x0.numel() == config.in_channels:
        fail(OP, "x0", shape(x0), "more than one value per channel, for batch statistics")
    for layer, (p, allowed) in enumerate(zip(parameters, expected, strict=True)):
        if not isinstance(p, LayerParameters):
            raise TypeError(f"{OP}: parameters[{layer}] is of type {type(p).__name__}; expected LayerParameters")
        for name, tensor, (size, optional) in zip(p._fields, p, allowed, strict=True):
            where = f"parameters[{layer}].{name}"
            if tensor is None:
                if size is not None and not optional:
                    fail(OP, where, "None", f"a tensor of shape {list(size)}")
                continue
            check_tensor(OP, where, tensor)
            if size is None:
                fail(OP, where, "given", "None in this configuration")
            wide_norm = "norm" in name and tensor.dtype == torch.float32 and x0.dtype != torch.float64
            check_tensor(OP, where, tensor, x0.to(torch.float32) if wide_norm else x0, "x0")
            check_shape(OP, where, tensor, size)


@functools.cache
def _plan(config: BlockConfig) -> list[list[tuple[tuple[int, ...] | None, bool]]]:
    """Checks the configuration; the shape of each tensor of each layer (None: there is none) and whether it may be
    left out, in the order of LayerParameters."""
    check_config(config)
    return [
        [(shapes.get(name), name not in shapes or config.may_be_none(name)) for name in LayerParameters._fields]
        for shapes in map(config.shapes, range(config.num_layers))
    ]
