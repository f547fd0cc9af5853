"""Certified suprema of curves: interval arithmetic with interval derivatives, and branch and bound over the domain.

A curve written in torch is called with an `Interval` in place of t: what it returns encloses all its values on each
cell, and so do the derivatives that are carried along. A maximum over points is a lower bound of a supremum; this is an
upper one. Arithmetic is float64 without directed rounding, so "certified" means up to a few units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CLOSE = 1e-3  # branch and bound stops at this relative gap between the largest value seen and the bound
CELLS = 4096  # of one round; beyond it the bound is as good as it is
ROUNDS = 24


class NotEnclosed(ValueError):
    """The curve uses an operation that has no interval form here."""


class Interval:
    """Entrywise enclosure lo <= f <= hi, and the same for the partial derivatives of f in the seed variables."""

    def __init__(self, lo: Tensor, hi: Tensor, slopes: Sequence[Interval] = ()):
        self.lo, self.hi, self.slopes = lo, hi, tuple(slopes)

    shape = property(lambda self: self.lo.shape)
    ndim = property(lambda self: self.lo.ndim)
    dtype = property(lambda self: self.lo.dtype)
    device = property(lambda self: self.lo.device)
    requires_grad = False

    @property
    def middle(self) -> Tensor:
        return (self.lo + self.hi) / 2

    @property
    def radius(self) -> Tensor:
        return (self.hi - self.lo) / 2

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if not (name == "out" and value is None)}
        try:
            return _lookup(func.__name__)(*args, **given)
        except TypeError as error:
            raise NotEnclosed(f"it uses {func.__name__!r} in a form that has no interval form here: {error}") from error

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        operation = _lookup(name)
        return lambda *args, **kwargs: operation(self, *args, **kwargs)

    def __getitem__(self, index: Any) -> Interval:
        return _linear(lambda z: z[index], self)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo, [-slope for slope in self.slopes])

    def __add__(self, other: Any) -> Interval:
        return _add(self, other)

    def __sub__(self, other: Any) -> Interval:
        return _add(self, -other)

    def __rsub__(self, other: Any) -> Interval:
        return _add(-self, other)

    def __mul__(self, other: Any) -> Interval:
        return _multiply(self, other)

    def __truediv__(self, other: Any) -> Interval:
        return _multiply(self, _reciprocal(other) if isinstance(other, Interval) else 1 / other)

    def __rtruediv__(self, other: Any) -> Interval:
        return _multiply(_reciprocal(self), other)

    def __pow__(self, exponent: Any) -> Interval:
        return _power(self, exponent)

    def __matmul__(self, other: Any) -> Interval:
        return _bilinear(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Interval:
        return _bilinear(torch.matmul, other, self)

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> Interval:
        return _absolute(self)

    def _refuse(self, *_: Any) -> Any:
        raise NotEnclosed("it compares its argument, which has no interval form")

    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = _refuse


def _as_interval(value: Any, like: Interval) -> Interval:
    if isinstance(value, Interval):
        return value
    constant = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return Interval(constant, constant)


def _pair(a: Any, b: Any) -> tuple[Interval, Interval]:
    like = a if isinstance(a, Interval) else b
    return _as_interval(a, like), _as_interval(b, like)


def _slopes(a: Interval, b: Interval, rule: Callable[[Interval | None, Interval | None], Interval]) -> list[Interval]:
    count = max(len(a.slopes), len(b.slopes))
    return [rule(a.slopes[i] if a.slopes else None, b.slopes[i] if b.slopes else None) for i in range(count)]


def _plain(a: Interval) -> Interval:
    return Interval(a.lo, a.hi)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Interval:
    a, b = _pair(a, b if alpha == 1 else alpha * b)
    lo, hi = a.lo + b.lo, a.hi + b.hi

    def rule(da: Interval | None, db: Interval | None) -> Interval:
        if da is None or db is None:
            one = da if db is None else db
            assert one is not None
            return Interval(one.lo.expand(lo.shape), one.hi.expand(lo.shape))
        return _add(da, db)

    return Interval(lo, hi, _slopes(a, b, rule))


def _multiply(a: Any, b: Any) -> Interval:
    a, b = _pair(a, b)
    corners = torch.stack(torch.broadcast_tensors(a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi)).nan_to_num(
        nan=0.0,
        posinf=math.inf,
        neginf=-math.inf,  # 0 * inf: the limit of 0 times something finite
    )

    def rule(da: Interval | None, db: Interval | None) -> Interval:
        parts = [] if da is None else [_multiply(da, _plain(b))]
        parts += [] if db is None else [_multiply(_plain(a), db)]
        return parts[0] if len(parts) == 1 else _add(*parts)

    return Interval(corners.amin(0), corners.amax(0), _slopes(a, b, rule))


def _bilinear(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Interval:
    """A bilinear map such as a matrix product, in midpoints and radii."""
    a, b = _pair(a, b)
    ma, ra, mb, rb = a.middle, a.radius, b.middle, b.radius
    middle = function(ma, mb)
    radius = function(ma.abs(), rb) + function(ra, mb.abs()) + function(ra, rb)

    def rule(da: Interval | None, db: Interval | None) -> Interval:
        parts = [] if da is None else [_bilinear(function, da, _plain(b))]
        parts += [] if db is None else [_bilinear(function, _plain(a), db)]
        return parts[0] if len(parts) == 1 else _add(*parts)

    return Interval(middle - radius, middle + radius, _slopes(a, b, rule))


def _linear(function: Callable[[Tensor], Tensor], a: Interval) -> Interval:
    """A map that moves, copies or adds entries: the same for both bounds and the derivatives."""
    return Interval(function(a.lo), function(a.hi), [_linear(function, slope) for slope in a.slopes])


def _chain(a: Interval, lo: Tensor, hi: Tensor, derivative: Callable[[Interval], Interval]) -> Interval:
    inner = derivative(_plain(a)) if a.slopes else None
    return Interval(lo, hi, [_multiply(inner, slope) for slope in a.slopes])


def _increasing(
    function: Callable[[Tensor], Tensor], derivative: Callable[[Interval], Interval], least: float = -math.inf
) -> Callable[[Interval], Interval]:
    """An increasing function on [least, inf); the part of an interval below `least` is outside the curve's domain."""

    def operation(a: Interval) -> Interval:
        inside = Interval(a.lo.clamp_min(least), a.hi.clamp_min(least), a.slopes)
        return _chain(inside, function(inside.lo), function(inside.hi), derivative)

    return operation


