"""DNLBlock against torchvision's dense block: values, every gradient, running statistics, modes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock

import dnl_kernels as dnl
from dnl_kernels.nn import DNLBlock
from dnl_kernels.testing import assert_within_budget, cotangent, exactly


def shaken(module):
    """Every parameter and running statistic away from its initial value."""
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 2.0)
            nn.init.normal_(m.bias)
            if m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return module


def torchvision_block(layers=3, channels=5, growth=3, bn_size=4, dtype=torch.float64):
    return shaken(_DenseBlock(layers, channels, bn_size, growth, 0.0)).to(dtype)


def step(module, x):
    """Output and the gradients of input and parameters of one training step."""
    x = x.detach().requires_grad_()
    y = module(x)
    y = torch.cat(y, 1) if isinstance(y, list) else y
    return y, torch.autograd.grad(y, [x, *module.parameters()], cotangent(y))


def with_buffers(module, x):
    y, grads = step(module, x)
    return y, grads, [b.clone() if b.is_floating_point() else b.item() for b in module.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchvision(dtype, training):
    """Parameters come in the same order in both, so every gradient meets its own."""
    theirs = torchvision_block(dtype=dtype).train(training)
    ours, wide = dnl.accelerate(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    names = ["dx", *(f"d{name}" for name, _ in theirs.named_parameters())]
    inputs = [torch.randn(4, 5, 6, 7, dtype=dtype) for _ in range(3)]  # the running statistics show their momentum

    def steps(module, inputs):
        return [with_buffers(module, x) for x in inputs]

    # A copy each time: a forward pass in training changes the running statistics.
    exact = exactly(lambda: steps(copy.deepcopy(wide), [x.double() for x in inputs]), dtype)
    for x, (exact_y, exact_grads, exact_buffers) in zip(inputs, exact, strict=True):
        y, grads = step(ours, x)
        assert_within_budget("y", y, exact_y)
        for name, a, e in zip(names, grads, exact_grads, strict=True):
            assert_within_budget(name, a, e)
        for (name, a), e in zip(ours.named_buffers(), exact_buffers, strict=True):
            if a.is_floating_point():
                assert_within_budget(name, a, e)
            else:
                assert a == e
    assert exact_buffers[-1] == (3 if training else 0)


class Plain(nn.Module):
    """A block without a bottleneck, from PyTorch's own modules."""

    def __init__(self, channels, layers, growth, momentum, track):
        super().__init__()
        widths = [channels + growth * layer for layer in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, 1e-3, momentum, track_running_stats=track) for c in widths)
        self.convs = nn.ModuleList(nn.Conv2d(c, growth, 3, padding=1, bias=False) for c in widths)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return x


