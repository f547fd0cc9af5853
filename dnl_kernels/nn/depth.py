"""DenseSum: weighted sums over all earlier states of a network, with pulled gradients.

A history of states is a chain of autograd nodes x_0 <- x_1 <- .. <- x_l (`_Enter`), and a sum y_l hangs on its newest
link (`_Read`). A backward pass therefore meets every later sum before it meets state j, and the node of state j takes
its whole gradient in one read, dx_j = sum_{l >= j} w_{l,j} dy_l. The first link (`_Weights`) comes last; by then all
x_j and dy_l are known, and dw_{l,j} = <dy_l, x_j> is one product of matrices. On the CPU both directions read every
tensor once for several sums (lookahead.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._backend import check_backend
from .._checks import check_tensor, fail, shape
from ..ops.dense_sum.api import dense_sum
from . import lookahead

OP = "DenseSum"
TILE = 1 << 14  # elements of a state in one step of the weight gradient's product: all states' tiles fit in cache


class _Pass:
    """What one backward pass has met so far: dy_l by call, x_j by state."""

    def __init__(self) -> None:
        self.dy: dict[int, Tensor] = {}
        self.x: dict[int, Tensor] = {}
        self.ahead = lookahead.Lookahead(-1)


class _Passes:
    """The backward passes that run through a history now. Nothing outlives its pass."""

    def __init__(self) -> None:
        self.running: dict[int, _Pass] = {}

    def current(self) -> _Pass:
        task = torch._C._current_graph_task_id()
        if task not in self.running:
            self.running[task] = _Pass()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.running.__delitem__(task))
        return self.running[task]


class Pattern(NamedTuple):
    """Which states a call sees, and how a weight meets a state."""

    dilation: int
    period: int
    channel_dim: int
    backend: str | None

    def sees(self, call: int, state: int) -> bool:
        return state <= call and call % self.period == 0 and (call - state) % self.dilation == 0

    def looks_ahead(self, x: Tensor) -> bool:
        """With gaps between the states that a call sees, those of the next call are others."""
        return self.dilation == self.period == 1 and lookahead.applies(x, self.backend)

    def sum(self, tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
        return dense_sum(tensors, weight.to(tensors[0].dtype), channel_dim=self.channel_dim, backend=self.backend)


class _Weights(torch.autograd.Function):
    """weight -> the start of a chain. Its gradient is the one deferred product."""

    @staticmethod
    def forward(ctx, weight, passes, pattern):
        ctx.passes, ctx.pattern, ctx.shape, ctx.like = passes, pattern, weight.shape, weight.new_empty(0)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        found = ctx.passes.current()
        return _weight_gradient(found, ctx.shape, ctx.like, ctx.pattern), None, None


class _Enter(torch.autograd.Function):
    """(x_j, weight, link of x_{j-1}) -> link of x_j."""

    @staticmethod
    def forward(ctx, x, weight, link, passes, pattern, j):
        ctx.save_for_backward(x, weight)
        ctx.passes, ctx.pattern, ctx.j = passes, pattern, j
        return link.new_empty(0)

    @staticmethod
    def backward(ctx, dlink):
        x, weight = ctx.saved_tensors
        found, j = ctx.passes.current(), ctx.j
        found.x[j] = x
        dx = None
        if ctx.needs_input_grad[0]:
            calls = sorted(call for call in found.dy if ctx.pattern.sees(call, j))
            if calls and ctx.pattern.looks_ahead(x):
                dx = found.ahead.sum(
                    j, {call: found.dy[call] for call in calls}, weight,
                    lambda states, calls: weight[calls][:, states].transpose(0, 1), 0, ctx.pattern.channel_dim,
                )  # fmt: skip
            elif calls:
                dx = ctx.pattern.sum([found.dy[call] for call in calls], weight[calls, j])
        return dx, None, dlink, None, None, None


class _Read(torch.autograd.Function):
    """(y_l, link of x_l) -> y_l, whose gradient it leaves for the links."""

    @staticmethod
    def forward(ctx, y, link, passes, call):
        ctx.passes, ctx.call = passes, call
        ctx.like = link.new_empty(0)
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # no view to autograd: it may be changed in place

    @staticmethod
    def backward(ctx, dy):
        found = ctx.passes.current()
        found.dy[ctx.call] = found.dy[ctx.call] + dy if ctx.call in found.dy else dy
        return None, ctx.like, None, None


def _weight_gradient(found: _Pass, size: torch.Size, like: Tensor, pattern: Pattern) -> Tensor:
    """dw[l, j] = <dy_l, x_j>, per channel for [L, L, C]; tile by tile over the elements of a state."""
    calls, states = sorted(found.dy), sorted(found.x)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    dweight = like.new_zeros(size, dtype=wide)
    if not calls or not states:
        return dweight.to(like.dtype)

    def rows(tensors: list[Tensor]) -> list[Tensor]:
        """[elements], or [C, elements / C]."""
        if len(size) == 2:
            return [t.reshape(1, -1) for t in tensors]
        return [t.movedim(pattern.channel_dim, 0).flatten(1) for t in tensors]

    dys, xs = rows([found.dy[call] for call in calls]), rows([found.x[state] for state in states])
    product: Any = 0
    width = max(1, TILE // max(dys[0].shape[0], 1))
    for start in range(0, dys[0].shape[1], width):
        a, b = (torch.stack([t[:, start : start + width] for t in ts], 1).to(wide) for ts in (dys, xs))
        product = product + a @ b.mT  # [1 or C, calls, states]
    if isinstance(product, int):
        return dweight.to(like.dtype)
    product = product.movedim(0, -1)
    if len(size) == 2:
        product = product.squeeze(-1)
    for row, call in enumerate(calls):  # without an index on the device: that is a copy a CUDA graph cannot hold
        for first, last in _runs([pattern.sees(call, state) and state for state in states]):
            dweight[call, states[first] : states[last] + 1] = product[row, first : last + 1]
    return dweight.to(like.dtype)


def _runs(numbers: list[Any]) -> Iterator[tuple[int, int]]:
    """First and last place of each run of consecutive numbers in a list that has False for what is left out."""
    first = None
    for i, number in enumerate(numbers):
        if number is False:
            first = None
            continue
        first = i if first is None else first
        if i + 1 == len(numbers) or numbers[i + 1] is False or numbers[i + 1] != number + 1:
            yield first, i
            first = None


class History:
    """The states that a DenseSum weighs, in the order in which they were appended. Made by `DenseSum.history`."""

    def __init__(self, mix: DenseSum):
        self.states: list[Tensor] = []
        self._mix = mix
        self._passes = _Passes()
        self._link: Tensor | None = None
        self._ahead = lookahead.Lookahead(1)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, j):
        return self.states[j]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.states)

    def append(self, x: Tensor) -> None:
        """Stores the next state; it takes the dtype of the first one."""
        check_tensor(OP, "state", x)
        if self.states:
            if x.shape != self.states[0].shape:
                fail(OP, f"state {len(self)}", shape(x), f"{list(self.states[0].shape)}, as state 0")
            if x.device != self.states[0].device:
                fail(OP, f"state {len(self)}", f"on {x.device}", f"{self.states[0].device}, as state 0")
            x = x.to(self.states[0].dtype)
        if len(self) == self._mix.num_layers:
            fail(OP, f"state {len(self)}", "appended", f"at most num_layers = {self._mix.num_layers} states")
        self.states.append(x)
        if _chained():
            weight, pattern = self._mix.weight, self._mix.pattern
            if self._link is None:
                self._link = _Weights.apply(weight, self._passes, pattern)
            self._link = _Enter.apply(x, weight, self._link, self._passes, pattern, len(self) - 1)

    def _read(self) -> Tensor:
        call, mix = len(self) - 1, self._mix
        idle = call % mix.pattern.period  # returns the state itself, whose gradient takes the ordinary way
        if idle or self._link is None or not self._link.requires_grad or not _chained():
            return self._sum()
        with torch.no_grad():
            y = self._sum()
        return _Read.apply(y, self._link, self._passes, call)

    def _sum(self) -> Tensor:
        mix = self._mix
        if not mix.pattern.looks_ahead(self.states[0]):
            return mix.plain(self.states)
        weight, call = mix.weight, len(self) - 1
        return self._ahead.sum(
            call, dict(enumerate(self.states)), weight, lambda calls, states: weight[calls][:, states],
            mix.num_layers - 1, mix.pattern.channel_dim,
        )  # fmt: skip


def _chained() -> bool:
    """Whether sums are recorded as a chain; elsewhere the same sums are ordinary differentiable operators."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class DenseSum(nn.Module):
    """y_l = sum_{j <= l} w_{l,j} x_j for l = 0 .. L - 1: depth-weighted sums around any user's blocks.

        h = mix.history(x0)
        y = mix(h)          # call 0 weighs x_0
        h.append(block(y))
        y = mix(h)          # call 1 weighs x_0 and x_1

    A plain list of states works too: `mix([x0, x1, x2])` is call 2. The module has no state besides its weight; a
    history belongs to one forward pass. With a history, gradients are pulled: that of a state is one weighted read of
    the later dy, and all weight gradients are one product at the end.

    Args:
        num_layers: L, the number of calls, and of states.
        channels: None for one weight per pair (l, j), or C for one per pair and channel.
        dilation: call l weighs the states l, l - dilation, l - 2 dilation ..
        period: a call l that is no multiple of period returns state l as it is.
        channel_dim: the dimension of the states that C refers to.
        backend: of dense_sum.

    Attributes:
        weight: [L, L] or [L, L, C], lower triangular; what lies above the diagonal, or is left out by dilation and
            period, is never read and has zero gradient. It starts as the identity: call l returns state l.

    Raises:
        ValueError, TypeError: states of different shapes, more states than L, a number < 1.

    Source: DenseFormer's depth-weighted average (Pagliardini et al. 2024); DNL Def. 1 with scalar or diagonal K.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        channels: int | None = None,
        dilation: int = 1,
        period: int = 1,
        channel_dim: int = -1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"num_layers": num_layers, "channels": channels, "dilation": dilation, "period": period}
        for name, value in sizes.items():
            optional = name == "channels" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                fail(OP, name, repr(value), "an integer >= 1")
        check_backend(OP, backend)
        self.num_layers, self.channels = num_layers, channels
        self.pattern = Pattern(dilation, period, channel_dim, backend)
        size = (num_layers, num_layers) if channels is None else (num_layers, num_layers, channels)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity."""
        eye = torch.eye(self.num_layers, device=self.weight.device, dtype=self.weight.dtype)
        self.weight.copy_(eye if self.channels is None else eye[..., None].expand_as(self.weight))

    def history(self, x0: Tensor) -> History:
        """A history whose state 0 is x0."""
        history = History(self)
        history.append(x0)
        return history

    def forward(self, states: History | Sequence[Tensor]) -> Tensor:
        """The sum over the states stored so far; number l = len(states) - 1."""
        if isinstance(states, History):
            return states._read()
        return self.plain(states)

    def plain(self, states: Sequence[Tensor]) -> Tensor:
        """The same sum as an ordinary differentiable operator."""
        call = len(states) - 1
        if not 0 <= call < self.num_layers:
            fail(OP, "states", f"of length {len(states)}", f"1 to num_layers = {self.num_layers} states")
        if call % self.pattern.period:
            return states[call]
        seen = [j for j in range(call + 1) if self.pattern.sees(call, j)]
        return self.pattern.sum([states[j] for j in seen], self.weight[call, seen])

    def extra_repr(self) -> str:
        text = f"{self.num_layers}" + ("" if self.channels is None else f", channels={self.channels}")
        return text + f", dilation={self.pattern.dilation}, period={self.pattern.period}"
