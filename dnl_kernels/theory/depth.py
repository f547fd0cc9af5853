"""Two-time curves K(t, s) on the triangle 0 <= s <= t <= 1, and the sums over earlier states that they define.

Every kernel gives a *history*: `push` the states x_0, x_1, ... in order, then `total(i)` is sum_j K(t_i, t_j) x_j over
everything pushed. A general kernel needs O(i) work per total; the structured kernels of `structured` need less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ._checks import check_finite, check_grid, check_tensor
from .grids import working_dtype

BLOCK = 1 << 22  # elements of a kernel evaluated at once; bounds the temporary memory of the dense sums


class History(Protocol):
    """What the solvers ask of a kernel: O(states so far) for a general one, O(1) or O(log^2) for a structured one."""

    def push(self, state: Tensor) -> None: ...

    def total(self, row: int) -> Tensor: ...


class DepthKernel:
    """A curve of matrices K(t, s) [d, d] or vectors b(t, s) [d] for 0 <= s <= t <= 1.

    Subclasses implement `evaluate(t, s)` for broadcastable t, s, returning [..., *value_shape].
    """

    value_shape: tuple[int, ...] = ()

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """K at (max(t, s), min(t, s)): the symmetric function on the square that eq. (8) asks for."""
        return self.evaluate(torch.maximum(t, s), torch.minimum(t, s))

    def history(self, times: Tensor) -> History:
        """The accumulator over the grid `times` [m]."""
        return DenseHistory(self, times)

    def row_sums(self, times: Tensor) -> Tensor:
        """S_i = sum_{j <= i} b(t_i, t_j) for all grid points: [m, *value_shape]."""
        m = times.numel()
        size = 1
        for n in self.value_shape:
            size *= n
        rows = max(1, BLOCK // (m * size))
        out = []
        for first in range(0, m, rows):
            last = min(first + rows, m)
            i, j = torch.meshgrid(torch.arange(first, last), torch.arange(last), indexing="ij")
            lower = j <= i
            values = self.evaluate(times[i[lower]], times[j[lower]])
            sums = values.new_zeros(last - first, *values.shape[1:])
            out.append(sums.index_add(0, (i[lower] - first).to(values.device), values))
        return torch.cat(out)


class CallableKernel(DepthKernel):
    """A kernel from any function of (t, s), vectorised over broadcastable tensors and written in torch.

    Args:
        function: (t, s) -> [..., *value_shape]; called with s <= t only.
        value_shape: [d, d] for K, [d] for b.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], value_shape: tuple[int, ...]):
        self.function = function
        self.value_shape = tuple(value_shape)

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(t, s)
        return self.function(t, s)


class WeaklySingularKernel(DepthKernel):
    """K(t, s) = (t - s)^(-alpha) H(t, s), 0 <= alpha < 1: Abel's kernels, fractional orders.

    For `solve_integral_equation`, which integrates the singular factor exactly. It has no value at s = t, so the sums
    of eq. (1) do not exist for it, and `forward` refuses it.

    Args:
        function: H, (t, s) -> [..., *value_shape], smooth.
        alpha: the exponent.
        value_shape: [d, d] for K.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], alpha: float, value_shape: tuple[int, ...]):
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
        self.smooth = CallableKernel(function, value_shape)
        self.alpha, self.value_shape = float(alpha), self.smooth.value_shape

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(t, s)
        factor = (t - s) ** -self.alpha
        return factor.reshape(*t.shape, *[1] * len(self.value_shape)) * self.smooth.evaluate(t, s)

    def history(self, times: Tensor) -> History:
        raise ValueError("the curve K is weakly singular: eq. (1) would need K(t, t); use solve_integral_equation")


class SampledKernel(DepthKernel):
    """Bilinear interpolation of values on a grid of the triangle.

    Args:
        times: [m] strictly increasing from 0 to 1.
        values: [m, m, *value_shape]; only the lower triangle values[i, j], j <= i, is read (Def. 2 fills the rest).
    """

    def __init__(self, times: Tensor, values: Tensor):
        check_grid("times", times)
        check_tensor("values", values)
        m = times.numel()
        if values.ndim < 3 or values.shape[0] != m or values.shape[1] != m:
            raise ValueError(f"values must have shape [{m}, {m}, ...] for {m} times, got {list(values.shape)}")
        lower = torch.ones(m, m, dtype=torch.bool, device=values.device).tril()
        shaped = lower.reshape(m, m, *([1] * (values.ndim - 2)))
        self.times = times
        self.values = torch.where(shaped, values, values.transpose(0, 1))
        check_finite("values", self.values)
        self.value_shape = tuple(values.shape[2:])

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(t, s)
        values, trailing = self.values.to(t.device, working_dtype(t.dtype)), [1] * len(self.value_shape)
        i, lam = locate_between(self.times, t)
        j, mu = locate_between(self.times, s)
        lam, mu = lam.reshape(*lam.shape, *trailing), mu.reshape(*mu.shape, *trailing)
        top = (1 - mu) * values[i, j] + mu * values[i, j + 1]
        bottom = (1 - mu) * values[i + 1, j] + mu * values[i + 1, j + 1]
        return ((1 - lam) * top + lam * bottom).to(t.dtype)


def locate_between(grid: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The cell index and the local coordinate in [0, 1] of each t on any grid, found in float64 whatever t's dtype."""
    grid, wide = grid.to(t.device, torch.float64), t.double()
    index = (torch.searchsorted(grid, wide.detach().contiguous(), right=True) - 1).clamp(0, grid.numel() - 2)
    local = (wide - grid[index]) / (grid[index + 1] - grid[index])
    return index, local.to(working_dtype(t.dtype))


