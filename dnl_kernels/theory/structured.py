"""Depth kernels whose history sums cost less than O(L^2): separable, sums of exponentials, Toeplitz.

All are exact: they reorder the dense recursion's sum and change it by rounding only. Section 16 of the specification;
an extension beyond the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_tensor
from .depth import DepthKernel, History, StateBuffer
from .grids import check_uniform

NEAR = 512  # Toeplitz: states summed by products; below it an FFT is slower
STRIDE = 16  # Toeplitz: rows that share one product over the earlier states of their NEAR
FAN_OUT = 32  # Toeplitz: each level's blocks are this many times longer than the level's below


class SeparableKernel(DepthKernel):
    """K(t, s) = sum_{m, q} f_m(t) g_q(s) C_{mq}: O(1) per total, O(L) per solve.

    Args:
        left: f, t [...] -> [..., M].
        right: g, s [...] -> [..., Q].
        coefficients: C, [M, Q, *value_shape] with value_shape [d, d] for K or [d] for b.
    """

    def __init__(self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor], coefficients: Tensor):
        check_tensor("coefficients", coefficients)
        if coefficients.ndim not in (3, 4):
            raise ValueError(f"coefficients must have shape [M, Q, d] or [M, Q, d, d], got {list(coefficients.shape)}")
        self.left, self.right, self.coefficients = left, right, coefficients
        self.value_shape = tuple(coefficients.shape[2:])

    @classmethod
    def of_rank(cls, left: Callable, right: Callable, matrices: Tensor) -> SeparableKernel:
        """K(t, s) = sum_r f_r(t) g_r(s) M_r from M [r, d, d] or [r, d]."""
        check_tensor("matrices", matrices)
        eye = torch.eye(matrices.shape[0], dtype=matrices.dtype, device=matrices.device)
        return cls(left, right, eye.reshape(*eye.shape, *([1] * (matrices.ndim - 1))) * matrices)

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        t, s = torch.broadcast_tensors(t, s)
        c = self.coefficients.to(t)
        factors = self.left(t)[..., :, None] * self.right(s)[..., None, :]
        return (factors.flatten(-2) @ c.reshape(c.shape[0] * c.shape[1], -1)).reshape(*t.shape, *self.value_shape)

    def history(self, times: Tensor) -> History:
        return _SeparableHistory(self, times)

    def row_sums(self, times: Tensor) -> Tensor:
        sums = torch.cumsum(self.right(times), 0)
        c = self.coefficients.to(times)
        return (self.left(times)[:, :, None] * sums[:, None, :]).flatten(1) @ c.reshape(-1, *self.value_shape).flatten(
            1
        )


class _SeparableHistory:
    """Z_q = sum_j g_q(t_j) x_j; K's row sum is then sum_q (sum_m f_m(t_i) C_mq) Z_q."""

    def __init__(self, kernel: SeparableKernel, times: Tensor):
        self.left, self.right = kernel.left(times).unbind(), kernel.right(times).unbind()
        c = kernel.coefficients.to(times)
        self.modes, self.rank, d, _ = c.shape
        self.flat = c.transpose(2, 3).reshape(self.modes, self.rank * d * d)
        self.sums = times.new_zeros(())
        self.count = 0

    def push(self, state: Tensor) -> None:
        self.sums = self.sums + self.right[self.count][:, None, None] * state
        self.count += 1

    def total(self, row: int) -> Tensor:
        rank, batch, d = self.sums.shape
        matrix = (self.left[row] @ self.flat).reshape(rank * d, d)
        return self.sums.transpose(0, 1).reshape(batch, rank * d) @ matrix


class ToeplitzKernel(DepthKernel):
    """K(t, s) = sum_r k_r(t - s) M_r by online FFT blocks: O(L log^2 L) per solve.

    Args:
        profile: k, lag [...] -> [..., R], for lags in [0, 1].
        matrices: M, [R, d, d] for K or [R, d] for b.
    """

    def __init__(self, profile: Callable[[Tensor], Tensor], matrices: Tensor):
        check_tensor("matrices", matrices)
        if matrices.ndim not in (2, 3):
            raise ValueError(f"matrices must have shape [R, d] or [R, d, d], got {list(matrices.shape)}")
        self.profile, self.matrices = profile, matrices
        self.value_shape = tuple(matrices.shape[1:])

    def evaluate(self, t: Tensor, s: Tensor) -> Tensor:
        weights = self.profile(t - s)
        matrices = self.matrices.to(weights)
        return (weights @ matrices.flatten(1)).reshape(*weights.shape[:-1], *self.value_shape)

    def history(self, times: Tensor) -> History:
        return _ToeplitzHistory(self, times)

    def row_sums(self, times: Tensor) -> Tensor:
        # On a uniform grid sum_{j <= i} k(t_i - t_j) is the running sum of k over the lags.
        return torch.cumsum(self.evaluate(times, torch.zeros_like(times)), 0)


