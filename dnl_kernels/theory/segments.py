"""x^L of eq. (1) for deep networks: gradients with the memory of O(sqrt L) states, where the history is finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import check_choice, check_count, check_finite, check_tensor
from .curves import ParameterCurves
from .grids import grid_times, working_dtype
from .solvers import LayerFunction, flatten_batch
from .structured import ExponentialSumKernel, SeparableKernel


def final_state(
    curves: ParameterCurves,
    x: Tensor,
    phi: LayerFunction,
    *,
    layers: int,
    segment: int | None = None,
    first: str = "input",
) -> Tensor:
    """The last state of `forward(curves, x, phi, layers=L)`, whose graph holds O(L / segment + segment) states.

    What a separable kernel, or a sum of exponentials, remembers of the past are a few sums: the state and these at the
    beginning of each segment are kept, and backward computes a segment anew (checkpointing) when it comes to it: one
    more forward pass in all. With other kernels every layer reads all states, which have to be kept anyway.

    Args:
        curves, x, phi, layers, first: as in `forward`; K a SeparableKernel or an ExponentialSumKernel.
        segment: layers per segment; about sqrt(L) by default.

    Returns:
        x^L [..., d], differentiable in x and in all that the curves are made of.

    Raises:
        TypeError: another kind of K.
        ValueError: wrong shapes or names, or a state that is not finite.
    """
    check_tensor("x", x)
    check_choice("first", first, ("input", "lifted"))
    if not isinstance(curves.K, SeparableKernel | ExponentialSumKernel):
        raise TypeError(f"K must be a SeparableKernel or an ExponentialSumKernel, got {type(curves.K).__name__}")
    if x.ndim < 1 or x.shape[-1] != curves.dim:
        raise ValueError(f"x must have shape [..., {curves.dim}], got {list(x.shape)}")
    length = math.isqrt(check_count("layers", layers) - 1) + 1 if segment is None else check_count("segment", segment)
    flat = flatten_batch(x, curves.dim).to(working_dtype(x.dtype))
    times = grid_times(layers, dtype=x.dtype, device=x.device)
    bias = None if curves.b is None else curves.b.row_sums(times)

    def run(start: int, stop: int, inputs: Tensor, state: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        before = max(0, start - 1)  # a decay is that from the grid point before
        history = curves.K.history(times[before:stop])
        history.sums, history.count = sums, start - before  # type: ignore[attr-defined]
        t = times[start:stop]
        forcing = torch.einsum("lab,nb->lna", curves.A(t), inputs) + curves.a(t)[:, None]
        vartheta = None if curves.vartheta is None else curves.vartheta(t)
        for index in range(stop - start):
            history.push(state)
            total = history.total(index + start - before)
            total = total if bias is None else total + bias[start + index]
            state = phi(forcing[index] + total / layers, None if vartheta is None else vartheta[index])
        return state, history.sums  # type: ignore[attr-defined]

    state, sums = flat, flat.new_zeros(())
    if first == "lifted":
        t = times[:1]
        vartheta = None if curves.vartheta is None else curves.vartheta(t)[0]
        state = phi(flat @ curves.A(t)[0].T + curves.a(t)[0], vartheta)
    for start in range(0, layers, length):
        stop = min(start + length, layers)
        state, sums = checkpoint(run, start, stop, flat, state, sums, use_reentrant=False)
    check_finite("states", state.detach())
    return state.reshape(x.shape).to(x.dtype)
