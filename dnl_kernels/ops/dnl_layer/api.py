"""dnl_layer: validate -> select -> the composition of dense accumulation, non-local operator and pointwise end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ... import _backend
from ..._autograd import autocast, outside_autocast
from ..._checks import (
    KERNELS,
    check_activation,
    check_choice,
    check_positive,
    check_shape,
    check_states,
    check_tensor,
    fail,
    shape,
)
from . import composition, fused, reference
from .config import LayerConfig, NonLocalParameters

OP = "dnl_layer"
# Triton: two kernels for what `fused.triton_limit` allows, else each part by its own operator.
_CUDA = _backend.CUDA._replace(limit=fused.limit)
_backend.declare(OP, cpu=_backend.CPU, triton=_backend.TRITON, cuda=_CUDA)


def dnl_layer(
    states: Sequence[Tensor],
    affine_weight: Tensor,
    affine_bias: Tensor | None = None,
    theta: NonLocalParameters | Mapping[str, Tensor | None] | None = None,
    *,
    kernel: str = "local",
    activation: str = "identity",
    tau: float = 1.0,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    input_activation: str = "identity",
    heads: int = 1,
    residual: bool = False,
    skip_input: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """sigma(output_scale * N(y; theta) + output_shift), y = tau * sum_j K_j sigma_in(norm(x_j)) + b + A x_s + a.

    norm(x) = norm_scale * x + norm_shift is a folded normalisation of the states (the pre-activation order),
    output_scale and output_shift one of N(y) (the paper's order).
    N(y)_i = W_o concat_heads((1 / Z_i) sum_j w(q_i, k_j) v_j) over positions i and j, with q = W_q y, k = W_k y and
    v = W_v y; for kernel="local" it is the identity.

    Args:
        states: J >= 1 tensors [B, C_j, H, W] (images) or [B, N, C_j] (tokens; [..., C_j] for kernel="local").
        affine_weight: the K_j side by side: [G, sum C_j, k, k] with k odd, or [G, sum C_j].
        affine_bias: [G] or None.
        theta: the fields of NonLocalParameters, as one or as a mapping; None for kernel="local".
        kernel: "local", "softmax" (scale D^-1/2), "gaussian" (bandwidth exp(rho)) or "dot" (Z = N).
        activation, input_activation: "identity", "relu", "leaky_relu", "leaky_relu(0.2)" (any slope), "tanh",
            "gelu" or "silu".
        tau: the step, a number > 0.
        norm_scale, norm_shift: [sum C_j] or None.
        heads: of N.
        residual: y is added to N(y).
        skip_input, skip_weight, skip_bias: x_s, A and a: a state [B, C_s, H, W] or [B, N, C_s], [G, C_s, k, k] or
            [G, C_s], and [G] or None.
        output_scale, output_shift: [G'] or None, G' the channels of the result.
        backend: None (the best for each part), "reference", "cpu", "triton" (two launches for what
            `fused.triton_limit` allows) or "cuda" (one launch, for what `fused.limit` allows). What is not fused is
            composed of other operators.

    Returns:
        [B, G', H, W] or [B, N, G'], G' = G for kernel="local" and the rows of theta's output_weight otherwise.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or an unknown name, with what is allowed.

    Source: DNL (1) with Def. 1 for y; N as in Wang et al. 2018, eq. (1).
    """
    states = check_states(OP, states)
    check_choice(OP, "kernel", kernel, KERNELS)
    theta = _parameters(theta, kernel)
    named = {
        "affine_weight": affine_weight,
        "affine_bias": affine_bias,
        "norm_scale": norm_scale,
        "norm_shift": norm_shift,
        "skip_input": skip_input,
        "skip_weight": skip_weight,
        "skip_bias": skip_bias,
        "output_scale": output_scale,
        "output_shift": output_shift,
        **{f"theta.{name}": tensor for name, tensor in theta._asdict().items()},
    }
    check_tensor(OP, "affine_weight", affine_weight)
    for name, tensor in named.items():
        if tensor is not None:
            check_tensor(OP, name, tensor)
    (*states,) = autocast(*states)  # type: ignore[assignment]
    named = dict(zip(named, autocast(*named.values()), strict=True))
    for name, tensor in named.items():
        if tensor is not None:
            check_tensor(OP, name, tensor, states[0], "states[0]")
    check_activation(OP, "activation", activation)
    check_activation(OP, "input_activation", input_activation)
    check_positive(OP, "tau", tau)
    _check_shapes(states, named, kernel, heads, residual)
    theta = NonLocalParameters(**{name: named[f"theta.{name}"] for name in NonLocalParameters._fields})
    config = LayerConfig(kernel, activation, tau, input_activation, heads, residual)
    skip = (named["skip_input"], named["skip_weight"], named["skip_bias"]) if skip_weight is not None else None
    arguments = (
        states,
        named["affine_weight"],
        named["affine_bias"],
        theta,
        (named["norm_scale"], named["norm_shift"]),
        (named["output_scale"], named["output_shift"]),
        skip,
        config,
    )
    chosen = fused.choose(states, named, config, backend)
    with outside_autocast(states[0]):
        if backend == "reference" or _backend.decomposes():
            return reference.dnl_layer(*arguments)
        if chosen is not None:
            return fused.dnl_layer(states, named, config, chosen)
        return composition.dnl_layer(*arguments, backend)


def _parameters(theta, kernel: str) -> NonLocalParameters:
    if theta is None:
        theta = NonLocalParameters()
    elif isinstance(theta, Mapping):
        if unknown := sorted(set(theta) - set(NonLocalParameters._fields)):
            fail(OP, "theta", f"a mapping with {unknown[0]!r}", "keys among " + ", ".join(NonLocalParameters._fields))
        theta = NonLocalParameters(**theta)
    elif not isinstance(theta, NonLocalParameters):
        raise TypeError(
            f"{OP}: theta is of type {type(theta).__name__}; expected NonLocalParameters, a mapping or None"
        )
    check_theta(OP, "theta.", theta, kernel)
    return theta


def check_theta(op: str, prefix: str, theta: NonLocalParameters, kernel: str) -> None:
    """Every weight that the kernel needs is there, and none that it does not use."""
    needed = {"local": set(), "gaussian": {"query", "value", "output"}}.get(kernel, {"query", "key", "value", "output"})
    needed = {f"{name}_weight" for name in needed} | ({"rho"} if kernel == "gaussian" else set())
    allowed = needed | {name.replace("weight", "bias") for name in needed}
    for name, tensor in theta._asdict().items():
        if tensor is None and name in needed:
            fail(op, prefix + name, "None", f"a tensor, which kernel='{kernel}' needs")
        if tensor is not None and name not in allowed:
            fail(op, prefix + name, "given", f"None: kernel='{kernel}' does not use it")


def _check_shapes(states, named, kernel: str, heads: int, residual: bool) -> None:
    weight = named["affine_weight"]
    images = weight.dim() == 4
    if weight.dim() not in (2, 4) or (images and not (weight.shape[2] == weight.shape[3] and weight.shape[2] % 2)):
        fail(OP, "affine_weight", shape(weight), "[G, sum C_j, k, k] with k odd, or [G, sum C_j]")
    axis = 1 if images else -1
    for j, state in enumerate(states):
        if images and state.dim() != 4:
            fail(OP, f"states[{j}]", shape(state), "[B, C_j, H, W], as affine_weight is a convolution's")
        if not images and (state.dim() != 3 if kernel != "local" else state.dim() < 1):
            fail(OP, f"states[{j}]", shape(state), "[B, N, C_j], as affine_weight is a matrix")
    width = weight.shape[0]
    channels = sum(state.shape[axis] for state in states)
    check_shape(OP, "affine_weight", weight, (width, channels, *weight.shape[2:]), meaning="G, sum C_j, ..")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        fail(OP, "heads", heads, "an integer >= 1")
    result = width if kernel == "local" else named["theta.output_weight"].shape[0]
    if residual and (kernel == "local" or result != width):
        fail(
            OP,
            "residual",
            True,
            "False for kernel='local' or an output_weight with other rows than G: y is added to N(y)",
        )
    expected = {
        "affine_bias": (width, "G"),
        "norm_scale": (channels, "sum C_j"),
        "norm_shift": (channels, "sum C_j"),
        "skip_bias": (width, "G"),
        "output_scale": (result, "G'"),
        "output_shift": (result, "G'"),
        "theta.rho": (heads, "heads"),
    }
    for name, (size, meaning) in expected.items():
        if named[name] is not None:
            check_shape(OP, name, named[name], (size,), meaning=meaning)
    _check_theta_shapes(named, width, heads)
    _check_skip(states[0], named, width, axis)


def _check_theta_shapes(named, width: int, heads: int) -> None:
    query, value = named["theta.query_weight"], named["theta.value_weight"]
    if query is None:
        return
    for name, weight in (("query", query), ("value", value)):
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] % heads or not weight.shape[0]:
            letter = "D" if name == "query" else "E"
            fail(OP, f"theta.{name}_weight", shape(weight), f"[heads * {letter}, {width}] with {heads} heads")
    if named["theta.key_weight"] is not None:
        check_shape(OP, "theta.key_weight", named["theta.key_weight"], query.shape, meaning="heads * D, G")
    output = named["theta.output_weight"]
    check_shape(OP, "theta.output_weight", output, (output.shape[0], value.shape[0]), meaning="G', heads * E")
    for name in ("query", "key", "value", "output"):
        if (bias := named[f"theta.{name}_bias"]) is not None:
            check_shape(OP, f"theta.{name}_bias", bias, named[f"theta.{name}_weight"].shape[:1])


def _check_skip(state: Tensor, named, width: int, axis: int) -> None:
    source, weight = named["skip_input"], named["skip_weight"]
    if (source is None) != (weight is None) or (weight is None and named["skip_bias"] is not None):
        fail(OP, "skip_input and skip_weight", "given without each other", "both or neither")
    if weight is None:
        return
    like, given = list(state.shape), list(source.shape)
    if len(given) == len(like):
        like[axis] = given[axis]
    if given != like:
        fail(OP, "skip_input", shape(source), f"that of states[0], {list(state.shape)}, but for its channels")
    kernel = named["affine_weight"].shape[2:]
    check_shape(OP, "skip_weight", weight, (width, given[axis], *kernel), meaning="G, C_s, ..")