class ExponentialSumKernel(ToeplitzKernel):
    """K(t, s) = sum_r exp(-rate_r (t - s)) M_r: O(1) per total with decaying sums, stable for any rate >= 0.

    Args:
        rates: [R], non-negative.
        matrices: [R, d, d] for K or [R, d] for b.
    """

    def __init__(self, rates: Tensor, matrices: Tensor):
        check_tensor("rates", rates)
        if rates.ndim != 1 or rates.numel() != matrices.shape[0]:
            raise ValueError(f"rates must have shape [{matrices.shape[0]}] like matrices, got {list(rates.shape)}")
        if bool((rates < 0).any()):
            raise ValueError(f"rates must be >= 0, got {rates.min().item()}")
        self.rates = rates
        super().__init__(lambda lag: torch.exp(-self.rates.to(lag) * lag[..., None]), matrices)

    def history(self, times: Tensor) -> History:
        return _ExponentialHistory(self, times)


class _ExponentialHistory:
    """Z_r(t_i) = sum_j exp(-rate_r (t_i - t_j)) x_j, carried from one grid point to the next by its decay."""

    def __init__(self, kernel: ExponentialSumKernel, times: Tensor):
        gaps = torch.diff(times, prepend=times[:1])
        self.decay = torch.exp(-kernel.rates.to(times) * gaps[:, None]).unbind()
        matrices = kernel.matrices.to(times)
        self.mix = matrices.transpose(1, 2).reshape(-1, matrices.shape[1])
        self.sums = times.new_zeros(())
        self.count = 0

    def push(self, state: Tensor) -> None:
        self.sums = self.decay[self.count][:, None, None] * self.sums + state
        self.count += 1

    def total(self, row: int) -> Tensor:
        sums = self.sums
        for step in range(self.count, row + 1):  # at most one step: the trapezoid asks one row ahead of its states
            sums = self.decay[step][:, None, None] * sums
        rank, batch, d = sums.shape
        return sums.transpose(0, 1).reshape(batch, rank * d) @ self.mix


class _ToeplitzHistory:
    """Relaxed (online) convolution.

    Level v cuts the rows into blocks of B_v = NEAR * FAN_OUT^v. When a row block begins, the completed blocks of the
    same parent are already known, and their contribution to the whole row block is a sum of circular convolutions of
    length 2 B_v; each state is transformed once per level. The newest states, below NEAR, are summed by one product
    per STRIDE rows, and the last of them, below STRIDE, by one per row.
    """

    def __init__(self, kernel: ToeplitzKernel, times: Tensor):
        check_uniform("times", times)
        weights = kernel.profile(times - times[0])  # [m, R], by lag
        self.near = _Near(weights)
        matrices = kernel.matrices.to(times)
        self.mix = matrices.transpose(1, 2).reshape(-1, matrices.shape[1])
        self.states = StateBuffer(times.numel())
        self.levels = [_Level(NEAR * FAN_OUT**v, weights) for v in range(_depth(times.numel()))]
        self.block = -1
        self.rows: Tensor | None = None  # of the current STRIDE, from all states before it

    def push(self, state: Tensor) -> None:
        self.states.append(state)

    def total(self, row: int) -> Tensor:
        if row // STRIDE != self.block:
            self.block = row // STRIDE
            first = row - row % STRIDE
            levels: list[_Near | _Level] = [self.near, *self.levels]
            parts = [rows for level in levels if (rows := level.far(first, self.states)) is not None]
            self.rows = sum(parts[1:], start=parts[0]) if parts else None
        newest = self.near.newest(row, self.states)
        earlier = None if self.rows is None else self.rows[row % STRIDE]
        sums = earlier if newest is None else newest if earlier is None else earlier + newest  # [R, B, d]
        assert sums is not None  # the first state is known before any total is asked for
        rank, batch, d = sums.shape
        return sums.transpose(0, 1).reshape(batch, rank * d) @ self.mix


