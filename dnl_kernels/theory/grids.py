"""Grids of [0, 1] are integers: node l of L cells is l / L, and the times are derived from it, never the reverse.

Half precision is a format to store in: float16 and bfloat16 cannot hold the nodes of a grid of some hundred cells apart
from each other, so everything in them is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that is computed in: float32 for half precision, otherwise the given one."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def grid_times(layers: int, *, dtype: torch.dtype = torch.float64, device=None, last: bool = True) -> Tensor:
    """l / L for l = 0 .. L (or L - 1 with last=False), correctly rounded, in the working dtype of `dtype`."""
    index = torch.arange(layers + last, device=device)
    return index.to(working_dtype(dtype)) / layers


def locate(t: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """The cell l of every t in [0, 1] and its local coordinate t L - l, which is exactly 0 (1 at t = 1) at a node.

    A point within rounding of a node counts as the node, whatever its dtype and however it was computed: within 4 eps
    of t, and never more than a quarter of a cell.

    Returns:
        cell, int64 in 0 .. L - 1, and local, differentiable in t, in the working dtype of t.
    """
    position = t.double() * layers
    at = position.detach()
    node = at.round()
    slack = (4 * torch.finfo(t.dtype).eps * at).clamp_max(0.25)
    snapped = (at - node).abs() <= slack
    cell = torch.where(snapped, node, at.floor()).long().clamp(0, layers - 1)
    offset = torch.where(snapped, at - node, torch.zeros_like(at))
    return cell, (position - (cell + offset)).to(working_dtype(t.dtype))


def check_uniform(name: str, times: Tensor) -> Tensor:
    """Times that are first + i * step up to their own rounding, or ValueError."""
    exact = times.double()
    first, span, count = exact[0], exact[-1] - exact[0], times.numel() - 1
    index = torch.arange(count + 1, dtype=torch.float64, device=times.device)
    gap = (exact - (first + span * index / max(count, 1))).abs()
    if bool((gap > 4 * torch.finfo(times.dtype).eps * exact.abs().max()).any()):
        raise ValueError(f"{name} must be a uniform grid for a Toeplitz kernel (K depends on t - s by index)")
    return times
