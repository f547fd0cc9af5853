"""Running statistics of batch normalisations, updated as torch.nn does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._autograd import recomputes


@torch.no_grad()
def update(found: list[tuple[Any, Tensor, Tensor]], elements: int) -> None:
    """The running statistics of (normalisation, mean, biased variance), in place and as nn.BatchNorm2d: unbiased
    variance, momentum=None for the cumulative mean. Few calls for all of them: there may be a hundred.

    Nothing happens for an empty batch, nor inside of a backward pass: activation checkpointing computes a forward pass
    again there, whose statistics have been counted."""
    found = [update for update in found if update[0].training and update[0].track_running_stats]
    if not found or elements == 0 or recomputes():
        return
    norms = [norm for norm, _, _ in found]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    running = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    unbiased = torch._foreach_mul([var for _, _, var in found], elements / max(elements - 1, 1))
    batch = [t for (_, mean, _), var in zip(found, unbiased, strict=True) for t in (mean, var)]
    momenta = [norm.momentum for norm in norms]
    if (
        momenta[0] is not None
        and set(momenta) == {momenta[0]}
        and {t.dtype for t in running} == {t.dtype for t in batch}
    ):
        torch._foreach_lerp_(running, batch, momenta[0])
        return
    for i, norm in enumerate(norms):
        factor = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.double()
        for at in (2 * i, 2 * i + 1):
            running[at].add_((batch[at] - running[at]) * factor)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); where activation checkpointing computes it again for a backward pass, with copies of its buffers, so
    that running statistics are not updated a second time."""
    if norm.training and recomputes():
        return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, (x,))
    return norm(x)
