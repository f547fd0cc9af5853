"""DenseSum: the streaming history against plain sums, in every gradient and every way of using it."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dnl_kernels as dnl
from dnl_kernels.testing import assert_within_budget, cotangent, exactly

LAYERS = 13  # more than lookahead.WORTH


def blocks(dtype=torch.float64):
    return [torch.nn.Linear(3, 3, dtype=dtype) for _ in range(LAYERS)]


def streamed(mix, x0, apply):
    history, outputs = mix.history(x0), []
    for layer in range(mix.num_layers):
        outputs.append(mix(history))
        if layer < mix.num_layers - 1:
            history.append(apply(layer, outputs[-1]))
    return outputs


def listed(mix, x0, apply):
    """The same with weights and states as plain tensors: sum_j w[l, j] x_j by the formula."""
    states, outputs = [x0], []
    dim = -1 if mix.pattern.channel_dim == -1 else 1
    for layer in range(mix.num_layers):
        if layer % mix.pattern.period:
            y = states[layer]
        else:
            seen = range(layer % mix.pattern.dilation, layer + 1, mix.pattern.dilation)
            shape = [-1 if d == dim % x0.dim() else 1 for d in range(x0.dim())]
            y = sum(
                states[j] * (mix.weight[layer, j].reshape(shape) if mix.channels else mix.weight[layer, j])
                for j in seen
            )
        outputs.append(y)
        if layer < mix.num_layers - 1:
            states.append(apply(layer, y))
    return outputs


def random(mix):
    with torch.no_grad():
        mix.weight.add_(torch.randn_like(mix.weight))
    return mix


def gradients(outputs, leaves, create_graph=False):
    loss = sum((y * cotangent(y)).sum() for y in outputs)
    found = torch.autograd.grad(
        loss, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return loss, found


PATTERNS = [
    {},
    {"dilation": 2},
    {"period": 2},
    {"dilation": 2, "period": 3},
    {"channels": 3},
    {"channels": 4, "channel_dim": 1, "dilation": 3},
]


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_every_gradient_is_that_of_plain_sums(options):
    mix = random(dnl.DenseSum(LAYERS, dtype=torch.float64, **options))
    linears = blocks()
    x0 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x0, mix.weight, *(linear.weight for linear in linears)]

    def apply(layer, y):
        return torch.tanh(linears[layer](y)) + y

    ours, plain = streamed(mix, x0, apply), listed(mix, x0, apply)
    # All outputs, the last one, and some: a sum that is not used must not leave anything behind for the next pass.
    for chosen in (range(LAYERS), [LAYERS - 1], [1, 3], [0]):
        for a, e in zip(*(gradients([ys[i] for i in chosen], leaves)[1] for ys in (ours, plain)), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)
    _, (_, dweight, *_) = gradients(ours, leaves)
    unseen = [(call, j) for call in range(LAYERS) for j in range(LAYERS) if not mix.pattern.sees(call, j)]
    assert unseen and all(dweight[pair].abs().max() == 0 for pair in unseen)


@pytest.mark.parametrize("options", [{}, {"channels": 3}], ids=str)
def test_double_backward(options):
    mix = random(dnl.DenseSum(LAYERS, dtype=torch.float64, **options))
    linears = blocks()
    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x0, mix.weight]

    def second(outputs):
        _, first = gradients([y.square() for y in outputs], leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def apply(layer, y):
        return torch.tanh(linears[layer](y))

    for a, e in zip(second(streamed(mix, x0, apply)), second(listed(mix, x0, apply)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    exact = random(dnl.DenseSum(LAYERS, dtype=torch.float64))
    mix = copy.deepcopy(exact).to(dtype)
    states = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]
    low = [x.detach().to(dtype).requires_grad_() for x in states]
    ours = streamed(mix, low[0], lambda layer, y: low[layer + 1])
    rounded = mix.weight.detach().double()  # of the same numbers
    exact.weight.data.copy_(rounded)
    same = [x.detach().double().requires_grad_() for x in low]

    def compute():
        return gradients(listed(exact, same[0], lambda layer, y: same[layer + 1]), [exact.weight, *same])[1]

    for j, (a, e) in enumerate(
        zip(gradients(ours, [mix.weight, *low])[1], exactly(compute, dtype, dtype), strict=True)
    ):
        assert a.dtype == dtype
        assert_within_budget(f"gradient {j}", a, e)


def test_starts_as_the_identity():
    mix = dnl.DenseSum(3)
    states = [torch.randn(2, 4) for _ in range(3)]
    for call in range(3):
        assert torch.equal(mix(states[: call + 1]), states[call])
    assert torch.equal(dnl.DenseSum(2, channels=3).weight, torch.eye(2)[..., None].expand(2, 2, 3))


def test_several_histories_dropout_checkpointing_and_reuse():
    """One module, two histories at once; a state used twice; blocks that recompute themselves in backward."""
    mix = random(dnl.DenseSum(LAYERS, dtype=torch.float64))
    linears = blocks()
    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x0, mix.weight, *(p for linear in linears[:-1] for p in linear.parameters())]

    def block(layer, y):
        return torch.nn.functional.dropout(torch.tanh(linears[layer](y)), 0.5)

    def recomputed(layer, y):
        return checkpoint(block, layer, y, use_reentrant=False) + y

    def loss(run):
        torch.manual_seed(1)
        first, second = run(mix, x0, recomputed), run(mix, 2 * x0, recomputed)
        return first[-1] * second[-1] + first[2], second[3] * x0

    for a, e in zip(*(gradients(loss(run), leaves)[1] for run in (streamed, listed)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_frozen_weight_frozen_states_and_no_grad():
    mix = random(dnl.DenseSum(LAYERS, dtype=torch.float64))
    x0 = torch.randn(4, 3, dtype=torch.float64)

    def apply(layer, y):
        return torch.tanh(y)

    for x, weight in ((x0.clone().requires_grad_(), False), (x0, True)):
        mix.weight.requires_grad_(weight)
        leaf = mix.weight if weight else x
        ours, plain = (gradients(run(mix, x, apply), [leaf])[1] for run in (streamed, listed))
        torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        for a, e in zip(streamed(mix, x0, apply), listed(mix, x0, apply), strict=True):
            torch.testing.assert_close(a, e)
            assert not a.requires_grad


def test_nothing_outlives_its_pass():
    mix = random(dnl.DenseSum(LAYERS))
    history = mix.history(torch.randn(3, requires_grad=True))
    y = mix(history)
    y.sum().backward()
    assert history._passes.running == {}


def test_what_is_kept_are_the_states():
    mix = random(dnl.DenseSum(LAYERS))
    states = [torch.randn(64, 3, requires_grad=True) for _ in range(LAYERS)]
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        outputs = streamed(mix, states[0], lambda layer, y: states[layer + 1])
    assert kept <= {t.data_ptr() for t in (*states, mix.weight)} and len(outputs) == LAYERS


def test_compile_and_torch_func():
    mix = random(dnl.DenseSum(5))  # a compiler takes three times as long for all LAYERS
    linears = blocks(torch.float32)

    def run(x0):
        return streamed(mix, x0, lambda layer, y: torch.tanh(linears[layer](y)))[-1]

    x0 = torch.randn(4, 3, requires_grad=True)
    expected = gradients([run(x0)], [x0, mix.weight])[1]
    actual = gradients([torch.compile(run, fullgraph=True)(x0)], [x0, mix.weight])[1]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    jacobian = torch.func.grad(lambda x: (run(x) * cotangent(x0)).sum())(x0.detach())
    torch.testing.assert_close(jacobian, expected[0])


def test_a_history_is_a_sequence_of_states_in_the_dtype_of_the_first():
    mix = dnl.DenseSum(3)
    x0 = torch.randn(2, 2)
    history = mix.history(x0)
    history.append(x0.double())
    assert len(history) == 2 and history[1].dtype == torch.float32 and [*history][0] is x0


def test_errors_are_named():
    mix, x0 = dnl.DenseSum(2), torch.zeros(3)
    history = mix.history(x0)
    with pytest.raises(ValueError, match=r"DenseSum: state 1 is of shape \[2\]; expected \[3\], as state 0"):
        history.append(x0[:2])
    with pytest.raises(ValueError, match="DenseSum: state 1 is on meta; expected cpu, as state 0"):
        history.append(x0.to("meta"))
    with pytest.raises(TypeError, match="DenseSum: state is of type list"):
        history.append([1.0])
    history.append(x0)
    with pytest.raises(ValueError, match="DenseSum: state 2 is appended; expected at most num_layers = 2 states"):
        history.append(x0)
    with pytest.raises(ValueError, match="DenseSum: states is of length 0; expected 1 to num_layers = 2 states"):
        mix([])
    with pytest.raises(ValueError, match="DenseSum: states is of length 3"):
        mix([x0] * 3)
    for name in ("num_layers", "channels", "dilation", "period"):
        with pytest.raises(ValueError, match=f"DenseSum: {name} is 0; expected an integer >= 1"):
            dnl.DenseSum(**{"num_layers": 2, name: 0})
    with pytest.raises(ValueError, match="DenseSum: backend is 'x'"):
        dnl.DenseSum(2, backend="x")
    assert mix(history).shape == (3,)


def test_the_same_call_twice_counts_twice():
    mix = random(dnl.DenseSum(2, dtype=torch.float64))
    x0 = torch.randn(3, dtype=torch.float64, requires_grad=True)
    history = mix.history(x0)
    y = mix(history) + 2 * mix(history)
    dx, dweight = torch.autograd.grad(y.sum(), [x0, mix.weight])
    torch.testing.assert_close(dx, 3 * mix.weight[0, 0].detach().expand(3))
    torch.testing.assert_close(dweight[0, 0], 3 * x0.detach().sum())
