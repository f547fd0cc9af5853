"""One way to make an operator differentiable: kernels for the first derivative, the reference for all others.

`differentiable(forward, backward, reference)` gives an autograd.Function whose backward runs the operator's own
kernels. When derivatives of the gradient are wanted (create_graph=True) or a forward-mode tangent, the same quantities
are computed through the eager reference, which PyTorch can differentiate to any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import check_states, check_tensor

Tensors = Sequence[Tensor | None]


def differentiable(
    forward: Callable[[Any, Tensors], tuple[Tensor, ...]],
    backward: Callable[[Any, Tensor, Tensors, Tensors, Sequence[bool]], Sequence[Tensor | None]],
    reference: Callable[[Any, Tensors], Tensor] | None = None,
    *,
    vjp: Callable[..., Sequence[Tensor | None]] | None = None,
    jvp: Callable[..., Tensor] | None = None,
    keep_output: bool = False,
    return_extra: bool = False,
) -> Callable[..., Any]:
    """A differentiable function (config, *tensors) -> output.

    forward(config, tensors) returns (output, *extra): extra tensors are kept for backward, not returned to the user.
    backward(config, doutput, tensors, extra, needs) returns one gradient, or None, for each tensor.
    reference(config, tensors) is the same output in differentiable eager PyTorch. config: static and hashable.
    vjp(config, doutput, tensors, needs), jvp(config, tensors, tangents): in place of a reference, its derivatives.
    keep_output: the output is kept too, as the first of `extra`. What is returned may be changed in place all the same.
    return_extra: the function returns (output, *extra), of which extra is not differentiable.
    """

    pull: Any = vjp or functools.partial(reference_vjp, reference)
    push: Any = jvp or functools.partial(reference_jvp, reference)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, config, *tensors):
            output, *extra = traceable(forward(config, tensors))
            ctx.config, ctx.count, ctx.extra = config, len(tensors), len(extra)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*extra)
            ctx.save_for_backward(*tensors, *([output] if keep_output else []), *extra)
            return _to_be_written(output, keep_output), *extra

        @staticmethod
        def backward(ctx, doutput, *_):
            if doutput is None:
                return (None,) * (1 + ctx.count)
            saved = ctx.saved_tensors  # once: hooks unpack a tensor at every look, a checkpoint only at the first
            tensors, extra, needs = saved[: ctx.count], saved[ctx.count :], ctx.needs_input_grad[1:]
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()):
                return None, *pull(ctx.config, doutput, tensors, needs)
            gradients = backward(ctx.config, doutput, tensors, extra, needs)
            return None, *(g if needed else None for g, needed in zip(gradients, needs, strict=True))

    class ForwardModeOperator(Operator):  # apart, since Dynamo refuses a class with a jvp
        @staticmethod
        def forward(ctx, config, *tensors):
            output = Operator.forward(ctx, config, *tensors)
            ctx.save_for_forward(*tensors)
            return output

        @staticmethod
        def jvp(ctx, _, *tangents):
            tensors = ctx.saved_tensors[: ctx.count]
            return push(ctx.config, tensors, tangents), *(None,) * ctx.extra

    def call(config, *tensors):
        if torch.compiler.is_compiling():
            output = Operator.apply(config, *_distinct(tensors))
        elif forward_ad._current_level >= 0 or recorded(tensors):
            output = ForwardModeOperator.apply(config, *tensors)
        else:
            output = forward(config, tensors)
        return output if return_extra else output[0]

    return call


def recorded(tensors: Tensors) -> bool:
    """Whether autograd records what is computed of these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def recomputes() -> bool:
    """Whether a backward pass is running on this thread, as it is where activation checkpointing computes a forward
    pass again: running statistics have been updated for it before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """Whether a gradient is being computed of batched or of dual tensors, of which the kernels know nothing."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _to_be_written(output: Tensor, kept: bool) -> Tensor:
    """The output as the user may change it in place. One that is kept for backward shares its memory with what is kept
    until one of the two is written; elsewhere than on the CPU PyTorch refuses the backward pass after such a change.
    One that was given its shape by a view is no view to autograd, which refuses to change a Function's views."""
    if torch.compiler.is_compiling():
        return output
    if kept and output.device.type == "cpu":
        return torch._lazy_clone(output)
    return torch.ops.aten._unsafe_view.default(output, output.shape) if output._is_view() else output