def _cosine(a: Interval) -> Interval:
    def reaches(peak: float) -> Tensor:
        return ((a.hi - peak) / (2 * math.pi) + 1e-12).floor() >= ((a.lo - peak) / (2 * math.pi) - 1e-12).ceil()

    ends = torch.cos(a.lo), torch.cos(a.hi)
    lo = torch.where(reaches(math.pi), -torch.ones_like(a.lo), torch.minimum(*ends))
    hi = torch.where(reaches(0.0), torch.ones_like(a.lo), torch.maximum(*ends))
    return _chain(a, lo, hi, lambda z: -_sine(z))


def _sine(a: Interval) -> Interval:
    return _cosine(a - math.pi / 2)


def _absolute(a: Interval) -> Interval:
    ends = a.lo.abs(), a.hi.abs()
    inside = (a.lo < 0) & (a.hi > 0)
    lo = torch.where(inside, torch.zeros_like(a.lo), torch.minimum(*ends))
    return _chain(a, lo, torch.maximum(*ends), lambda z: Interval(_sign(z.lo, -1.0), _sign(z.hi, 1.0)))


def _sign(z: Tensor, at_zero: float) -> Tensor:
    return torch.where(z == 0, torch.full_like(z, at_zero), z.sign())


def _square(a: Interval) -> Interval:
    size = _absolute(_plain(a))
    return _chain(a, size.lo**2, size.hi**2, lambda z: 2 * z)


def _reciprocal(a: Interval) -> Interval:
    pole = (a.lo <= 0) & (a.hi >= 0)
    infinite = torch.full_like(a.lo, math.inf)
    lo = torch.where(pole, -infinite, 1 / a.hi)
    return _chain(a, lo, torch.where(pole, infinite, 1 / a.lo), lambda z: -_square(_reciprocal(z)))


