"""dense_sum and DenseSum against sums by hand, eager and compiled, and stack + einsum (DenseFormer's formula)."""

import functools

import pytest
import torch

from bench.comparison import DEVICE, SMOKE, Case, Way, compiled, way
from bench.peers import dense_sums_eager, dense_sums_stacked
from dnl_kernels.nn import DenseSum
from dnl_kernels.ops.dense_sum.api import dense_sum
from dnl_kernels.testing.dense_sum import CASES, SIZES, inputs

NAMES = ("odd", "tokens-channels")
TRIANGLES = {"triangle-L12": (12, (8, 256, 512)), "triangle-L48": (48, (1024, 512))}


def comparison(name: str) -> Case:
    case = (CASES | SIZES)[name]
    if SMOKE:
        case = case._replace(shape=(2, *case.shape[1:]))
    weight, states = inputs(case, torch.float32, DEVICE)
    given = [weight, *states]
    channel_dim = -1 if case.channel_dim is None else case.channel_dim

    def call(weight, *states, backend=None):
        return dense_sum(states, weight, channel_dim=channel_dim, backend=backend)

    def stacked(weight, *states):
        x = torch.stack(states)
        if weight.dim() == 1:
            return torch.einsum("j,j...->...", weight, x)
        return (x * weight.view([-1, *(s if d == channel_dim % states[0].dim() else 1
                                       for d, s in enumerate(states[0].shape))])).sum(0)  # fmt: skip

    eager = functools.partial(call, backend="reference")
    ways = {"ours": way(call, given), "eager": way(eager, given), "stack": way(stacked, given)}
    ways["compile"] = compiled(ways["eager"]) if name in SIZES else "the small cases are not compiled"
    numel, count = states[0].numel(), len(states)
    return Case("dense_sum", name, ways, way(eager, [t.double() for t in given]),
                flops=2.0 * count * numel, bytes=4.0 * (count + 1) * numel)  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *SIZES])
def test_dense_sum(record, name):
    record(comparison(name))


def triangle(name: str) -> Case:
    """All sums of a network of L layers, as DenseSum streams them, and the sum of them as the output."""
    layers, shape = TRIANGLES[name]
    shape = (2, *shape[1:]) if SMOKE else shape
    weight, states = torch.randn(layers, layers) / layers, [torch.randn(shape) for _ in range(layers)]
    given = [weight.to(DEVICE), *(x.to(DEVICE) for x in states)]

    def streamed(weight, *states):
        mix = mixes[weight.dtype]
        history = mix.history(states[0])
        outputs = [mix(history)]
        for x in states[1:]:
            history.append(x)
            outputs.append(mix(history))
        return functools.reduce(torch.add, outputs)

    def by(function):
        return lambda weight, *states: functools.reduce(torch.add, function(states, weight))

    mix = DenseSum(layers, device=DEVICE)
    mixes = {torch.float32: mix}
    with torch.no_grad():
        mix.weight.copy_(given[0])
    leaves = [t.clone().requires_grad_() for t in given[1:]]
    ours = Way(lambda: streamed(mix.weight, *leaves), [mix.weight, *leaves], [mix.weight])
    eager = way(by(dense_sums_eager), given)
    pairs = layers * (layers + 1) // 2
    ways = {"ours": ours, "eager": eager, "stack": way(by(dense_sums_stacked), given)}
    ways["compile"] = compiled(eager) if layers <= 12 else "compiling all sums of 48 layers takes minutes"
    return Case(
        "DenseSum", name, ways, way(by(dense_sums_eager), [t.double() for t in given]),
        flops=2.0 * pairs * states[0].numel(), bytes=4.0 * 2 * layers * states[0].numel(),
        bars={"eager": 3.0} if name == "triangle-L48" else {},
    )  # fmt: skip


@pytest.mark.parametrize("name", TRIANGLES)
def test_triangle(record, name):
    record(triangle(name))
