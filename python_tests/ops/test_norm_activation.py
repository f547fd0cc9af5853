"""norm_activation on the CPU, and the modules that call it, against PyTorch's own modules."""

import copy

import pytest
import torch
from torch import nn

from dnl_kernels._activations import activate
from dnl_kernels.nn.network import NormActivation, Transition
from dnl_kernels.ops.norm_activation import cpu, reference
from dnl_kernels.testing import ACTIVATIONS, assert_within_budget, cotangent, exactly

SIZES = [(2, 5, 8, 8), (3, 4, 7, 5), (2, 3, 1, 9), (5, 2, 1, 1), (1, 3, 17, 34), (4, 1, 2, 3)]
pooling = pytest.mark.parametrize("pool", [None, "ceil", "floor"])
given = pytest.mark.parametrize("measures", [True, False], ids=["measured", "given"])


def arguments(shape, dtype, measures, seed=0):
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + torch.linspace(-3, 3, channels)[:, None, None]
    weight, bias = torch.randn(2, channels, generator=g, dtype=torch.float64)
    mean, var = torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.5
    leaves = [t.float().to(dtype).requires_grad_() for t in (x, weight, bias)]
    return leaves, [None, None] if measures else [mean.to(dtype), var.to(dtype)]


def results(function, leaves, statistics, activation, pool):
    out = function(*leaves, *statistics, activation, pool, 1e-5)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return [out, *torch.autograd.grad(out, leaves, cotangent(out))]


@pooling
@given
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_in_float64_and_float32(shape, activation, measures, pool):
    if pool == "floor" and min(shape[2:]) < 2:
        assert "nothing would be left" in cpu.limit(torch.empty(shape), torch.empty(0), pool)
        return
    call = {"activation": activation, "pool": pool}
    wide, narrow = (arguments(shape, dtype, measures) for dtype in (torch.float64, torch.float32))
    for given_ in (wide, narrow):
        exact = exactly(lambda: results(reference.norm_activation, *wide, **call), given_[0][0].dtype)
        found = results(cpu.norm_activation, *given_, **call)
        for name, a, e in zip(("out", "dx", "dweight", "dbias"), found, exact, strict=True):
            assert_within_budget(name, a, e)