def _depth(count: int) -> int:
    levels, size = 0, NEAR
    while size < count:
        levels, size = levels + 1, size * FAN_OUT
    return levels


class _Near:
    """The states of the row's NEAR: those before its STRIDE for all rows of it at once, the others row by row."""

    def __init__(self, weights: Tensor):
        # By offset o of a STRIDE in its NEAR: k at lag o + i - j for rows i and states j < o, [STRIDE * R, o].
        self.rank, self.reversed = weights.shape[1], weights.flip(0).transpose(0, 1).contiguous()
        row = torch.arange(STRIDE, device=weights.device)[:, None]
        lags = [o + row - torch.arange(o, device=weights.device) for o in range(0, NEAR, STRIDE)]
        last = weights.shape[0] - 1  # rows beyond the last are computed with any weight and never asked for
        self.products = [weights[lag.clamp_max(last)].transpose(1, 2).flatten(0, 1) for lag in lags]

    def far(self, row: int, states: StateBuffer) -> Tensor | None:
        """For all rows of the STRIDE that begins with this one, from the states of its NEAR before it."""
        if not (offset := row % NEAR):
            return None
        known = states.stacked(row - offset, row)
        product = self.products[offset // STRIDE] @ known.flatten(1)
        return product.reshape(STRIDE, self.rank, *known.shape[1:])

    def newest(self, row: int, states: StateBuffer) -> Tensor | None:
        first, known = row - row % STRIDE, len(states)
        if known == first:
            return None
        newest = states.stacked(first, known)
        lag = self.reversed.shape[1] - 1 - row  # the column of lag row - j is this plus j
        weights = self.reversed[:, lag + first : lag + known]
        return (weights @ newest.flatten(1)).reshape(self.rank, *newest.shape[1:])


class _Level:
    """One block length: spectra of the kernel's segments and of the states' blocks inside the current parent.

    Frequencies lead, so that a row block's sum over the earlier blocks is one batched product [R, n] x [n, B d].
    """

    def __init__(self, size: int, weights: Tensor):
        self.size = size
        segments = [
            torch.fft.rfft(weights[(distance - 1) * size : (distance + 1) * size], n=2 * size, dim=0)
            for distance in range(1, min(FAN_OUT, -(-weights.shape[0] // size)))
        ]
        # [F, R, distances], the largest distance first: its last n columns belong to n blocks in their order.
        self.kernels = torch.stack(segments[::-1], 2) if segments else None
        self.capacity = len(segments)  # the last block of a parent is nobody's past in it
        self.block = self.parent = -1
        self.spectra: list[Tensor] = []
        self.buffer: Tensor | None = None
        self.rows: Tensor | None = None

    def far(self, row: int, states: StateBuffer) -> Tensor | None:
        block = row // self.size
        if block != self.block:
            self._begin(block, states)
        return None if self.rows is None else self.rows[row % self.size :][:STRIDE]

    def _begin(self, block: int, states: StateBuffer) -> None:
        self.block, parent = block, block // FAN_OUT
        first = parent * FAN_OUT
        if parent != self.parent:
            self.parent, self.spectra = parent, []
        shape = states.list[-1].shape
        for other in range(first + len(self.spectra), block):
            piece = states.stacked(other * self.size, (other + 1) * self.size)
            self._append(torch.fft.rfft(piece.flatten(1), n=2 * self.size, dim=0))
        count = len(self.spectra)
        if not count or self.kernels is None:
            self.rows = None
            return
        known = torch.stack(self.spectra, 1) if self.buffer is None else self.buffer[:, :count]
        total = torch.bmm(self.kernels[..., -count:], known)
        values = torch.fft.irfft(total, n=2 * self.size, dim=0)[self.size :]
        self.rows = values.reshape(self.size, -1, *shape)

    def _append(self, spectrum: Tensor) -> None:
        """Spectra [F, B d] side by side; in place where no gradient is recorded."""
        if spectrum.requires_grad:
            self.buffer = None
            self.spectra.append(spectrum)
            return
        if self.buffer is None:
            self.buffer = spectrum.new_empty(spectrum.shape[0], self.capacity, spectrum.shape[1])
        index = len(self.spectra)
        self.buffer[:, index] = spectrum
        self.spectra.append(self.buffer[:, index])