class TriangleHistory:
    """sum_{j <= i} K_{ij} x_j with all K_{ij} read: O(i) work per total.

    Without gradients row i is contracted with the states when it is asked for. With gradients every state is instead
    multiplied by its column of K as it arrives and added to the rows ahead: the graph then has O(1) nodes per state and
    saves each state once, where rows would save a copy of all earlier states per row.

    Subclasses give `row(i, first, last)`, K_{ij} for first <= j < last, and `column(j)`, K_{ij} for i = j .. rows - 1.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self.states = StateBuffer(rows)
        self.head: Tensor | None = None  # the sums [d, B] of the row of the newest state ..
        self.tail: Tensor | None = None  # .. and [m, d, B] of those after it

    def row(self, row: int, first: int, last: int) -> Tensor:
        raise NotImplementedError

    def column(self, column: int) -> Tensor:
        raise NotImplementedError

    def push(self, state: Tensor) -> None:
        self.states.append(state)
        if self.head is not None:
            self._add(len(self.states) - 1)
        elif state.requires_grad and torch.is_grad_enabled():
            for column in range(len(self.states)):
                self._add(column)

    def _add(self, column: int) -> None:
        state, matrices = self.states.list[column], self.column(column)
        m, d, _ = matrices.shape
        sums = (matrices.reshape(m * d, d) @ state.transpose(0, 1)).reshape(m, d, state.shape[0])
        sums = sums if self.tail is None else self.tail + sums
        head, self.tail = sums.split([1, m - 1])
        self.head = head[0]

    def total(self, row: int) -> Tensor:
        count = len(self.states)
        if self.head is not None and self.tail is not None:
            sums = self.head if row == count - 1 else self.tail[row - count]
            return sums.transpose(0, 1)
        states = self.states.stacked()
        chunk = max(1, BLOCK // states.shape[2] ** 2)
        parts = []
        for first in range(0, count, chunk):
            last = min(first + chunk, count)
            parts.append(contract(self.row(row, first, last), states[first:last]))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class DenseHistory(TriangleHistory):
    """`TriangleHistory` with K evaluated as it is needed: no memory for K without gradients."""

    def __init__(self, kernel: DepthKernel, times: Tensor):
        super().__init__(times.numel())
        self.kernel, self.times = kernel, times

    def row(self, row: int, first: int, last: int) -> Tensor:
        return self.kernel.evaluate(self.times[row].expand(last - first), self.times[first:last])

    def column(self, column: int) -> Tensor:
        return self.kernel.evaluate(self.times[column:], self.times[column].expand(self.rows - column))


def contract(matrices: Tensor, states: Tensor) -> Tensor:
    """sum_j K_j x_j for K [m, d, d] and x [m, B, d], as one matrix product."""
    m, batch, d = states.shape
    if batch == 1:
        return torch.matmul(matrices, states.transpose(1, 2)).sum(0).transpose(0, 1)
    return states.transpose(0, 1).reshape(batch, m * d) @ matrices.transpose(1, 2).reshape(m * d, -1)


class StateBuffer:
    """The states pushed so far as one tensor [m, B, d]; written in place where no gradient is recorded."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.list: list[Tensor] = []
        self.buffer: Tensor | None = None
        self.filled = 0

    def __len__(self) -> int:
        return len(self.list)

    def append(self, state: Tensor) -> None:
        self.list.append(state)

    def stacked(self, first: int = 0, last: int | None = None) -> Tensor:
        last = len(self.list) if last is None else last
        if self.list[-1].requires_grad:
            return torch.stack(self.list[first:last])
        if self.buffer is None:
            self.buffer = self.list[0].new_empty(self.capacity, *self.list[0].shape)
        while self.filled < len(self.list):
            self.buffer[self.filled] = self.list[self.filled]
            self.filled += 1
        return self.buffer[first:last]
