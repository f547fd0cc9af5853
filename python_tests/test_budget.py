"""The error budget itself: what it says of sums that are known, and eager PyTorch as a witness."""

import copy
from statistics import median

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels._activations import activate
from dnl_kernels.ops.norm_activation import cpu
from dnl_kernels.testing import Exact, assert_within_budget, cotangent, exactly, named
from dnl_kernels.testing.budget import SAFETY, share_of_budget
from dnl_kernels.testing.formulations import another_formulation

U = torch.finfo(torch.float32).eps / 2
# Of every operator cases without and with a batch norm, peaked weights, long sums.
WITNESSED = [
    ("dense_sum", "images-channels"),
    ("dense_linear", "gelu"),
    ("dense_conv2d", "seven"),
    ("nonlocal_attention", "softmax-odd"),
    ("nonlocal_attention", "gaussian-large-scores"),
    ("dnl_layer", "softmax"),
    ("dnl_block", "densenet"),
    ("dnl_block", "tokens-gaussian"),
]


def test_a_sum_that_cancels_is_held_to_its_terms():
    x = torch.tensor([1e4, -1e4, 1.0], dtype=torch.float64)
    value, bound, _ = exactly(lambda: torch.sum(x * torch.ones_like(x)), torch.float32)
    assert value == 1 and SAFETY * U * 2e4 / 8 < bound <= 2 * SAFETY * U * 2.0001e4
    assert_within_budget(
        "off by a unit in the last place of the terms", torch.tensor(1 + 2 * U * 1e4), Exact(value, bound)
    )
    with pytest.raises(AssertionError, match="sum: error .* times what rounding"):
        assert_within_budget("sum", torch.tensor(1 + 40 * U * 1e4), Exact(value, bound))


def test_every_element_has_its_own_bound():
    """A row of small numbers is not excused by one of large numbers beside it."""
    a = torch.tensor([[1e6], [1.0]], dtype=torch.float64)
    exact = exactly(lambda: a @ torch.ones(1, 1, dtype=torch.float64), torch.float32)
    assert_within_budget("y", a.float(), exact)
    with pytest.raises(AssertionError):
        assert_within_budget("y", torch.tensor([[1e6], [1.0 + 1e-5]]), exact)


def test_an_exponent_of_a_thousand_is_conditioned_by_its_size():
    def bound(score):
        x = torch.tensor([score, score + 1.0, -score], dtype=torch.float64)
        return exactly(lambda: torch.softmax(x * torch.ones(3, dtype=torch.float64), 0), torch.float32).bound[0]

    assert bound(1000.0) > 50 * bound(1.0)


def test_next_to_the_kink_either_slope_is_right_and_elsewhere_only_one():
    def bound(z):
        x = torch.tensor([1.0, -1.0 + z], dtype=torch.float64, requires_grad=True)
        return exactly(lambda: torch.autograd.grad(torch.relu(x.sum()), x)[0], torch.float32).bound.max()

    assert bound(1e-8) == 1 and bound(1e-4) < 1e-6


def test_zeros_must_be_zeros():
    x = torch.zeros(3, dtype=torch.float64)
    exact = exactly(lambda: x * 5, torch.float32)
    with pytest.raises(AssertionError):
        assert_within_budget("y", torch.full((3,), 1e-30), exact)


def test_more_runs_widen_what_few_have_missed_and_nothing_wrong():
    """Of 4096 sums of 64 numbers some have small deviations in all of the first runs. What is wrong stays so, and what
    was read must be there as it was."""
    x = torch.randn(4096, 64, dtype=torch.float64)
    exact = exactly(lambda: (x * x).sum(1), torch.float32)
    before = exact.bound.clone()
    typical = before.median()
    assert before.min() < 0.4 * typical
    assert_within_budget("y", exact.value + 0.5 * before, exact)
    assert torch.equal(exact.bound, before)
    assert_within_budget("y", exact.value + 1.01 * before * (before < 0.5 * typical), exact)
    assert (exact.bound >= before).all() and exact.bound.min() > 0.4 * typical
    with pytest.raises(AssertionError):
        assert_within_budget("y", exact.value + 1.01 * exact.bound, exact)
    other = exactly(lambda: (x * x).sum(1), torch.float32)
    x += 1
    with pytest.raises(RuntimeError, match="has changed"):
        assert_within_budget("y", other.value + 1.5 * other.bound, other)


def test_a_plain_tensor_is_no_bound():
    with pytest.raises(TypeError, match="y: exact is of type Tensor"):
        assert_within_budget("y", torch.ones(2), torch.ones(2))


OTHERS = ["softmax-odd", "gaussian-key-mask", "gaussian-causal", "dot-channels-first"]
OTHERS = [("nonlocal_attention", name) for name in OTHERS] + [("dnl_layer", "gaussian"), ("dnl_block", "densenet")]


