"""The fused block of csrc/dnl_block against the reference in float64: every order, norm, activation, filter,
connectivity and shape; values, every gradient, statistics; and that it is what runs."""

import itertools

import pytest
import torch
from torch import nn

from dnl_kernels import _backend
from dnl_kernels.nn import DNLBlock
from dnl_kernels.ops.dnl_block import bottleneck, fused, reference
from dnl_kernels.ops.dnl_block.api import dnl_block_with_statistics
from dnl_kernels.ops.dnl_block.config import BlockConfig, LayerParameters
from dnl_kernels.testing import Exact, assert_within_budget, cotangent, exactly

TRIANGLE = ((True,), (True, True), (True, True, True))
WINDOW = ((True,), (True, True), (False, True, True))
HOLES = ((True,), (False, True), (True, False, False))
NOTHING_READ = ((False,), (True, False), (False, False, False))  # needs the input skip


def block(connectivity=TRIANGLE, growth=4, in_channels=5, **options):
    return BlockConfig(in_channels, len(connectivity), growth, connectivity, **options)


CASES = {
    "densenet": block(training=True),
    "densenet-eval": block(),
    "leaky-window": block(WINDOW, activation="leaky_relu", training=True, tau=0.5),
    "gelu-holes": block(HOLES, activation="gelu", training=True),
    "silu-eval": block(activation="silu", tau=1 / 3),
    "tanh-no-norm": block(activation="tanh", norm=None, growth=7),
    "identity": block(activation="identity", training=True),
    "plain": block(activation="identity", norm=None, growth=1),
    "pointwise": block(affine="conv1x1", training=True, growth=13),
    "paper": block(preactivation=False, training=True, tau=1 / 3),
    "paper-eval": block(preactivation=False, activation="tanh"),
    "paper-no-norm": block(WINDOW, preactivation=False, norm=None, activation="gelu"),
    "paper-pointwise": block(preactivation=False, affine="conv1x1", activation="silu", training=True),
    "paper-input-skip": block(preactivation=False, input_skip=True, training=True, tau=1 / 3, activation="leaky_relu"),
    "paper-skip-only": block(NOTHING_READ, preactivation=False, input_skip=True, norm=None, tau=0.5),
    # Smooth: Winograd's rounding differs from eager's, and one pre-activation within it of a kink decides a gradient.
    "wide": block(growth=32, in_channels=17, training=True),
}
BOTTLENECKS = {
    "bc": block(bottleneck=4, training=True),
    "bc-eval": block(bottleneck=2, activation="silu", tau=0.5),
    "bc-window": block(WINDOW, bottleneck=3, activation="gelu", training=True, tau=1 / 3),
    "bc-holes": block(HOLES, bottleneck=2, activation="tanh", training=True),
    "bc-no-norm": block(HOLES, bottleneck=2, norm=None, activation="leaky_relu", growth=3),
}
SHAPES = {
    "images": (6, 8, 8),
    "seven": (3, 7, 7),
    "one-pixel": (9, 1, 1),
    "many": (41, 5, 3),
    "whole-image-tiles": (2, 32, 32),
    "cut-into-bands": (2, 41, 67),
    "row": (2, 1, 40),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def parameters_of(config, dtype, bias=True):
    """Random tensors for every layer; a convolution under batch statistics of its output gets no bias, whose gradient
    is zero there."""
    layers = []
    for layer in range(config.num_layers):
        drawn = {}
        for name, shape in config.shapes(layer).items():
            if name.endswith("_bias") and "norm" not in name and not bias:
                continue
            t = torch.randn(shape, dtype=torch.float64)
            if name.endswith("var") or name == "norm_weight":
                t = t.abs() + 0.5
            elif name.endswith("affine_weight") or name == "skip_weight":
                t = t / (t[0].numel() ** 0.5)
            drawn[name] = t.to(dtype).requires_grad_(not name.endswith(("mean", "var")))
        layers.append(LayerParameters(**drawn))
    return layers


def cast(layers, dtype):
    return [
        LayerParameters(*(t if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in p))
        for p in layers
    ]


def named_leaves(x, layers):
    named = {"x0": x}
    for i, p in enumerate(layers):
        named |= {f"layers[{i}].{n}": t for n, t in zip(p._fields, p, strict=True) if t is not None and t.requires_grad}
    return named


def step(function, x, layers, config):
    """states, statistics and the gradient of every leaf."""
    x = x.detach().requires_grad_()
    states, statistics = function(x, layers, config)
    dstates = cotangent(states)
    named = named_leaves(x, layers)
    grads = torch.autograd.grad(states, list(named.values()), dstates, allow_unused=True)
    return states, statistics, dict(zip(named, grads, strict=True))


def biased(config):
    """Whether a bias has a gradient: not in front of batch statistics."""
    return not (config.norm and config.training and (config.bottleneck or not config.preactivation))


def check(config, shape, dtype, kernels=fused, levels=lambda: [None]):
    """States, statistics and every gradient within the budget."""
    batch, height, width = shape
    x = torch.randn(batch, config.in_channels, height, width, dtype=torch.float64).to(dtype)
    layers = parameters_of(config, dtype, biased(config))
    assert kernels.limit(x, layers, config, None) is None
    wide = x.double(), cast(layers, torch.float64)
    exact = exactly(lambda: step(reference.dnl_block, *wide, config), dtype, dtype)
    for _ in levels():
        compare(step(kernels.dnl_block, x, layers, config), exact)


def compare(found, exact):
    (states, statistics, grads), (exact_states, exact_statistics, exact_grads) = found, exact
    assert_within_budget("states", states, exact_states)
    assert {n for n, grad in grads.items() if grad is not None} == {n for n, g in exact_grads.items() if g is not None}
    for name, exact_grad in exact_grads.items():
        if exact_grad is not None:
            assert_within_budget("d" + name, grads[name], exact_grad)
    assert (statistics is None) == (exact_statistics is None)
    if statistics is not None:
        assert statistics.elements == exact_statistics.elements
        for name in ("states_mean", "states_var"):
            ours, theirs = getattr(statistics, name), getattr(exact_statistics, name)
            if theirs is not None:
                n = min(len(ours), len(theirs.value))
                used = theirs.value[:n].isfinite()
                assert_within_budget(name, ours[:n][used], Exact(theirs.value[:n][used], theirs.bound[:n][used]))
        for name in ("inner_mean", "inner_var", "output_mean", "output_var"):
            for ours, theirs in zip(getattr(statistics, name), getattr(exact_statistics, name), strict=True):
                assert_within_budget(name, ours, theirs)


@every_case
def test_against_float64_on_every_instruction_set(levels, config):
    check(config, SHAPES["images"], torch.float64, levels=levels)
    check(config, SHAPES["images"], torch.float32, levels=levels)


# In both orders, with rows narrower than a vector, wider, and of whole vectors: relu'(0) is 0, as torch's.
@pytest.mark.parametrize("width", [5, 32, 40])
@pytest.mark.parametrize("preactivation", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_at_exact_zeros(isa, activation, preactivation, width):
    config = block(activation=activation, norm=None, preactivation=preactivation)
    layers = parameters_of(config, torch.float64)
    x = torch.randn(2, 5, 6, width, dtype=torch.float64)
    x[:, ::2] = 0
    x[0, 1, :, ::3] = 0
    with torch.no_grad():
        for p in layers:  # outputs that are zero everywhere
            p.affine_weight[::2] = 0
            p.affine_bias[::2] = 0
    states, _, grads = step(fused.dnl_block, x, layers, config)
    exact, _, exact_grads = step(reference.dnl_block, x, layers, config)
    torch.testing.assert_close((states, grads), (exact, exact_grads), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["densenet", "leaky-window", "silu-eval", "paper", "paper-input-skip"])
def test_every_shape(name, shape):
    check(CASES[name], shape, torch.float64)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 23, 24), (4, 1, 1), (16, 1, 1)],
                         ids=["all-images", "single", "one-pixel", "more-of-one-pixel"])  # fmt: skip