def _power(a: Any, exponent: Any) -> Interval:
    if isinstance(exponent, Interval) or (isinstance(exponent, Tensor) and exponent.numel() > 1):
        if isinstance(a, Interval):
            raise NotEnclosed("it raises a curve to the power of a curve")
        return _exp(_multiply(exponent, math.log(float(a))))
    exponent = float(exponent)
    if exponent == 0:
        return _linear(torch.ones_like, _plain(a))
    if exponent == 1:
        return a
    if exponent == 2:
        return _square(a)
    if exponent < 0:
        return _reciprocal(_power(a, -exponent))
    if exponent == int(exponent):
        if exponent % 2 == 0:
            size = _absolute(_plain(a))
            lo, hi = size.lo**exponent, size.hi**exponent
        else:
            lo, hi = a.lo**exponent, a.hi**exponent
        return _chain(a, lo, hi, lambda z: exponent * _power(z, exponent - 1))
    root = _increasing(lambda z: z**exponent, lambda z: exponent * _power(z, exponent - 1), 0.0)
    return root(a)


_exp: Callable[[Interval], Interval] = _increasing(torch.exp, lambda z: _exp(z))  # noqa: PLW0108 - itself
_tanh: Callable[[Interval], Interval] = _increasing(torch.tanh, lambda z: 1 - _square(_tanh(z)))
_sigmoid: Callable[[Interval], Interval] = _increasing(torch.sigmoid, lambda z: _multiply(_sigmoid(z), _sigmoid(-z)))
_relu = _increasing(torch.relu, lambda z: Interval((z.lo > 0).to(z.lo), (z.hi > 0).to(z.lo)))
_sinh = _increasing(torch.sinh, lambda z: _cosh(z))  # noqa: PLW0108 - defined below


def _cosh(a: Interval) -> Interval:
    size = _absolute(_plain(a))
    return _chain(a, torch.cosh(size.lo), torch.cosh(size.hi), _sinh)


def _stack(tensors: Sequence[Any], dim: int = 0, *, join: Callable = torch.stack) -> Interval:
    like = next(z for z in tensors if isinstance(z, Interval))
    parts = [_as_interval(z, like) for z in tensors]
    count = max(len(z.slopes) for z in parts)
    zero = [Interval(torch.zeros_like(z.lo), torch.zeros_like(z.lo)) for z in parts]
    slopes = [
        _stack([z.slopes[i] if z.slopes else none for z, none in zip(parts, zero, strict=True)], dim, join=join)
        for i in range(count)
    ]
    return Interval(join([z.lo for z in parts], dim), join([z.hi for z in parts], dim), slopes)


