"""The evaluated transition, the pooling behind a stem and that in front of a classifier, csrc/transition, against
PyTorch in float64."""

import pytest
import torch
from torch import nn

from dnl_kernels.nn.network import Transition
from dnl_kernels.ops.transition import cpu, reference
from dnl_kernels.testing import ACTIVATIONS, assert_within_budget, exactly, relative_error

SHAPES = [
    (2, 5, 3, 7, 9),
    (1, 100, 50, 14, 14),
    (3, 97, 17, 2, 2),
    (2, 30, 40, 5, 49),
    (1, 200, 64, 28, 30),
    (2, 1, 1, 2, 3),
]


def arguments(channels, outputs, dtype, bias=True):
    norm = [torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5]
    weight = torch.randn(outputs, channels, 1, 1) * channels**-0.5
    return weight.to(dtype), torch.randn(outputs).to(dtype) if bias else None, [t.to(dtype) for t in norm]


def wide(t):
    return t if t is None else t.double()


def check(levels, ours, exact, dtype):
    bound = exactly(exact, dtype)
    for level in levels():
        assert_within_budget(level, ours(), bound)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transition_on_every_instruction_set(levels, shape, pool):
    batch, channels, outputs, height, width = shape
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.float64):
            weight, bias, norm = arguments(channels, outputs, dtype, bias=activation != "relu")
            x, rest = torch.randn(batch, channels, height, width).to(dtype), (activation, pool, 1e-5)
            given = (x.double(), wide(weight), wide(bias), [wide(t) for t in norm], *rest)
            check(
                levels,
                lambda x=x, w=weight, b=bias, n=norm, rest=rest: cpu.transition(x, w, b, n, *rest),
                lambda given=given: reference.transition(*given),
                dtype,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pool", [True, False])
def test_every_width_and_every_number_of_channels(levels, dtype, pool):
    """Lanes run over pixels while they are loaded, and over outputs in the product: up to twice a panel of pooled
    pixels, with an odd one left out; of small integers, whose products, sums and quarters are exact in every order."""

    def integers(*shape):
        return torch.randint(-3, 4, shape).to(dtype)

    for n in range(1, 50):
        for channels, outputs, width in ((3, 2, n + 1), (3, 2, n + 50), (n, 1, 4), (2, n, 4)):
            weight, bias, x = integers(outputs, channels, 1, 1), integers(outputs), integers(2, channels, 3, width)
            norm = [*(integers(channels) for _ in range(3)), torch.ones(channels, dtype=dtype)]
            given = (weight, bias, norm, "relu", pool, 0.0)
            exact = reference.transition(x.double(), wide(weight), wide(bias), [wide(t) for t in norm], *given[3:])
            for level in levels():
                assert torch.equal(cpu.transition(x, *given).double(), exact), (level, channels, outputs, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height", [1, 2, 7])
def test_max_pool_of_every_width(levels, height, dtype):
    for width in range(1, 50):
        x = torch.randint(-9, 10, (2, 3, height, width)).to(dtype)
        norm = [*(torch.randint(-3, 4, (3,)).to(dtype) for _ in range(3)), torch.ones(3, dtype=dtype)]
        exact = reference.norm_activation_max_pool(x.double(), [wide(t) for t in norm], "relu", 0.0)
        for level in levels():
            assert torch.equal(cpu.norm_activation_max_pool(x, norm, "relu", 0.0).double(), exact), (level, width)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_max_pool(levels, activation):
    for dtype in (torch.float32, torch.float64):
        _, _, norm = arguments(20, 1, dtype)
        x = torch.randn(2, 20, 7, 37).to(dtype)
        exact = x.double(), [wide(t) for t in norm]
        check(
            levels,
            lambda x=x, norm=norm: cpu.norm_activation_max_pool(x, norm, activation, 1e-5),
            lambda exact=exact: reference.norm_activation_max_pool(*exact, activation, 1e-5),
            dtype,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_max_pool_keeps_what_is_not_finite(isa, activation):
    norm = [None, None, torch.zeros(2), torch.ones(2)]
    x = -torch.rand(1, 2, 9, 40) - 1
    x[0, 0, 4, 20] = torch.nan
    x[0, 1, 0, 39] = 1e30 if activation == "gelu" else torch.inf  # the kernels' gelu of an infinity is NaN
    found = cpu.norm_activation_max_pool(x, norm, activation, 0.0)
    exact = reference.norm_activation_max_pool(x.double(), [wide(t) for t in norm], activation, 0.0)
    assert exact.isnan().any() and relative_error(found, exact) < 1e-6


def test_strided_and_empty_inputs():
    weight, bias, norm = arguments(4, 3, torch.float32)
    x = torch.randn(2, 8, 6, 10)[:, ::2].transpose(2, 3)
    given = (weight, bias, norm, "relu", True, 1e-5)
    torch.testing.assert_close(cpu.transition(x, *given), reference.transition(x, *given))
    torch.testing.assert_close(
        cpu.norm_activation_max_pool(x, norm, "silu", 1e-5), reference.norm_activation_max_pool(x, norm, "silu", 1e-5)
    )
    assert cpu.transition(x[:0], *given).shape == (0, 3, 5, 3)
    assert cpu.norm_activation_max_pool(x[:0], norm, "relu", 1e-5).shape == (0, 4, 5, 3)


def test_the_number_of_threads_changes_no_bit():
    weight, bias, norm = arguments(100, 20, torch.float32)
    x, before, found = torch.randn(3, 100, 14, 14), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.transition(x, weight, bias, norm, "relu", True, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "pool, size", [("floor", (7, 9)), ("ceil", (8, 6)), ("ceil", (7, 6)), ("floor", (1, 4))], ids=str
)
def test_the_module_evaluates_by_it_and_trains_without(monkeypatch, pool, size):
    module = Transition(6, 3, "batch", "relu", pool=pool)
    module.norm.norm.running_mean.normal_()
    x, calls = torch.randn(2, 6, *size), []
    evaluate = cpu.evaluate
    monkeypatch.setattr(cpu, "evaluate", lambda *a: (calls.append(1), evaluate(*a))[1])
    module.eval()
    if min(size) > 1:
        exact = module(x)
        assert exact.requires_grad and not calls
        with torch.no_grad():
            torch.testing.assert_close(module(x), exact)
            assert len(calls) == (pool == "floor" or size == (8, 6))
            module.conv.weight.mul_(2)
            torch.testing.assert_close(module(x), 2 * exact)
            before, seen = len(calls), []
            handle = module.conv.register_forward_hook(lambda *a: seen.append(1))
            torch.testing.assert_close(module(x), 2 * exact)
            assert seen and len(calls) == before
            handle.remove()
    else:
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(x)
    module.train()
    before = len(calls)
    with torch.no_grad():
        Transition(6, 3, "batch", "relu")(torch.randn(2, 6, 4, 4))
    assert len(calls) == before


def test_operators_are_what_their_fakes_say():
    weight, bias, norm = arguments(20, 17, torch.float32)
    torch.library.opcheck(torch.ops.dnl.transition_pack.default, (weight, bias, norm, 1e-5))
    packed, x = cpu.pack(weight, bias, norm, 1e-5), torch.randn(2, 20, 5, 7)
    for pool in (True, False):
        torch.library.opcheck(torch.ops.dnl.transition_eval.default, (x, packed, 17, "relu", pool))
    for operator in (torch.ops.dnl.norm_activation_max_pool, torch.ops.dnl.norm_activation_mean):
        torch.library.opcheck(operator.default, (x, norm[0], norm[1], "relu"))
    with pytest.raises(RuntimeError, match="packed weights of another one"):
        cpu.evaluate(x, packed, 16, "relu", True)


def test_module_types_that_compute_something_else_are_left_alone(monkeypatch):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = Transition(4, 3, "batch", "relu", pool="floor").eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        before = module(x)
        conv, module.conv = module.conv, Doubled(4, 3, 1, bias=False)
        module.conv.load_state_dict(conv.state_dict())
        torch.testing.assert_close(module(x), 2 * before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_means_of_every_size_on_every_instruction_set(isa, activation):
    for size in ((1, 1), (7, 7), (3, 17), (5, 300), (33,), (2, 3, 5)):
        for dtype in (torch.float32, torch.float64):
            _, _, norm = arguments(20, 1, dtype)
            x = torch.randn(3, 20, *size).to(dtype)
            found = cpu.norm_activation_mean(x, norm, activation, 1e-5)
            given = x.double(), [wide(t) for t in norm]
            exact = exactly(lambda given=given: reference.norm_activation_mean(*given, activation, 1e-5), dtype)
            assert found.shape == (3, 20) and found.dtype == dtype
            assert_within_budget(f"means over {size}", found, exact)


def test_means_of_strided_empty_and_infinite_inputs():
    norm = [t.float() for t in arguments(4, 3, torch.float32)[2]]
    x = torch.randn(2, 8, 6, 10)[:, ::2].transpose(2, 3)
    torch.testing.assert_close(cpu.norm_activation_mean(x, norm, "silu", 1e-5),
                               reference.norm_activation_mean(x, norm, "silu", 1e-5))  # fmt: skip
    assert cpu.norm_activation_mean(x[:0], norm, "relu", 1e-5).shape == (0, 4)
    assert cpu.norm_activation_mean(x[:, :, :0], norm, "relu", 1e-5).isnan().all()
    x = x.clone()
    x[0, 1, 2, 3], x[1, 2, 0, 0] = torch.nan, torch.inf
    found = cpu.norm_activation_mean(x, norm, "relu", 1e-5)
    torch.testing.assert_close(found, reference.norm_activation_mean(x, norm, "relu", 1e-5), equal_nan=True)
    assert found[0, 1].isnan() and not found.isfinite().all()