@pytest.mark.parametrize("config", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_bottlenecks(levels, config, shape):
    check(config, shape, torch.float64, bottleneck, levels)
    check(config, shape, torch.float32, bottleneck, levels)


def test_bottlenecks_in_half_precision_keep_their_states_and_inner_maps_narrow():
    config = BOTTLENECKS["bc"]
    check(config, (2, 23, 24), torch.bfloat16, kernels=bottleneck)
    layers, kept = parameters_of(config, torch.bfloat16), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(2, 5, 23, 24).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bottleneck.dnl_block(x, layers, config)
    large = sorted(t.numel() for t in kept.values() if t.numel() > 3 * 9 * 16 * 4 and t.dtype == torch.bfloat16)
    pixels = 2 * 23 * 24
    assert large == sorted([5 * pixels, 17 * pixels, 3 * 16 * pixels])
    assert all(t.numel() < 1000 for t in kept.values() if t.dtype == torch.float32)


@pytest.mark.parametrize("shape", [(2, 2, 3), (1, 23, 23)])
def test_every_derivative_of_a_bottleneck(shape):
    """The second shape takes the path of large maps. Along random directions; test_bottlenecks has every number."""
    batch, height, width = shape
    config = block(WINDOW, growth=2, in_channels=2, bottleneck=2, activation="tanh", training=True, tau=0.5)
    layers = parameters_of(config, torch.float64, bias=False)
    x = torch.randn(batch, 2, height, width, dtype=torch.float64)
    leaves = list(named_leaves(x, layers).values())[1:]

    def function(x, *values):
        found = iter(values)
        given = [LayerParameters(*(next(found) if t is not None and t.requires_grad else t for t in p)) for p in layers]
        return bottleneck.dnl_block(x, given, config)[0]

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *leaves), fast_mode=True)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 23, 24)])
def test_a_bottleneck_is_deterministic_and_keeps_nothing_without_gradients(shape):
    config = BOTTLENECKS["bc"]
    layers = parameters_of(config, torch.float32)
    x = torch.randn(shape[0], 5, *shape[1:])
    (first, _, grads), (again, _, more) = (step(bottleneck.dnl_block, x, layers, config) for _ in range(2))
    assert torch.equal(first, again) and all(torch.equal(grads[name], more[name]) for name in grads)
    with torch.no_grad():
        assert torch.equal(bottleneck.dnl_block(x, layers, config)[0], first)