def _extreme(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Interval:
    """maximum or minimum: the derivative is that of one of the two."""
    a, b = _pair(a, b)
    lo = function(a.lo, b.lo)

    def rule(da: Interval | None, db: Interval | None) -> Interval:
        zero = Interval(torch.zeros_like(lo), torch.zeros_like(lo))
        first, second = da or zero, db or zero
        return Interval(torch.minimum(first.lo, second.lo), torch.maximum(first.hi, second.hi))

    return Interval(lo, function(a.hi, b.hi), _slopes(a, b, rule))


def _tensordot(a: Any, b: Any, dims: Any = 2) -> Interval:
    return _bilinear(lambda x, y: torch.tensordot(x, y, dims), a, b)


def _einsum(equation: str, *operands: Any) -> Interval:
    if len(operands) != 2:
        raise NotEnclosed("it uses einsum of other than two operands")
    return _bilinear(lambda x, y: torch.einsum(equation, x, y), *operands)


def _convert(value: Any, *_: Any, **__: Any) -> Any:
    """`to` in either direction: everything is float64 on one device here."""
    return value if isinstance(value, Interval) else value.double()


def _broadcast(*values: Any) -> list[Interval]:
    shape = torch.broadcast_shapes(*(z.shape for z in values))
    like = next(z for z in values if isinstance(z, Interval))
    return [_linear(lambda z: z.expand(shape), _as_interval(z, like)) for z in values]


def _filled(value: float) -> Callable:
    return lambda a, *_, **__: torch.full(a.shape, value, dtype=torch.float64, device=a.device)


OPERATIONS: dict[str, Callable] = {
    "add": _add, "__add__": _add, "__radd__": _add, "sub": lambda a, b: _add(a, -b),
    "__sub__": lambda a, b: _add(a, -b), "__rsub__": lambda a, b: _add(b, -a), "rsub": lambda a, b: _add(b, -a),
    "mul": _multiply, "__mul__": _multiply, "__rmul__": _multiply, "multiply": _multiply,
    "div": lambda a, b: _multiply(a, _reciprocal(b) if isinstance(b, Interval) else 1 / b),
    "reciprocal": _reciprocal, "__rdiv__": lambda a, b: _multiply(_reciprocal(a), b),
    "pow": _power, "__pow__": _power, "__rpow__": lambda a, b: _power(b, a), "square": _square, "neg": lambda a: -a,
    "exp": _exp, "tanh": _tanh, "sigmoid": _sigmoid, "relu": _relu, "sinh": _sinh, "cosh": _cosh,
    "sin": _sine, "cos": _cosine, "abs": _absolute, "absolute": _absolute,
    "sqrt": lambda a: _power(a, 0.5),
    "log": _increasing(torch.log, _reciprocal, 0.0),
    "log1p": _increasing(torch.log1p, lambda z: _reciprocal(1 + z), -1.0),
    "expm1": _increasing(torch.expm1, _exp), "atan": _increasing(torch.atan, lambda z: _reciprocal(1 + _square(z))),
    "softplus": _increasing(torch.nn.functional.softplus, _sigmoid),
    "maximum": lambda a, b: _extreme(torch.maximum, a, b), "minimum": lambda a, b: _extreme(torch.minimum, a, b),
    "matmul": lambda a, b: _bilinear(torch.matmul, a, b), "__matmul__": lambda a, b: _bilinear(torch.matmul, a, b),
    "__rmatmul__": lambda a, b: _bilinear(torch.matmul, b, a), "tensordot": _tensordot, "einsum": _einsum,
    "stack": _stack, "cat": lambda z, dim=0: _stack(z, dim, join=torch.cat), "broadcast_tensors": _broadcast,
    "to": _convert, "double": _convert, "type_as": _convert, "detach": _convert, "contiguous": _convert,
    "clone": _convert, "ones_like": _filled(1.0), "zeros_like": _filled(0.0), "full_like": lambda a, v: _filled(v)(a),
    "numel": lambda a: a.lo.numel(), "dim": lambda a: a.ndim, "size": lambda a, *d: a.lo.size(*d),
    "new_zeros": lambda a, *shape, **_: a.lo.new_zeros(*shape),
    "new_ones": lambda a, *shape, **_: a.lo.new_ones(*shape),
}  # fmt: skip


def _moving(name: str) -> Callable:
    return lambda a, *args, **kwargs: _linear(lambda z: getattr(z, name)(*args, **kwargs), a)


for _name in (
    "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat", "transpose", "permute",
    "movedim", "flip", "sum", "mean", "diag_embed", "__getitem__", "broadcast_to", "swapaxes",
):  # fmt: skip
    OPERATIONS[_name] = _moving(_name)


def _lookup(name: str) -> Callable:
    if name not in OPERATIONS:
        raise NotEnclosed(f"it uses {name!r}, which has no interval form here")
    return OPERATIONS[name]


def _norm_bound(values: Interval, matrix: bool) -> Tensor:
    """An upper bound of the norm (spectral or Euclidean) of everything enclosed, by cell."""
    middle, radius = values.middle, values.radius
    infinite = ~torch.isfinite(middle) | ~torch.isfinite(radius)
    bad = infinite.flatten(1).any(1)
    middle, radius = middle.nan_to_num(0.0, 0.0, 0.0), radius.nan_to_num(0.0, 0.0, 0.0)
    bound = _norm(middle, matrix) + torch.linalg.vector_norm(radius.flatten(1), dim=1)
    return torch.where(bad, torch.full_like(bound, math.inf), bound)


def _norm(values: Tensor, matrix: bool) -> Tensor:
    return torch.linalg.matrix_norm(values, 2) if matrix else torch.linalg.vector_norm(values, dim=-1)


Evaluate = Callable[..., Any]  # a curve, called with Intervals


def suprema(function: Evaluate, arguments: int, matrix: bool) -> tuple[float, float]:
    """Upper bounds of sup |f| and of the Lipschitz constants (the larger one over the arguments), f a curve.

    Args:
        function: t -> [..., shape], or (t, s) -> [..., shape] on 0 <= s <= t <= 1.
        arguments: 1 or 2.
        matrix: spectral norms of [..., d, d] instead of Euclidean ones of [..., d].

    Raises:
        NotEnclosed: an operation without an interval form.
    """

    def measure(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        found = _call(function, lo, hi)
        slopes = [_norm_bound(slope, matrix) for slope in found.slopes]
        return _norm_bound(found, matrix), torch.stack(slopes).amax(0)

    def of_values(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """By the mean value form |f(middle)| + |f'| h / 2 where it is smaller than the plain enclosure."""
        found, middle = _call(function, lo, hi), (lo + hi) / 2
        at = _norm_bound(_call(function, middle, middle), matrix)
        reach = sum(_norm_bound(slope, matrix) * (hi - lo)[:, i] / 2 for i, slope in enumerate(found.slopes))
        return torch.minimum(_norm_bound(found, matrix), at + reach), at

    def of_slopes(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        middle = (lo + hi) / 2
        return measure(lo, hi)[1], measure(middle, middle)[1]

    return _branch_and_bound(of_values, arguments), _branch_and_bound(of_slopes, arguments)


def _call(function: Evaluate, lo: Tensor, hi: Tensor) -> Interval:
    count = lo.shape[1]
    points = []
    for i in range(count):
        seeds = [torch.full_like(lo[:, i], float(i == k)) for k in range(count)]
        points.append(Interval(lo[:, i], hi[:, i], [Interval(seed, seed) for seed in seeds]))
    found = function(*points)
    if isinstance(found, Tensor):  # a constant
        zero = torch.zeros_like(found)
        return Interval(found, found, [Interval(zero, zero)] * count)
    if not isinstance(found, Interval):
        raise NotEnclosed(f"it returns {type(found).__name__}")
    shape = found.shape
    return Interval(found.lo, found.hi, [_linear(lambda z: z.expand(shape), slope) for slope in found.slopes])


def enclose(function: Evaluate, cells: int) -> Interval:
    """The values of a curve of t on each of `cells` equal cells of [0, 1]."""
    lo = torch.arange(cells, dtype=torch.float64)[:, None] / cells
    return _call(function, lo, lo + 1 / cells)


def _branch_and_bound(measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], arguments: int) -> float:
    """The largest upper bound over cells that are split until it is within CLOSE of a value that is attained."""
    size = 32 if arguments == 1 else 8
    if arguments == 1:
        index = torch.arange(size, dtype=torch.float64)[:, None]
    else:
        index = torch.tril_indices(size, size).T.double()  # cells that meet s <= t
    lo, hi = index / size, (index + 1) / size
    settled = attained = 0.0
    for _ in range(ROUNDS):
        upper, lower = measure(lo, hi)
        attained = max(attained, lower.max().item())
        open_ = upper > attained * (1 + CLOSE)
        settled = max([settled, *upper[~open_].tolist()])
        if not bool(open_.any()):
            return settled
        rest = upper[open_].max().item()
        lo, hi = lo[open_], hi[open_]
        if lo.shape[0] * 2**arguments > CELLS:
            return max(settled, rest)
        lo, hi = _split(lo, hi)
    return max(settled, rest)


def _split(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    middle = (lo + hi) / 2
    for i in range(lo.shape[1]):
        left, right = hi.clone(), lo.clone()
        left[:, i], right[:, i] = middle[:, i], middle[:, i]
        lo, hi, middle = torch.cat([lo, right]), torch.cat([left, hi]), torch.cat([middle, middle])
    if lo.shape[1] == 2:
        inside = lo[:, 1] <= hi[:, 0]  # s <= t somewhere in the cell
        lo, hi = lo[inside], hi[inside]
    return lo, hi


def node_suprema(values: Tensor, times: Tensor, arguments: int, matrix: bool) -> tuple[float, float]:
    """The same, exactly, for piecewise (bi)linear interpolation of values [m, ...] or [m, m, ...] at `times` [m].

    Norms are convex, so that their maxima are attained at nodes, and a bilinear function's slopes lie between its
    difference quotients.
    """
    step = torch.diff(times.double())
    values = values.detach().double()
    sup = _norm(values, matrix).max().item()
    slopes = []
    for axis in range(arguments):
        rise = values.diff(dim=axis)
        width = step.reshape(*([1] * axis), -1, *([1] * (rise.ndim - axis - 1)))
        quotient = rise / width
        slopes.append(_norm(quotient, matrix).max().item() if quotient.numel() else 0.0)
    return sup, max(slopes)