@pooling
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("width", [3, 16, 37])
def test_activations_at_exact_zeros(isa, width, activation, pool):
    """relu'(0) is 0, in whole vectors and in the rest."""
    x = torch.randn(2, 3, 4, width, dtype=torch.float64)
    x[:, 0] = 0
    x[0, 1, :, ::2] = 0
    leaves = [t.requires_grad_() for t in (x, torch.randn(3).double(), torch.zeros(3).double())]
    given = torch.zeros(3).double(), torch.ones(3).double()
    ours, expected = (
        results(f, leaves, given, activation, pool) for f in (cpu.norm_activation, reference.norm_activation)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pooling
@given
def test_derivatives(measures, pool):
    leaves, statistics = arguments((2, 2, 5, 4), torch.float64, measures)

    def call(*leaves):
        return cpu.norm_activation(*leaves, *statistics, "tanh", pool, 1e-5)[0]

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pooling
def test_strided_input_absent_parameters_and_channels_last(pool):
    x = torch.randn(3, 8, 6, 10, dtype=torch.float64)
    for view in (x[:, 1::2], x.mT, x.to(memory_format=torch.channels_last), x[:1].expand(3, -1, -1, -1)):
        actual, mean, var = cpu.norm_activation(view, None, None, None, None, "silu", pool, 1e-5)
        torch.testing.assert_close(
            actual, reference.norm_activation(view, None, None, None, None, "silu", pool, 1e-5), rtol=1e-12, atol=1e-12
        )
        expected = torch.var_mean(view, (0, 2, 3), unbiased=False)
        torch.testing.assert_close((var, mean), expected, rtol=1e-12, atol=1e-12)


@pooling
def test_a_number_that_is_not_finite_stays_in_its_pixels(pool):
    x = torch.randn(1, 2, 6, 6)
    x[0, 1, 3, 4] = float("nan")
    mean, var = torch.zeros(2), torch.ones(2)
    actual = cpu.norm_activation(x, None, None, mean, var, "identity", pool, 1e-5)[0]
    torch.testing.assert_close(
        actual, reference.norm_activation(x, None, None, mean, var, "identity", pool, 1e-5), equal_nan=True
    )
    assert actual.isnan().sum() == 1


def test_the_raw_operators_refuse_what_does_not_fit():
    ops, x, v = torch.ops.dnl, torch.randn(2, 3, 5, 4), torch.ones(3)
    for out, pool in (
        (torch.empty(2, 3, 5, 4), True),
        (torch.empty(2, 3, 3, 2), False),
        (torch.empty(2, 3, 4, 2), True),
    ):
        with pytest.raises(RuntimeError, match="norm_activation"):
            ops.norm_activation_fwd(x, v, v, "relu", out, pool)
        with pytest.raises(RuntimeError, match="norm_activation"):
            ops.norm_activation_pull(out, x, v, v, v, "relu", False, torch.empty_like(x), pool)
    for bad in (torch.ones(2), v.double()):
        with pytest.raises(RuntimeError, match="norm_activation: vector"):
            ops.norm_activation_fwd(x, bad, v, "relu", torch.empty_like(x))
    with pytest.raises(RuntimeError, match="norm_activation: x"):
        ops.norm_activation_fwd(x.mT, v, v, "relu", torch.empty_like(x.mT))


def plain(module, x):
    """What DenseNet writes: convolution first, then pooling."""
    z = activate(x if module.norm.norm is None else module.norm.norm(x), module.norm.activation)
    return nn.functional.avg_pool2d(module.conv(z), 2, ceil_mode=module.pool == "ceil")


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize(
    "pool, size", [("ceil", (8, 6)), ("ceil", (7, 5)), ("ceil", (1, 1)), ("floor", (7, 5))], ids=str
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_transition_equals_the_plain_one_with_its_running_statistics(norm, pool, size, momentum):
    ours = Transition(6, 3, norm, "relu", pool).double()
    if norm:
        ours.norm.norm.momentum = momentum
        nn.init.normal_(ours.norm.norm.weight)
    twin = copy.deepcopy(ours)
    for step in range(4):
        if step == 3:
            ours.eval(), twin.eval()
        x = torch.randn(4, 6, *size, dtype=torch.float64)
        a, b = ours(x), plain(twin, x)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        for module, out in ((ours, a), (twin, b)):
            module.zero_grad()
            out.sin().sum().backward()
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)


def test_what_only_pytorch_does_right_is_left_to_it():
    x = torch.randn(4, 3, 6, 6)
    module = NormActivation(3, "batch", "relu")
    for other in (x.bfloat16(), x.double()[:0], x[:1, :, :1, :1]):
        assert (cpu.limit(other, None) is None) == (other.numel() > 3 and other.dtype != torch.bfloat16)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1, :, :1, :1])
    module.norm = nn.SyncBatchNorm.convert_sync_batchnorm(module.norm)
    assert module._fused(x, None) is None
    module.norm = nn.BatchNorm2d(3, track_running_stats=False, affine=False).eval()
    torch.testing.assert_close(module(x), torch.relu(module.norm(x)))


def test_only_the_input_is_kept_and_compiling_takes_the_reference():
    x, module = torch.randn(4, 6, 8, 8).requires_grad_(), Transition(6, 3, "batch", "relu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = module(x)
    images = [t for t in kept if t.dim() == 4 and t.shape[1] == 6 and t.shape[0] == 4]
    assert {t.data_ptr() for t in images if t.shape[2] == 8} == {x.data_ptr()}
    assert sum(t.numel() for t in images if t.data_ptr() != x.data_ptr()) == x.numel() // 4  # what is convolved
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(out, module(x))