@pytest.mark.parametrize("growth", [1, 2, 3, 5, 6, 8, 11, 12, 31, 64])
def test_every_growth_rate(growth):
    check(block(growth=growth, in_channels=3, training=True), (2, 6, 5), torch.float64)
    check(block(growth=growth, in_channels=13, training=True), (3, 4, 3), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["densenet", "densenet-eval", "paper", "tanh-no-norm"])
def test_half_types(name, dtype):
    check(CASES[name], (4, 6, 6), dtype)


@pytest.mark.parametrize("name", ["densenet", "paper", "gelu-holes", "paper-input-skip"])
def test_every_derivative(name):
    config = CASES[name]._replace(activation="tanh")
    layers = parameters_of(config, torch.float64, biased(config))
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    leaves = list(named_leaves(x, layers).values())[1:]

    def function(x, *values):
        found = iter(values)
        given = [LayerParameters(*(next(found) if t is not None and t.requires_grad else t for t in p)) for p in layers]
        return fused.dnl_block(x, given, config)[0]

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *leaves))


def test_double_backward():
    config = block(((True,), (True, True)), growth=2, in_channels=2, activation="tanh", training=True)
    layers = parameters_of(config, torch.float64)
    weight = layers[1].affine_weight

    def function(x, w):
        return fused.dnl_block(x, [layers[0], layers[1]._replace(affine_weight=w)], config)[0]

    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight))


