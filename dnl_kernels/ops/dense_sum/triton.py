"""dense_sum in Triton: a table of pointers to the states, each state read once, nothing stacked.

States are matrices of rows. A kernel handles a tile of every state; the weight is one number, or one per row (images),
or one per column (tokens). The loop over the states is a loop at run time: a growing list never recompiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import aligned, as_rows, pointer_table, power_of_two, rows_and_columns, table_entry

TILE = {"forward": 2048, "backward": 4096}  # elements: 8 warps of 8, and of 16, so that partial sums are few
WARPS = 8
UNROLL = tl.constexpr(4)  # states whose loads are in flight together


@triton.jit
def _tile(row_first, column_first, rows, columns, period, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a tile, which of its elements exist, and each row's (outer index, index in its period)."""
    row = row_first + tl.arange(0, ROWS)
    column = column_first + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row // period, row % period, column, mask


@triton.jit
def _pointers(base, outer, inner, column, stride, columns, ALIGNED: tl.constexpr):
    offset = outer.to(tl.int64) * stride + inner.to(tl.int64) * columns  # one sample may have more than 2^31 elements
    pointers = base + (offset[:, None] + column[None, :])
    return tl.multiple_of(pointers, (1, 16)) if ALIGNED else pointers


@triton.jit
def _weight_tile(WEIGHT, j, count, inner, column, columns, channels, PER: tl.constexpr):
    """w_j for the tile: [1, 1], [rows, 1] or [1, columns]."""
    WEIGHT += j * channels
    if PER == "row":
        w = tl.load(WEIGHT + inner, mask=(inner < channels) & (j < count), other=0.0)[:, None]
    elif PER == "column":
        w = tl.load(WEIGHT + column, mask=(column < columns) & (j < count), other=0.0)[None, :]
    else:
        w = tl.load(WEIGHT + tl.arange(0, 1), mask=j < count, other=0.0)[:, None]
    return w.to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def dense_sum_fwd_kernel(
    TABLE, WEIGHT, Y, count, rows, columns, period, channels,
    PER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y = sum_j w_j * x_j on one tile."""
    tiles = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0)
    column_first = (pid % tiles).to(tl.int64) * COLUMNS
    outer, inner, column, mask = _tile((pid // tiles) * ROWS, column_first, rows, columns, period, ROWS, COLUMNS)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j0 in range(0, count, UNROLL):
        for u in tl.static_range(UNROLL):
            j = j0 + u
            state, stride = table_entry(TABLE, j, count, Y)
            x = tl.load(
                _pointers(state, outer, inner, column, stride, columns, ALIGNED), mask=mask & (j < count), other=0.0
            )
            y += x.to(tl.float32) * _weight_tile(WEIGHT, j, count, inner, column, columns, channels, PER)
    place = _pointers(Y, outer, inner, column, period * columns, columns, False)
    tl.store(place, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def dense_sum_bwd_kernel(
    DY, TABLE, DTABLE, WEIGHT, PARTIAL, count, rows, columns, period, channels, dy_stride,
    PER: tl.constexpr, STATES_NEEDED: tl.constexpr, WEIGHT_NEEDED: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx_j = w_j * dy, and the sum of x_j * dy over the tile, or over its rows or columns, into PARTIAL."""
    tiles = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0)
    row_first = (pid // tiles) * ROWS
    column_first = (pid % tiles).to(tl.int64) * COLUMNS
    outer, inner, column, mask = _tile(row_first, column_first, rows, columns, period, ROWS, COLUMNS)
    dy = tl.load(_pointers(DY, outer, inner, column, dy_stride, columns, ALIGNED), mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    for j in range(0, count):
        if STATES_NEEDED:
            dstate, stride = table_entry(DTABLE, j, count, DY)
            dx = dy * _weight_tile(WEIGHT, j, count, inner, column, columns, channels, PER)
            place = _pointers(dstate, outer, inner, column, stride, columns, ALIGNED)
            tl.store(place, dx.to(DY.dtype.element_ty), mask=mask)
        if WEIGHT_NEEDED:
            state, stride = table_entry(TABLE, j, count, DY)
            x = tl.load(_pointers(state, outer, inner, column, stride, columns, ALIGNED), mask=mask, other=0.0)
            product = x.to(tl.float32) * dy
            if PER == "row":
                row = row_first + tl.arange(0, ROWS)
                at = (tl.cast(j, tl.int64) * rows + row) * tiles + pid % tiles
                tl.store(PARTIAL + at, tl.sum(product, 1), mask=row < rows)
            elif PER == "column":
                at = (tl.cast(j, tl.int64) * tl.cdiv(rows, ROWS) + pid // tiles) * columns + column
                tl.store(PARTIAL + at, tl.sum(product, 0), mask=column < columns)
            else:
                at = j * tl.num_programs(0).to(tl.int64) + pid
                tl.store(PARTIAL + at, tl.sum(tl.sum(product, 1), 0))


class _Layout(NamedTuple):
    """How the operands are seen: `rows` x `columns`, of which `period` rows in a row belong to one outer index."""

    states: list[Tensor]
    strides: list[int]
    split: int
    rows: int
    columns: int
    period: int
    channels: int
    per: str

    def tile(self, elements: int) -> tuple[int, int, int]:
        """Rows and columns of a tile, and how many tiles there are."""
        columns = power_of_two(self.columns, 1, 32 if self.per == "column" else elements)
        rows = power_of_two(self.rows, 1, max(elements // columns, 1))
        return rows, columns, triton.cdiv(self.rows, rows) * triton.cdiv(self.columns, columns)

    def aligned(self, tensors: Sequence[Tensor], strides: Sequence[int]) -> bool:
        """Whether every row of the tensors, laid out as the states are, starts at a multiple of 16 bytes: those of an
        outer index lie `columns` apart."""
        inner = [self.columns] * len(tensors) if self.period > 1 else []
        return aligned([*tensors, *tensors[: len(inner)]], [*strides, *inner])


def _layout(states: Sequence[Tensor], weight: Tensor, channel_dim: int) -> _Layout:
    if weight.dim() == 1:
        split, found, strides = as_rows(states, range(states[0].dim() + 1))
        rows, columns = rows_and_columns(found[0], split)
        return _Layout(found, strides, split, rows, columns, 1, 1, "tensor")
    split, found, strides = as_rows(states, [channel_dim])
    channels = weight.shape[1]
    rows, columns = rows_and_columns(found[0], split)
    if columns == channels:
        return _Layout(found, strides, split, rows, columns, 1, channels, "column")
    return _Layout(found, strides, split, rows * channels, columns // channels, channels, channels, "row")


def dense_sum_fwd(states: Sequence[Tensor], weight: Tensor, channel_dim: int) -> Tensor:
    y = torch.empty_like(states[0], memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    p = _layout(states, weight, channel_dim)
    rows, columns, programs = p.tile(TILE["forward"])
    with torch.cuda.device_of(y):
        dense_sum_fwd_kernel[(programs,)](
            pointer_table(p.states, p.strides), weight.contiguous(), y,
            len(states), p.rows, p.columns, p.period, p.channels,
            PER=p.per, ALIGNED=p.aligned(p.states, p.strides), ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return y


def dense_sum_bwd(
    dy: Tensor, states: Sequence[Tensor], weight: Tensor, channel_dim: int, need_states: bool, need_weight: bool
) -> tuple[list[Tensor], Tensor]:
    dstates = [torch.empty_like(dy, memory_format=torch.contiguous_format) for _ in states] if need_states else []
    if not (need_weight and dy.numel()):
        dweight = weight.new_zeros(weight.shape if need_weight else (0, *weight.shape[1:]))
    if not dy.numel():
        return dstates, dweight
    p = _layout(states, weight, channel_dim)
    _, (dy,), (dy_stride,) = as_rows([dy], [p.split])
    rows, columns, programs = p.tile(TILE["backward"])
    row_tiles, column_tiles = triton.cdiv(p.rows, rows), triton.cdiv(p.columns, columns)
    sums = {"tensor": (programs,), "row": (p.rows, column_tiles), "column": (row_tiles, p.columns)}[p.per]
    partial = dy.new_empty((len(states), *sums) if need_weight else (0,), dtype=torch.float32)
    with torch.cuda.device_of(dy):
        table = pointer_table(p.states, p.strides)
        steps = [p.period * p.columns] * len(states)
        dense_sum_bwd_kernel[(programs,)](
            dy, table, pointer_table(dstates, steps) if need_states else table, weight.contiguous(), partial,
            len(states), p.rows, p.columns, p.period, p.channels, dy_stride,
            PER=p.per, STATES_NEEDED=need_states, WEIGHT_NEEDED=need_weight,
            ALIGNED=p.aligned([dy, *p.states, *dstates], [dy_stride, *p.strides, *(steps if dstates else [])]),
            ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    if need_weight:  # the second stage of the reduction: small, in a fixed order, torch's
        if p.per == "row":
            partial = partial.view(len(states), -1, p.period, column_tiles).sum((1, 3))
        else:
            partial = partial.sum(1)
        dweight = partial.view(weight.shape).to(weight.dtype)
    return dstates, dweight
