"""The error budget: what rounding can do to a computation in its dtype, found in float64 and nowhere else.

A result is held to `exact.bound`, element by element. The bound is that of a forward rounding analysis, to first order
and beyond: every operation of the plain PyTorch reference, forward and backward, returns its exact result with an error
of at most

    SAFETY * u * sum |terms| + eta,        u = eps / 2, the unit roundoff of the dtype, eta its smallest normal number,

and one of a quarter of that, relative to the result, which all elements of an operation have in common (a constant that
is rounded, the bias of an approximation). The terms are the numbers that are added up: the products of a matrix product
or a convolution, the summands of a sum, the two sides of an addition, and one term, the result, where nothing is added.
An algorithm in that dtype commits such errors whatever the order of its sums. What they do to the result is not
estimated by a formula per operator: the reference runs in float64, with an error drawn uniformly from that range for
every number that it computes, and all that follows is exact. This is Monte Carlo arithmetic (Parker, Pierce and Eggert
2000, "Monte Carlo arithmetic: how to gamble with floating point and win"), with Higham's bound for sums (2002,
"Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2) as the error of an operation. So the
conditioning of a softmax's or a Gaussian's exponents, of a batch norm over a few numbers, and of a derivative next to
a kink is that of the inputs at hand: a score of 1000 may be off by 1000 u, which moves its weight by so much; an
activation within rounding of zero has either slope.
The bound of an element is its largest deviation in 32 runs of each way of writing the formula (in half types 96; see
`dnl_kernels.testing.formulations`), of which all but DRAWS are made only where an error is larger than these show. The
largest of a few sums of many errors is under three quarters of their standard deviation once in ten (of 8 once in a
hundred), which in a tensor of thousands is no rarity, the largest of 32 once in 10^8. A bound is never that of the
worst case, in which all errors conspire, and always below it.

The constants:

- SAFETY = 8. Sums: n numbers added up one after another round n times, each time by up to u of the partial sum, evenly
  distributed (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", sections 2 and 3).
  Where the first number is nearly all of the sum, that has a standard deviation of sqrt(n / 3) u sum |terms| at most:
  4 to 8 u, as the sum lies between powers of two, for the 192 weights and values in a row of attention (kBlockKeys in
  csrc/nonlocal_attention). Where all are of one size, sqrt(n) / 3: at most 5.3 u for 256 products of the gradient of a
  filter in the portable version, less for the up to 108 products of a convolution. Elementary functions: with the terms
  below, at most 4.0 u for tanh, 3.1 for gelu, 2.9 for silu, 3.7 for a slope of them in these kernels, and 6.0 for gelu
  in PyTorch (3 million arguments, all levels; python_tests/test_budget.py holds the kernels to half of SAFETY).
- COMMON = 1/4, 2 u: a factor such as scale * log2(e), which is rounded, and its product with a number that all elements
  share, which is rounded again.
- REFERENCE = 2, for float64 alone: there the reference has errors of the same size.
- eta is times the factors of a number that underflows inside of an operation: twice x and g for silu's sigmoid, which
  may be off by eta either way, and is not drawn at the end of its range every time.

Eager PyTorch takes no part in it: its error is that of one machine's libraries, and changes with the processor. It is
the second witness: python_tests/test_budget.py demands of the medians over many draws that eager stays within these
bounds, and that they are not wider than eager's error by more than a stated factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .formulations import another_formulation

SAFETY = 8.0  # see the docstring, as for the others
# Runs of each formulation, by the bytes of an element. In half types many activations are so near a kink that either
# slope is right, and every one must be seen to have both.
RUNS = {2: 96, 4: 32, 8: 32}
DRAWS = {2: 8, 4: 3, 8: 3}  # of them the first, which are enough nearly always
COMMON = 0.25  # of SAFETY
REFERENCE = 2.0  # by how much float64 is held less strictly
aten = torch.ops.aten


class Exact(NamedTuple):
    """A tensor of the float64 reference, and the largest error of each of its elements in another dtype. more(): makes
    the other runs, if they were not made yet, and widens the bounds in place."""

    value: Tensor
    bound: Tensor
    more: Callable[[], None] | None = None


def _absolute(*args, **words):
    """The arguments of an operation that adds up products of them, without signs: it then returns sum |terms|."""
    return [_magnitude(t) for t in args], {name: _magnitude(t) for name, t in words.items()}


def _magnitude(t: Any) -> Any:
    return t.abs() if isinstance(t, Tensor) and t.is_floating_point() else t


@functools.cache
def _elementwise(function: Any) -> bool:
    return torch.Tag.pointwise in function.tags


def _gelu_slope_terms(g, x, **_):
    return g.abs() * (1 + x.abs() * torch.exp(-x.square() / 2))


# What is added up in operations that add something, from the arguments; the operations that only move numbers are in
# MOVES; the term of every other elementwise operation is its result.
SUMS = {
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.convolution_backward.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.avg_pool2d.default, aten.avg_pool2d_backward.default, aten.add.Tensor, aten.add_.Tensor,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default,
    aten.max_pool2d_with_indices_backward.default, aten.upsample_nearest2d_backward.default,
}  # fmt: skip
TERMS: dict[Any, Callable[..., Tensor]] = {
    aten.sub.Tensor: lambda a, b, alpha=1: abs(a) + abs(alpha * b),
    aten.exp.default: lambda x: x.exp() * (1 + x.abs()),  # by way of 2^(x log2 e), whose argument is rounded
    aten.gelu.default: lambda x, **_: x.abs(),  # x (1 + erf) / 2
    aten.gelu_backward.default: _gelu_slope_terms,
    aten.silu.default: lambda x: (1 + x.abs()) * (x * x.sigmoid()).abs(),
    aten.silu_backward.default: lambda g, x: g.abs() * x.sigmoid() * (1 + x.abs()),
    aten.tanh_backward.default: lambda g, y: g.abs() * (1 + y.square()),
}
# What multiplies a number inside of an operation that may underflow, where that is more than 1: silu's sigmoid.
AMPLIFIED: dict[Any, Callable[..., Tensor]] = {aten.silu_backward.default: lambda g, x: 1 + 2 * (g * x).abs()}
MOVES = {
    aten.clone.default, aten.neg.default, aten.abs.default, aten.relu.default, aten.threshold_backward.default,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.clamp.default,
}  # fmt: skip


def _softmax(x, dim, _):
    weight = (x - x.amax(dim, keepdim=True)).exp() if x.shape[dim] else x
    return weight / weight.sum(dim, keepdim=True)


def _softmax_backward(g, weight, dim, _):
    return weight * (g - (g * weight).sum(dim, keepdim=True))


def _columns(x: Tensor, vector: Tensor | None) -> Tensor | float:
    return 1.0 if vector is None else vector.view(-1, *(1,) * (x.dim() - 2))


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    axes, running = [0, *range(2, x.dim())], (mean, var)
    if training:
        mean = x.mean(axes)
        var = (x - _columns(x, mean)).square().mean(axes)
        n = x.numel() // max(x.shape[1], 1)
        for kept, found in zip(running, (mean, var * n / max(n - 1, 1)), strict=True):
            if kept is not None:
                kept.mul_(1 - momentum).add_(momentum * found)
    inverse = (var + eps).rsqrt()
    y = (x - _columns(x, mean)) * _columns(x, inverse) * _columns(x, weight)
    y = y if bias is None else y + _columns(x, bias)
    return (y, mean, inverse) if training else (y, x.new_empty(0), x.new_empty(0))


def _batch_norm_backward(g, x, weight, running_mean, running_var, mean, inverse, training, eps, _wanted):
    axes = [0, *range(2, x.dim())]
    if not training:
        mean, inverse = running_mean, (running_var + eps).rsqrt()
    rate = _columns(x, inverse)
    normalised = (x - _columns(x, mean)) * rate
    dweight, dbias = (g * normalised).sum(axes), g.sum(axes)
    if training:
        n = max(x.numel() // max(x.shape[1], 1), 1)
        g = g - _columns(x, dbias) / n - normalised * _columns(x, dweight) / n
    return g * rate * _columns(x, weight), dweight, dbias


def _log_softmax(x, dim, _):
    x = x - x.amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def _log_softmax_backward(g, y, dim, _):
    return g - y.exp() * g.sum(dim, keepdim=True)


def _var_mean(x, dim, *, correction=0, keepdim=False):
    mean = x.mean(dim, keepdim=True)
    var = (x - mean).square().sum(dim, keepdim=keepdim) / (x.numel() // mean.numel() - correction)
    return var, mean if keepdim else mean.squeeze(dim)


# Operations that consist of several of the above.
COMPOSED: dict[Any, Callable[..., Any]] = {
    aten._safe_softmax.default: lambda x, dim, dtype=None: _softmax(x, dim, False),
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.var_mean.correction: _var_mean,
    **get_decompositions([aten.native_layer_norm, aten.native_layer_norm_backward]),
    aten._softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class Rounding(TorchDispatchMode):
    """Every floating-point operation is off by up to unit * sum |terms| + underflow, uniformly."""

    def __init__(self, unit: float, underflow: float, generator: Callable[[torch.device], torch.Generator]):
        super().__init__()
        self.unit, self.underflow, self.generator = unit, underflow, generator

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        words = kwargs or {}
        if function in COMPOSED:
            with self:
                return COMPOSED[function](*args, **words)
        if function in TERMS:
            terms = TERMS[function](*args, **words)
        elif function in SUMS:
            given, named = _absolute(*args, **words)
            terms = (aten.add.Tensor if function is aten.add_.Tensor else function)(*given, **named)
        elif function in MOVES or not _elementwise(function):
            return function(*args, **words)
        else:
            terms = None
        amplified = AMPLIFIED[function](*args, **words) if function in AMPLIFIED else 1.0
        result = function(*args, **words)
        terms = result if terms is None else terms
        if isinstance(result, Tensor):
            return self._round(result, terms, amplified)
        return type(result)(self._round(r, t, amplified) for r, t in zip(result, terms, strict=True))

    def _round(self, result: Any, terms: Any, amplified: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        drawn = torch.empty(result.numel() + 1, dtype=result.dtype, device=result.device)
        drawn.uniform_(-1, 1, generator=self.generator(result.device))
        own, common = drawn[:-1].view(result.shape), drawn[-1] * (self.unit * COMMON)
        error = (terms * self.unit).add_(self.underflow * amplified).mul_(own).addcmul_(result, common)
        return result.add_(error.nan_to_num_(0.0, 0.0, 0.0))


def exactly(
    compute: Callable[[], Any],
    dtype: torch.dtype,
    roundoff: torch.dtype | None = None,
    draws: int | None = None,
    others: bool = True,
) -> Any:
    """What `compute()` returns, every tensor as an `Exact`: its value, and its bound for results of `dtype`.

    compute: runs the reference in float64, with whatever gradients are asked for, from the same inputs each time.
    roundoff: the dtype that operations round to, by default `dtype` and for half types float32, in which they are added
    up and rounded once, when a result is stored. Where what is kept between operations is of a half type, say so.
    draws: the first runs of each formulation, if not as many as DRAWS says. others: whether formulations other than the
    reference's own are run at first; without them the bound is narrower than it need be.
    """
    wide = torch.promote_types(dtype, torch.float32)
    unit = torch.finfo(roundoff or wide).eps / 2
    # In float64 the runs themselves round; the errors are proportional to the unit, and found with a larger one.
    drawn = unit if dtype != torch.float64 else 2.0**-30
    # And the reference is no more exact there than what is held to it.
    scale = unit / drawn * (REFERENCE if dtype == torch.float64 else 1)
    underflow = torch.finfo(wide).tiny
    exact = compute()
    deviations = tree_map(lambda t: torch.zeros_like(t) if isinstance(t, Tensor) else None, exact)
    # Of the devices on which the reference computes, each its own.
    generator = functools.cache(lambda device: torch.Generator(device).manual_seed(0))

    def widen(largest, value, other):
        if isinstance(value, Tensor):
            torch.maximum(largest, (other.detach() - value.detach()).abs(), out=largest)

    def draw_formulation(runs):
        for _ in range(runs):
            with Rounding(SAFETY * drawn, underflow, generator), sdpa_kernel(SDPBackend.MATH):
                moved = compute()
            tree_map(widen, deviations, exact, moved)

    def draw(runs: int, others: bool = True) -> None:
        draw_formulation(runs)
        for second in (False, True) if others else ():
            with another_formulation(second) as used:
                compute()
                if used:
                    draw_formulation(runs)

    runs = RUNS[(roundoff or wide).itemsize]
    first = draws or DRAWS[(roundoff or wide).itemsize]
    bounds: list[tuple[Tensor, Tensor]] = []
    made: list[bool] = []

    def pair(value, largest):
        if not isinstance(value, Tensor):
            return value
        bounds.append((largest, largest * scale))
        return Exact(value.detach(), bounds[-1][1], more)

    def more() -> None:
        if made:
            return
        made.append(True)
        for before, now in zip(tree_leaves(exact), tree_leaves(compute()), strict=True):
            if isinstance(before, Tensor) and not torch.isclose(before, now, equal_nan=True).all():
                raise RuntimeError("what compute() reads has changed since: it cannot be run again")
        draw(runs - first)
        for largest, bound in bounds:
            torch.mul(largest, scale, out=bound)

    draw(first, others)
    return tree_map(pair, exact, deviations)


def cotangent(output: Tensor) -> Tensor:
    """The gradient of the output that tests start from: multiples of 1/64 between -1 and 1, which every dtype has, so
    that a float64 reference starts from the same numbers as what is held to it."""
    steps = torch.arange(output.numel(), device=output.device) * 37 % 129 - 64
    return (steps.to(torch.float64) / 64).to(output.dtype).reshape(output.shape)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact| / max |exact| (absolute where exact is zero); NaN and inf must stand at the same places."""
    finite = _finite_alike(actual, exact)
    if not finite.any():
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    scale = exact[finite].abs().max().item()
    return ((actual - exact)[finite].abs().max() / (scale if scale > 0 else 1.0)).item()


