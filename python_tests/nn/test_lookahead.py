"""Sums that are begun ahead of time: that they are read less often, right, and never stale."""

import pytest
import torch
import torch.nn.utils.parametrize

import dnl_kernels as dnl
from dnl_kernels.nn import lookahead

LAYERS = 24


@pytest.fixture
def passes(monkeypatch):
    """Each pass of the kernel: how many sums it made, and how many tensors it read."""
    seen = []
    add = lookahead.Lookahead._add

    def counted(sums, which, *rest):
        seen.append((len(sums), len(which)))
        add(sums, which, *rest)

    monkeypatch.setattr(lookahead.Lookahead, "_add", staticmethod(counted))
    return seen


def network(dtype=torch.float64, **options):
    mix = dnl.DenseSum(LAYERS, dtype=dtype, **options)
    with torch.no_grad():
        mix.weight.copy_(torch.randn_like(mix.weight) / LAYERS)
    return mix, [torch.randn(2, 5, 7, dtype=dtype, requires_grad=True) for _ in range(LAYERS)]


def run(mix, states, change=lambda layer: None):
    history, outputs = mix.history(states[0]), []
    for layer in range(LAYERS):
        outputs.append(mix(history))
        change(layer)
        if layer + 1 < LAYERS:
            history.append(states[layer + 1])
    return outputs


def by_formula(mix, states, layer):
    return mix.plain(states[: layer + 1])


@pytest.mark.parametrize("options", [{}, {"channels": 7}, {"channels": 5, "channel_dim": 1}], ids=str)
def test_tensors_are_read_less_than_half_as_often_in_both_directions(passes, options):
    mix, states = network(**options)
    outputs = run(mix, states)
    forward = sum(read for _, read in passes)
    passes.clear()
    found = torch.autograd.grad(sum(y.sin().sum() for y in outputs), [mix.weight, *states])
    pairs = LAYERS * (LAYERS + 1) // 2
    assert forward < pairs / 2 and sum(read for _, read in passes) < pairs / 2
    plain = [by_formula(mix, states, layer) for layer in range(LAYERS)]
    expected = torch.autograd.grad(sum(y.sin().sum() for y in plain), [mix.weight, *states])
    for a, e in zip((*outputs, *found), (*plain, *expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_once(dtype):
    mix, states = network(dtype)
    for layer, y in enumerate(run(mix, states)):
        plain = by_formula(mix, states, layer)
        exact = by_formula(mix.double(), [x.double() for x in states], layer)
        mix.to(dtype)
        assert y.dtype == dtype
        error, eager = ((t.double() - exact).abs().max() for t in (y, plain))
        assert error <= 1.01 * eager + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@torch.no_grad()
def test_changes_in_place_are_seen(passes):
    mix, states = network()

    def change(layer):
        if layer == 9:
            mix.weight.mul_(-2)
        if layer == 14:
            states[3].add_(1)

    history = mix.history(states[0])
    for layer in range(LAYERS):
        torch.testing.assert_close(mix(history), by_formula(mix, states, layer))
        torch.testing.assert_close(mix(history), by_formula(mix, states, layer))  # asked for again
        change(layer)
        if layer + 1 < LAYERS:
            history.append(states[layer + 1])
    assert any(sums > 1 for sums, _ in passes)


def test_elsewhere_the_operator_is_called(passes):
    mix, states = network(backend="reference")
    run(mix, states)
    mix, states = network(dilation=2)
    run(mix, states)
    mix, states = network(torch.float32)
    with torch.autocast("cpu"), torch.no_grad():
        assert run(mix, states)[-1].dtype == torch.float32  # autocast narrows no sum
    assert not passes


def test_a_weight_that_is_made_anew_for_each_call_begins_nothing(passes):
    """Each sum is one pass over all states, none of which is of another call's weight."""
    mix, states = network()
    torch.nn.utils.parametrize.register_parametrization(mix, "weight", torch.nn.Tanh())
    with torch.no_grad():
        outputs = run(mix, states, lambda layer: mix.parametrizations.weight.original.mul_(0.9))
        assert passes == [(1, layer + 1) for layer in range(LAYERS)]
        last = by_formula(mix, states, LAYERS - 1)
        mix.parametrizations.weight.original.div_(0.9)  # as it was when the last sum was made
        torch.testing.assert_close(outputs[-1], by_formula(mix, states, LAYERS - 1))
        assert not torch.equal(last, outputs[-1])


def test_a_sum_does_not_change_when_later_ones_are_made():
    mix, states = network()
    with torch.no_grad():
        history, early = mix.history(states[0]), []
        for layer in range(LAYERS):
            y = mix(history)
            early.append((y, y.clone()))
            if layer + 1 < LAYERS:
                history.append(states[layer + 1])
    assert all(torch.equal(y, kept) for y, kept in early)