@pytest.mark.parametrize("op, name", OTHERS)
def test_other_formulations_are_the_same_formula(op, name):
    call = named.CASES[op][name](torch.float64)
    expected, used = named.gradients(call, call.leaves, "reference"), []
    for second in (False, True):
        with another_formulation(second) as replaced:
            found = named.gradients(call, call.leaves, "reference")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        used += replaced
    assert used


def bounds(call):
    wide = {n: t.double() for n, t in call.leaves.items()}
    return exactly(lambda: named.gradients(call, wide, "reference"), call.dtype)


@pytest.mark.parametrize("op, name", WITNESSED)
def test_eager_pytorch_is_a_witness(op, name):
    """The median of eager's errors over three draws lies below the bound, and not so far below that the bound would be
    empty: between a hundredth and the whole of it (the largest over the output and all gradients). Eager is held to
    nothing here: on a processor where this fails, it is the bound that has to be looked at."""
    shares = []
    for _ in range(3):
        call = named.CASES[op][name](torch.float32)
        eager = named.gradients(call, call.leaves, "reference")
        shares.append(max(share_of_budget(eager[n], e) for n, e in bounds(call).items()))
    assert 0.01 <= median(shares) <= 1.0, shares


def test_networks_have_nothing_that_does_not_round():
    """Each of these operations alone moves its result, and PyTorch in float32 is within the bound."""
    x = torch.randn(3, 4, 6).double()
    layer = torch.nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=True)
    wide = copy.deepcopy(layer).double()
    functions = {
        "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
        "log_softmax": lambda x: x.log_softmax(-1),
        "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        "pooling": lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2),
        "layer": lambda x: (wide if x.dtype == torch.float64 else layer)(x),
    }
    for name, function in functions.items():

        def both(x, function=function):
            x = x.detach().requires_grad_()
            y = function(x)
            return y.detach(), torch.autograd.grad(y, x, cotangent(y))[0]

        exact = exactly(lambda both=both: both(x), torch.float32)
        for found, e in zip(both(x.float()), exact, strict=True):
            assert_within_budget(name, found, e)
            assert 0 < e.bound.max() < 1e-3, name


WELL_CONDITIONED = ["dense_sum", "dense_linear", "dense_conv2d"]  # no exponents, and no norm that cancels a gradient
PLANTED = [(*case, torch.float64, 1e-10) for case in WITNESSED]
PLANTED += [(*case, torch.float32, 2e-5) for case in WITNESSED if case[0] in WELL_CONDITIONED]


@pytest.mark.parametrize("op, name, dtype, error", PLANTED)
def test_a_planted_error_is_out_of_bounds(op, name, dtype, error):
    """The output, or one gradient, times 1 + error, unless it is zero but for rounding (biases before a norm or a
    softmax)."""
    call = named.CASES[op][name](dtype)
    found, exact = named.gradients(call, call.leaves, "reference"), bounds(call)
    least = 1e-9 * max(e.value.abs().max() for e in exact.values())
    planted = [n for n, e in exact.items() if e.value.abs().max() > least]
    assert len(planted) > len(exact) / 2
    for n in planted:
        assert_within_budget(n, found[n], exact[n])
        with pytest.raises(AssertionError, match="times what rounding"):
            assert_within_budget(n, found[n] * (1 + error), exact[n])


TERMS = {  # of the value and of the slope
    "tanh": lambda x: (x.tanh().abs(), 1 + x.tanh().square()),
    "gelu": lambda x: (x.abs(), 1 + x.abs() * torch.exp(-x.square() / 2)),
    "silu": lambda x: ((1 + x.abs()) * (x * x.sigmoid()).abs(), x.sigmoid() * (1 + x.abs())),
}


@pytest.mark.skipif(_backend.absence("cpu") is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("activation", TERMS)
def test_elementary_functions_need_half_of_the_safety(levels, activation):
    """What SAFETY says of them: errors of four units at most, with the terms that the budget gives them."""
    x = torch.cat([3 * torch.randn(1 << 15), 40 * torch.rand(1 << 15) - 20, torch.randn(1 << 15) * 1e-4])

    def kernel(x):
        image, mean, var = x.view(1, 1, 1, -1), torch.zeros(1), torch.ones(1)
        return cpu.norm_activation(image, None, None, mean, var, activation, None, 0.0)[0].flatten()

    def both(function, x):
        x = x.detach().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    exact, terms = both(lambda x: activate(x, activation), x.double()), TERMS[activation](x.double())
    for level in levels():
        for found, e, t in zip(both(kernel, x), exact, terms, strict=True):
            assert ((found - e).abs() / (U * t + torch.finfo(torch.float32).tiny)).max() <= SAFETY / 2, level