@pytest.mark.parametrize("name", ["densenet", "paper", "plain"])
def test_an_empty_batch(name):
    config = CASES[name]
    layers = parameters_of(config, torch.float32, biased(config))
    states, _, grads = step(fused.dnl_block, torch.zeros(0, 5, 4, 4), layers, config)
    assert states.shape == (0, 5 + 3 * config.growth_rate, 4, 4) and grads.pop("x0").shape == (0, 5, 4, 4)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_strided_input_and_expanded_gradient():
    config = CASES["densenet"]
    layers = parameters_of(config, torch.float64)
    wide = torch.randn(3, 10, 6, 8, dtype=torch.float64)
    for x in (wide[:, 2:7], wide[:, :5].contiguous(memory_format=torch.channels_last), wide[:, ::2, :, 1:7].mT):
        results = []
        for function in (fused.dnl_block, reference.dnl_block):
            leaf = x.detach().requires_grad_()
            results.append(torch.autograd.grad(function(leaf, layers, config)[0].square().sum(), leaf)[0])
            results.append(torch.autograd.grad(function(leaf, layers, config)[0].sum(), leaf)[0])
        torch.testing.assert_close(results[:2], results[2:])


@pytest.mark.parametrize("name", ["densenet", "paper"])
@pytest.mark.parametrize("shape", ["many", "cut-into-bands"])
def test_results_do_not_depend_on_the_thread_count(name, shape):
    config, (batch, height, width) = CASES[name], SHAPES[shape]
    layers = parameters_of(config, torch.float32)
    x = torch.randn(batch, 5, height, width)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        states, _, grads = step(fused.dnl_block, x, layers, config)
        results.append([states, *grads.values()])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_statistics_of_a_channel_far_from_zero():
    """mean 1000, deviation 1: the sums are centred, as in torch's batch normalisation."""
    config = block(training=True)
    x = torch.randn(4, 5, 9, 7) + 1000
    _, statistics = fused.dnl_block(x, parameters_of(config, torch.float32), config)
    exact = x.double().var((0, 2, 3), unbiased=False)
    assert (statistics.states_var[:5] / exact - 1).abs().max() < 1e-5


class Plain(nn.Module):
    """A DenseNet block in plain torch."""

    def __init__(self, channels, layers, growth):
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return x


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_a_module_equals_plain_torch(momentum):
    plain = Plain(4, 3, 6).double()
    module = DNLBlock(4, 3, 6, momentum=momentum, dtype=torch.float64)
    for layer, norm, conv in zip(module.layers, plain.norms, plain.convs, strict=True):
        norm.momentum = momentum
        layer.affine.weight.data.copy_(conv.weight)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, module)]
    for training in (True, True, False, True):
        x = torch.randn(5, 4, 9, 6, dtype=torch.float64)
        outputs = []
        for m, optimiser in zip((plain, module), optimisers, strict=True):
            m.train(training)
            outputs.append(m(x))
            optimiser.zero_grad()
            outputs[-1].square().mean().backward()
            optimiser.step()
        torch.testing.assert_close(*outputs)
    for layer, norm in zip(module.layers, plain.norms, strict=True):
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer.norm, name), getattr(norm, name))


def saved(config, in_channels=5):
    """Elements kept for backward, without the parameters."""
    layers = parameters_of(config, torch.float32)
    known = {t.untyped_storage().data_ptr() for p in layers for t in p if t is not None}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states, _ = fused.dnl_block(torch.randn(4, in_channels, 8, 8, requires_grad=True), layers, config)
    return sum(found.values()), states


def test_only_the_states_are_kept():
    for depth in (3, 12):
        config = block(tuple((True,) * (i + 1) for i in range(depth)), training=True)
        kept, states = saved(config)
        assert kept == states.numel() + 4 * 5 * 64 + 2 * states.shape[1]  # and the input, and two statistics a channel