@pytest.mark.parametrize("momentum, track", [(0.1, True), (None, True), (0.3, True), (0.1, False)])
def test_running_statistics_are_those_of_batch_norm(momentum, track):
    plain = shaken(Plain(4, 3, 2, momentum, track).double())
    ours = DNLBlock(4, 3, 2, eps=1e-3, momentum=momentum, track_running_stats=track, dtype=torch.float64)
    for layer, norm, conv in zip(ours.layers, plain.norms, plain.convs, strict=True):
        layer.norm.load_state_dict(norm.state_dict())
        layer.affine.load_state_dict(conv.state_dict())
    for training in (True, True, True, False):
        x = torch.randn(3, 4, 5, 3, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours.train(training)(x), plain.train(training)(x))
    buffers = dict(plain.named_buffers())
    assert len(buffers) == (9 if track else 0)
    for (name, ours_buffer), expected in zip(ours.named_buffers(), buffers.values(), strict=True):
        torch.testing.assert_close(ours_buffer, expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_an_empty_batch_leaves_the_running_statistics():
    block = DNLBlock(2, 2, 2)
    before = copy.deepcopy(block.state_dict())
    assert block(torch.zeros(0, 2, 3, 3)).shape == (0, 6, 3, 3)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_sync_batch_norm_is_called_in_training_and_nothing_special_in_evaluation():
    block, x = DNLBlock(2, 1, 2), torch.randn(2, 2, 3, 3)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    torch.testing.assert_close(synchronised.eval()(x), block.eval()(x))
    torch.testing.assert_close(synchronised.train()(x), block.train()(x))  # one process
    assert "SyncBatchNorm in training" in synchronised.explain(x)


MASK = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])
VARIANTS = {
    "densenet": {},
    "densenet-bc": {"bottleneck": 2},
    "equation-1": {"preactivation": False, "norm": None, "input_skip": True, "tau": "1/L", "activation": "tanh"},
    "post-activation": {"preactivation": False, "connectivity": 2, "activation": "gelu"},
    "softmax": {"kernel": "softmax", "heads": 2, "projection_bias": True},
    "gaussian": {"kernel": "gaussian", "heads": 2, "head_dim": 3, "preactivation": False, "residual": True},
    "dot-tokens": {"kernel": "dot", "affine": "linear", "residual": True, "input_skip": True},
    "local-tokens": {"affine": "linear", "preactivation": False, "activation": "leaky_relu"},
    "conv1x1-masked": {"affine": "conv1x1", "connectivity": MASK, "activation": "silu", "norm": None},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(options, dtype=torch.float32, batch=3):
    block = shaken(DNLBlock(3, 3, 4, dtype=dtype, **options))
    shape = (batch, 5, 3) if options.get("affine") == "linear" else (batch, 3, 4, 5)
    return block, torch.randn(shape, dtype=dtype)


@every_variant
def test_state_dict_and_copies_keep_the_numbers(options):
    block, x = make(options)
    block.eval()
    expected = block(x)
    other = DNLBlock(3, 3, 4, backend="reference", **options).eval()
    assert list(other.state_dict()) == list(block.state_dict())
    other.load_state_dict(block.state_dict())
    wide = copy.deepcopy(other).double()
    exact = exactly(lambda: wide(x.double()), torch.float32)
    assert_within_budget("another backend", other(x), exact)
    assert_within_budget("y", expected, exact)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.backend = None
    assert torch.equal(other(x), expected)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), expected)


@every_variant
def test_trains_every_parameter_and_half_and_meta(options):
    block, x = make(options)
    loss = block(x).square().mean()
    loss.backward()
    silent = "key.bias" if options.get("kernel") == "softmax" else None  # softmax does not see a key's bias
    for name, p in block.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if silent is None or not name.endswith(silent):
            assert p.grad.abs().max() > 0, name
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(block).to(dtype)
        y = half(x.to(dtype))
        y.float().mean().backward()
        assert y.dtype == dtype and y.isfinite().all()
    shapes = DNLBlock(3, 3, 4, device="meta", **options)(x.to("meta"))
    assert shapes.device.type == "meta" and shapes.shape == block(x).shape


@every_variant
def test_gradcheck(options):
    block, x = make({**options, "activation": "tanh"}, torch.float64, batch=2)
    parameters = dict(block.named_parameters())
    x.requires_grad_()

    def function(x, *values):
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(block, {**replaced, **dict(block.named_buffers())}, x)

    assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)


def test_channels_last_input():
    block, x = make({})
    expected = block.eval()(x)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), expected)


def test_autocast():
    block, x = make({"kernel": "softmax"})
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("name", ["densenet-bc", "gaussian"])
def test_compile_fullgraph_training_step(name):
    block, x = make(VARIANTS[name])
    twin, wide = copy.deepcopy(block), DNLBlock(3, 3, 4, backend="reference", dtype=torch.float64, **VARIANTS[name])
    wide.load_state_dict(block.state_dict())
    compiled = torch.compile(twin, fullgraph=True)
    exact, exact_grads = exactly(lambda: step(wide, x.double()), torch.float32)
    for way in (compiled, block):
        y, grads = step(way, x)
        assert_within_budget("y", y, exact)
        for (parameter, _), a, e in zip([("x", x), *wide.named_parameters()], grads, exact_grads, strict=True):
            assert_within_budget(f"d{parameter}", a, e)
    for a, b in zip(twin.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    block, x = make({"bottleneck": 2})
    block.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},)).module()
    other = torch.randn(5, 3, 4, 5)
    torch.testing.assert_close(program(other), block(other))