def _finite_alike(actual: Tensor, exact: Tensor) -> Tensor:
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(exact.shape)}")
    finite = exact.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(actual.isnan(), exact.isnan()):
        raise AssertionError("non-finite values at other places than expected")
    return finite


def share_of_budget(actual: Tensor, exact: Exact) -> float:
    """The largest error of an element of `actual` in units of its bound. Storing rounds once more: half a unit in the
    last place, and results under the smallest normal number may be zero (of half types: under the smallest at all)."""
    finite = _finite_alike(actual, exact.value)
    if not finite.any():
        return 0.0
    info = torch.finfo(actual.dtype)
    value, bound = exact.value.double()[finite], exact.bound.double()[finite]
    least = info.tiny * (info.eps if actual.dtype.itemsize < 4 else 1)
    allowed = bound + info.eps / 2 * value.abs() + least
    if not allowed.isfinite().all():
        raise AssertionError("the reference is not finite next to these inputs: there is no bound")
    return ((actual.detach().double()[finite] - value).abs() / allowed).max().item()


def assert_within_budget(name: str, actual: Tensor, exact: Exact) -> None:
    """|actual - exact.value| <= exact.bound, element by element; `exact` as `exactly` returns it."""
    if not isinstance(exact, Exact):
        raise TypeError(f"{name}: exact is of type {type(exact).__name__}; expected what `exactly` returns")
    share = share_of_budget(actual, exact)
    if exact.more is not None and share > 1:
        exact.more()
        share = share_of_budget(actual, exact)
    if not share <= 1:
        raise AssertionError(
            f"{name}: error {share:.3g} times what rounding to {actual.dtype} explains"
            f" (relative to the largest element: {relative_error(actual, exact.value):.2e})"
        )