def test_the_output_may_be_changed_in_place_and_then_has_memory_of_its_own():
    config = block(training=True)
    x, layers = torch.randn(2, 5, 4, 4, requires_grad=True), parameters_of(config, torch.float32)
    weights = torch.randn(fused.dnl_block(x, layers, config)[0].shape)
    (expected,) = torch.autograd.grad(fused.dnl_block(x, layers, config)[0].square(), x, weights)
    states, _ = fused.dnl_block(x, layers, config)
    assert torch._C._is_cow_tensor(states)  # shared with what is kept: consumers and the backward make no copy
    changed = states.square()
    torch.autograd.grad(changed, x, weights, retain_graph=True)
    assert torch._C._is_cow_tensor(states)
    states.square_()
    assert not torch._C._is_cow_tensor(states)
    assert torch.equal(torch.autograd.grad(states, x, weights)[0], expected)


def test_the_fused_kernels_run_by_default_and_under_compile():
    block_ = DNLBlock(3, 2, 2)
    x = torch.randn(2, 3, 4, 4)
    assert "ForwardModeOperator" in type(block_(x).grad_fn).__name__
    expected = torch.autograd.grad(block_(x).square().sum(), list(block_.parameters()))
    compiled = torch.compile(lambda x: block_(x).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), list(block_.parameters())), expected)


LIMITS = [
    (block(), "reference", "CPU kernel"),
    (block(kernel="softmax", head_dim=2, heads=2), None, "kernel='local'"),
    (block(affine="linear"), None, "linear"),
    (block(bottleneck=2, preactivation=False), None, "bottleneck"),
    (block(input_skip=True), None, "paper's order"),
]


@pytest.mark.parametrize("config, backend, reason", LIMITS, ids=[reason for _, _, reason in LIMITS])
def test_what_the_kernels_do_not_cover_has_a_reason_and_runs_anyway(config, backend, reason):
    x = torch.randn((2, 4, 5) if config.affine == "linear" else (2, 5, 4, 4), dtype=torch.float64)
    layers = parameters_of(config, torch.float64)
    assert reason in fused.limit(x, layers, config, backend)
    states, _ = dnl_block_with_statistics(x, layers, config, backend=backend)
    torch.testing.assert_close(states, reference.dnl_block(x, layers, config)[0])


def test_given_statistics_that_want_a_gradient_get_one():
    config = block()
    layers = [p._replace(norm_mean=p.norm_mean.requires_grad_()) for p in parameters_of(config, torch.float64)]
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    states, _ = dnl_block_with_statistics(x, layers, config)
    assert torch.autograd.grad(states.sum(), layers[0].norm_mean)[0].abs().sum() > 0


def test_registered_operators():
    for norm, preactivation in itertools.product(("batch", None), (True, False)):
        config = block(norm=norm, preactivation=preactivation, training=norm is not None)
        layers = parameters_of(config, torch.float64)
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
        layers = [p._replace(norm_mean=None, norm_var=None) for p in cast(layers, torch.float64)]
        with torch.no_grad():
            packed = fused.pack(config, x, layers, torch.float64)
        arguments = (x, *packed, *fused.static_arguments(config))
        torch.library.opcheck(torch.ops.dnl.dnl_block_fwd.default, arguments)
        states, mean, var, outputs = _backend.kernel("cpu", "dnl_block_fwd")(*arguments)
        if norm:
            packed = packed._replace(mean=mean, var=var)
        arguments = (torch.ones_like(states), states, outputs, *packed, *fused.static_arguments(config))
        torch.library.opcheck(torch.ops.dnl.dnl_block_bwd.default, arguments)
    for shape in ((2, 3, 4), (1, 23, 23)):
        config, x = BOTTLENECKS["bc"], torch.randn(shape[0], 5, *shape[1:], dtype=torch.float64)
        layers = parameters_of(config, torch.float64)
        tensors = [
            None if "mean" in n or "var" in n else getattr(p, n).detach() for p in layers for n in bottleneck.NAMES
        ]
        arguments = (x, tensors, True, *bottleneck._static(config))
        torch.library.opcheck(torch.ops.dnl.dnl_bottleneck_fwd.default, arguments)
        states, *extra = _backend.kernel("cpu", "dnl_bottleneck_fwd")(*arguments)
        arguments = (torch.ones_like(states), states, *extra, tensors, *bottleneck._static(config))
        torch.library.opcheck(torch.ops.dnl.dnl_bottleneck_bwd.default, arguments)