def traceable(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a Function's forward may return where Dynamo traces it: views. Dynamo of torch 2.11 takes the result of a
    cast that changes nothing (`.to`, `.float`, `.contiguous`) for a tensor without a history, and the Function's
    gradients are zeros, in silence."""
    return tuple(t.view_as(t) for t in output) if torch.compiler.is_compiling() else output


def reference_vjp(reference, config, doutput, tensors, needs):
    """J^T doutput, which can be differentiated again where gradients are recorded."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor given twice, or computed from another one, counts as an argument of its own.
        views = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=True)]
        wanted = [v for v, needed in zip(views, needs, strict=True) if needed]
        output = reference(config, views)
        found = iter(torch.autograd.grad(output, wanted, doutput, create_graph=again, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


def reference_jvp(reference, config, tensors, tangents):
    """J t as the derivative with respect to g of the linear map g -> J^T g, along t."""
    needs = [t is not None for t in tangents]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if n else x for x, n in zip(tensors, needs, strict=True)]
        output = reference(config, leaves)
        g = torch.zeros_like(output, requires_grad=True)
        wanted = [x for x, n in zip(leaves, needs, strict=True) if n]
        pulled = torch.autograd.grad(output, wanted, g, create_graph=True, allow_unused=True)
        pairs = [(p, t) for p, t in zip(pulled, [t for t in tangents if t is not None], strict=True) if p is not None]
        if not pairs:
            return torch.zeros_like(output)
        return torch.autograd.grad([p for p, _ in pairs], g, [t for _, t in pairs])[0]


def _distinct(tensors: Tensors) -> list[Tensor | None]:
    """A view in place of a tensor that was given before: Dynamo wants every input of a Function to be another one."""
    return [
        t.view_as(t) if t is not None and any(t is before for before in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]


def autocasts(device: str) -> bool:
    """Whether an autocast region of this type of device is active."""
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype of an active autocast region of their device, unchanged outside of one: as in torch's
    matrix products, whose float64 stays too."""
    device = next(t.device.type for t in tensors if t is not None)
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def affine_in_autocast(
    function: Callable[..., Tensor], states: Any, weight: Any, bias: Any, norm_scale: Any, norm_shift: Any, *,
    activation: str, **options: Any,
) -> Tensor | None:  # fmt: skip
    """The dense accumulation `function` in an autocast region of its tensors' device; None outside of one. As with
    torch's operators one by one: the product is of narrowed operands, while float32 states are normalised and activated
    in float32 first."""
    op = function.__name__
    check_tensor(op, "weight", weight)
    if not autocasts(weight.device.type):
        return None
    given = check_states(op, states, mixed=True)
    vectors = {"bias": bias, "norm_scale": norm_scale, "norm_shift": norm_shift}
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(op, name, vector)
    operands = autocast(weight, *vectors.values(), *given)
    assert operands[0] is not None
    dtype = operands[0].dtype
    plain = norm_scale is None and norm_shift is None and activation == "identity"
    if not plain and any(state.dtype == torch.float32 for state in given):
        operands = [t if t is None else t.to(torch.float32) for t in (*operands[:4], *given)]
    narrow, *narrow_vectors = operands[:4]
    with outside_autocast(weight):
        named = dict(zip(vectors, narrow_vectors, strict=True))
        return function(operands[4:], narrow, **named, activation=activation, **options).to(dtype)


def outside_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context in which PyTorch's operators keep the dtypes that they are given: no autocast."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()