def test_tau_scales_the_step_and_the_start_is_the_same_function():
    torch.manual_seed(0)
    absorbed = DNLBlock(3, 4, 2, dtype=torch.float64).eval()
    torch.manual_seed(0)
    explicit = DNLBlock(3, 4, 2, tau="1/L", dtype=torch.float64).eval()
    assert explicit.config.tau == 0.25
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(explicit(x), absorbed(x))
    torch.testing.assert_close(explicit.layers[0].affine.weight, absorbed.layers[0].affine.weight / 0.25)


def test_connectivity_counts_its_parameters_and_has_no_others():
    window = DNLBlock(3, 4, 2, connectivity=2)
    assert [layer.affine.in_channels for layer in window.layers] == [3, 5, 4, 4]
    masked = DNLBlock(3, 3, 2, connectivity=MASK)
    assert [layer.affine.in_channels for layer in masked.layers] == [3, 2, 5]
    empty = torch.tensor([[True, False], [False, False]])
    block = DNLBlock(3, 2, 2, connectivity=empty, input_skip=True)
    assert block.layers[1].affine is None and block.layers[1].norm is None
    assert block(torch.randn(2, 3, 4, 4)).shape == (2, 7, 4, 4)
    dense = DNLBlock(3, 3, 2)
    same = DNLBlock(3, 3, 2, connectivity=torch.ones(3, 3, dtype=torch.bool).tril().tolist())
    assert [tuple(p.shape) for p in dense.parameters()] == [tuple(p.shape) for p in same.parameters()]


ERRORS = [
    ((0, 1, 1), {}, "in_channels is 0; expected an integer >= 1"),
    ((3, 2.0, 1), {}, "num_layers is 2.0; expected an integer >= 1"),
    ((3, 2, True), {}, "growth_rate is True; expected an integer >= 1"),
    ((3, 2, 2), {"affine": "conv7x7"}, "affine is 'conv7x7'; expected one of conv3x3, conv1x1, linear"),
    ((3, 2, 2), {"norm": "group"}, "norm is 'group'; expected one of batch, None"),
    ((3, 2, 2), {"tau": 0.0}, "tau is 0.0; expected a number > 0"),
    ((3, 2, 2), {"tau": "1/N"}, "tau is '1/N'; expected a number > 0, or '1/L'"),
    ((3, 2, 2), {"heads": 2}, "heads is 2; expected 1, and no other value with kernel='local'"),
    ((3, 2, 2), {"head_dim": 2}, "head_dim is 2; expected None, and no other value with kernel='local'"),
    ((3, 2, 3), {"kernel": "dot", "heads": 2}, "heads is 2; expected a divisor of growth_rate = 3, or head_dim given"),
    ((3, 2, 2), {"kernel": "dot", "head_dim": 0}, "head_dim is 0; expected an integer >= 1"),
    ((3, 2, 2), {"kernel": "dot", "heads": 0}, "heads is 0; expected an integer >= 1"),
    ((3, 2, 2), {"bottleneck": 4, "affine": "linear"}, "bottleneck is 4 with affine='linear'; expected None"),
    ((3, 2, 2), {"residual": True}, "residual is True; expected None, and no other value with kernel='local'"),
    ((3, 2, 2), {"connectivity": "all"}, "connectivity is 'all'; expected 'dense', an integer >= 1"),
    ((3, 2, 2), {"connectivity": 0}, "connectivity is 0; expected 'dense', an integer >= 1"),
    ((3, 2, 2), {"connectivity": torch.ones(2, 2)}, r"connectivity is of shape \[2, 2\] and torch.float32; expected"),
    ((3, 2, 2), {"connectivity": torch.ones(3, 3).bool()}, r"connectivity is of shape \[3, 3\]"),
    ((3, 2, 2), {"connectivity": torch.ones(2, 2).bool()}, "connectivity is True at layer 0, state 1; expected lower"),
    ((3, 2, 2), {"connectivity": torch.eye(2).bool() & False}, r"connectivity\[0\] is without any state; expected at"),
    ((3, 2, 2), {"backend": "fast"}, "backend is 'fast'; expected None or one of"),
]


@pytest.mark.parametrize("sizes, options, message", ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_a_bad_configuration_is_named(sizes, options, message):
    with pytest.raises(ValueError, match="DNLBlock: " + message):
        DNLBlock(*sizes, **options)
