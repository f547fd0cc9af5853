"""Derivatives of any order through the reference, in memory linear in N and M: tile after tile of queries, each
computed again when the derivative of its gradient is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._autograd import reference_jvp, reference_vjp, transformed
from .reference import Config, nonlocal_attention

TILE_NUMBERS = 2**20  # of the weights of a tile, or one query of each sample and head


def vjp(config: Config, doutput: Tensor, tensors: Sequence[Any], needs: Sequence[bool]):
    """Gradients of query, key, value and bandwidth that autograd can differentiate again."""
    query, *others = tensors
    total: list[Any] = [None] * len(tensors)
    dqueries = []
    tiles = _tiles(config, tensors)
    for first, columns in tiles:

        def gradients(doutput, *tensors, first=first):
            return reference_vjp(_reference(first), config, doutput, tensors, needs)

        arguments = (doutput[columns], query[columns], *others)
        keep = len(tiles) == 1 or transformed()
        dquery, *found = gradients(*arguments) if keep else _Recomputed.apply(gradients, *arguments)
        dqueries.append(dquery)
        for i, gradient in enumerate(found, 1):
            if gradient is not None:
                total[i] = gradient if total[i] is None else total[i] + gradient
    if needs[0]:
        total[0] = torch.cat(dqueries, dim=_position(config))
    return total


def jvp(config: Config, tensors: Sequence[Any], tangents: Sequence[Any]) -> Tensor:
    """The derivative of the output along the tangents."""
    (query, *others), (query_tangent, *other_tangents) = tensors, tangents
    pieces = []
    for first, columns in _tiles(config, tensors):
        tile_tangent = None if query_tangent is None else query_tangent[columns]
        tile = [query[columns], *others]
        pieces.append(reference_jvp(_reference(first), config, tile, [tile_tangent, *other_tangents]))
    return torch.cat(pieces, dim=_position(config))


def _reference(first: int):
    def output(config, tensors):
        query, key, value, bandwidth, key_mask = tensors
        return nonlocal_attention(query, key, value, bandwidth, key_mask, config, first)

    return output


def _position(config: Config) -> int:
    return 3 if config.channels_first else 2


def _tiles(config: Config, tensors: Sequence[Any]) -> list[tuple[int, tuple]]:
    """(number of the first query, index into query and doutput) of each tile; one even without queries."""
    query, key = tensors[:2]
    position = _position(config)
    per_query = query.shape[0] * query.shape[1] * key.shape[position]
    if config.kernel == "gaussian" and not config.normalize:
        per_query *= query.shape[5 - position]  # the reference forms every q_i - k_j
    rows = max(1, TILE_NUMBERS // max(1, per_query))
    after = () if config.channels_first else (slice(None),)
    return [
        (first, (..., slice(first, first + rows), *after)) for first in range(0, max(1, query.shape[position]), rows)
    ]


class _Recomputed(torch.autograd.Function):
    """function(*tensors) -> tensors, keeping its arguments only; differentiable as often as function is."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            results = function(*(_leaf(t) for t in tensors))
        return tuple(None if r is None else r.detach() for r in results)

    @staticmethod
    def backward(ctx, *dresults):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors: list[Any] = [t if t is None or not needed else t.view_as(t) if again else _leaf(t)
                       for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)]  # fmt: skip
            results = ctx.function(*tensors)
            pairs = [(r, d) for r, d in zip(results, dresults, strict=True) if r is not None and d is not None]
            wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[1:], strict=True) if needed]
            outputs, doutputs = zip(*[(r, d) for r, d in pairs if r.requires_grad], strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, doutputs, create_graph=again, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _leaf(t: Tensor | None) -> Tensor | None:
    return t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
