"""dense_sum against float64: every case, dtype, gradient and instruction set, and every error."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_sum import CASES, inputs

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)


def run(weight, states, channel_dim, backend):
    weight, states = weight.detach().requires_grad_(), [s.detach().requires_grad_() for s in states]
    y = dnl.dense_sum(states, weight, channel_dim=channel_dim, backend=backend)
    dy = cotangent(y)
    return y, torch.autograd.grad(y, [weight, *states], dy)


def check(weight, states, channel_dim, levels=lambda: [None]):
    wide = weight.double(), [s.double() for s in states]
    exact, exact_grads = exactly(lambda: run(*wide, channel_dim, "reference"), weight.dtype)
    names = ["dweight", *(f"dstates[{j}]" for j in range(len(states)))]
    for _ in levels():
        y, grads = run(weight, states, channel_dim, "cpu")
        assert_within_budget("y", y, exact)
        for name, a, e in zip(names, grads, exact_grads, strict=True):
            assert_within_budget(name, a, e)


@every_case
@every_dtype
def test_against_float64(levels, case, dtype):
    weight, states = inputs(case, dtype)
    check(weight, states, 0 if case.channel_dim is None else case.channel_dim, levels)


@every_dtype
def test_strided_states(dtype):
    weight = torch.randn(3, 6, dtype=dtype)
    wide = torch.randn(3, 2, 12, 5, dtype=dtype)
    check(weight, [wide[0, :, ::2], wide[1].transpose(1, 2)[:, :, :6].transpose(1, 2), wide[2, :, 6:].flip(1)], 1)


@pytest.mark.parametrize("targets", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("shape, channel_dim", [((3, 5, 7), None), ((3, 5, 7), 1), ((2, 1031), -1), ((9, 3), -1),
                                                ((2, 3, 600), 1), ((1, 1), 1), ((0, 4), 1)], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", [1, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_sums_in_one_pass(isa, targets, shape, channel_dim, count, dtype):
    states = [torch.randn(shape, dtype=dtype) for _ in range(count)]
    rows = (targets, count) if channel_dim is None else (targets, count, shape[channel_dim])
    weight, dim = torch.randn(rows, dtype=dtype), 0 if channel_dim is None else channel_dim % len(shape)
    sums = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(targets)]
    one = [dnl.dense_sum([x.double() for x in states], w.double(), channel_dim=dim, backend="reference")
           for w in weight]  # fmt: skip
    bound = 4 * count * torch.finfo(dtype).eps * (1 + max((y.abs().max().item() for y in one if y.numel()), default=0))
    for accumulate in (False, True):
        torch.ops.dnl.dense_sum_add(sums, states, weight, accumulate, dim)
        for found, y in zip(sums, one, strict=True):
            assert ((found.double() - (1 + accumulate) * y).abs() <= bound).all()


def test_sums_that_do_not_fit_are_refused():
    states, weight = [torch.randn(4)], torch.randn(2, 1)
    for sums in ([torch.empty(4)], [torch.empty(5)] * 2, [torch.empty(4, dtype=torch.float64)] * 2,
                 [torch.empty(8)[::2]] * 2):  # fmt: skip
        with pytest.raises(RuntimeError, match="dense_sum"):
            torch.ops.dnl.dense_sum_add(sums, states, weight, False, 0)


def test_a_state_given_twice_gets_both_gradients():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = dnl.dense_sum([x, x], torch.tensor([2.0, 3.0], dtype=torch.float64), backend="cpu")
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [5.0] * 4


def test_only_the_wanted_gradients_are_computed():
    x, w = torch.randn(4), torch.randn(1, requires_grad=True)
    y = dnl.dense_sum([x], w, backend="cpu")
    assert not x.requires_grad and torch.autograd.grad(y.sum(), w)[0].shape == (1,)


def test_weight_gradient_does_not_depend_on_the_thread_count():
    weight, states = inputs(CASES["longer-than-a-tile"], torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(weight, states, 1, "cpu")[1])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


X = torch.zeros(2, 3)
ERRORS = [
    ([], torch.zeros(1), {}, ValueError, "states is empty"),
    (X, torch.zeros(1), {}, TypeError, "states is of type Tensor; expected a list or tuple"),
    ([X, "x"], torch.zeros(2), {}, TypeError, r"states\[1\] is of type str"),
    ([X, X.long()], torch.zeros(2), {}, TypeError, r"states\[1\] is of torch.int64"),
    ([X, X.double()], torch.zeros(2), {}, TypeError, r"states\[1\] is of torch.float64; expected torch.float32"),
    ([X, X.to("meta")], torch.zeros(2), {}, ValueError, r"states\[1\] is on meta; expected cpu"),
    ([X, X.mT], torch.zeros(2), {}, ValueError, r"states\[1\] is of shape \[3, 2\]; expected \[2, 3\]"),
    ([X], torch.zeros(2), {}, ValueError, r"weight is of shape \[2\]; expected \[1\] \(J\)"),
    ([X], torch.zeros(1, 2), {}, ValueError, r"weight is of shape \[1, 2\]; expected \[1, 3\] \(J, C\)"),
    ([X], torch.zeros(1, 3), {"channel_dim": 2}, ValueError, "channel_dim is 2; expected a dimension"),
    ([X], torch.zeros(1).double(), {}, TypeError, "weight is of torch.float64; expected torch.float32"),
    ([X], [1.0], {}, TypeError, "weight is of type list"),
]


@pytest.mark.parametrize("states, weight, keywords, error, message", ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_bad_input_is_named(states, weight, keywords, error, message):
    with pytest.raises(error, match=message):
        dnl.dense_sum(states, weight, **keywords)


def test_good_input_next_to_each_error_passes():
    assert dnl.dense_sum((X, X), torch.ones(2)).shape == X.shape
    assert dnl.dense_sum([X], torch.ones(1, 3), channel_dim=-1).shape == X.shape
    assert dnl.dense_sum([X], torch.ones(1, 2), channel_dim=-2).shape == X.shape
