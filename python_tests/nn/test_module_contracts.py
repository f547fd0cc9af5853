"""What holds for every module: checkpoints, memory formats, changes in place, torch.func."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnl_kernels import DenseSum, DNLBlock, DNLNet, NonLocal2d
from dnl_kernels.nn.network import NormActivation, Transition
from dnl_kernels.testing import relative_error


class Mixed(nn.Module):
    """Layers between depth-weighted sums."""

    def __init__(self):
        super().__init__()
        self.mix, self.conv = DenseSum(3), nn.Conv2d(4, 4, 3, padding=1)
        nn.init.normal_(self.mix.weight)

    def forward(self, x):
        history = self.mix.history(x)
        for _ in range(2):
            history.append(torch.tanh(self.conv(self.mix(history))))
        return self.mix(history)


IMAGES = {
    "block": lambda: DNLBlock(4, 3, 2),
    "block-bottleneck": lambda: DNLBlock(4, 3, 2, bottleneck=4),
    "block-paper": lambda: DNLBlock(4, 2, 3, preactivation=False, input_skip=True),
    "block-softmax": lambda: DNLBlock(4, 2, 3, affine="conv1x1", kernel="softmax"),
    "block-composed": lambda: DNLBlock(4, 2, 3, preactivation=False, bottleneck=2),
    "net": lambda: DNLNet(4, 3, num_layers=(2, 2), growth_rate=2, bottleneck=2),
    "norm-activation": lambda: NormActivation(4, "batch", "silu"),
    "transition": lambda: Transition(4, 2, "batch", "relu"),
    "nonlocal-softmax": lambda: NonLocal2d(4, zero_init=False),
    "nonlocal-gaussian": lambda: NonLocal2d(4, kernel="gaussian", zero_init=False),
    "nonlocal-dot": lambda: NonLocal2d(4, kernel="dot", zero_init=False),
    "dense-sum": Mixed,
}
every_module = pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def close(actual, expected, dtype):
    """By the size of the largest gradient of all: those of biases in front of a batch norm are rounding."""
    scale = max(e.abs().max().item() for e in expected)
    bound = (1e-11 if dtype == torch.float64 else 2e-5) * max(scale, 1.0)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert (a - e).abs().max() < bound, (i, (a - e).abs().max())


def step(module, x, function=None, change=None):
    """Output, gradients of the input and of every parameter, buffers, after one training step."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    output = (function or module)(x)
    kept = output.detach().clone()
    output = output if change is None else change(output)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output)
    output.backward(weights)
    return [kept, x.grad, *(p.grad for p in module.parameters())], list(module.buffers())


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_updates_running_statistics_once(make, dtype, reentrant):
    module = make().to(dtype)
    plain, x = copy.deepcopy(module), torch.randn(3, 4, 6, 6).to(dtype)
    expected, expected_buffers = step(plain, x)
    found, buffers = step(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, buffers, expected_buffers))


@every_module
@both_dtypes
def test_every_memory_format_of_parameters_inputs_and_gradients(make, dtype):
    original, x = make().to(dtype), torch.randn(3, 4, 6, 5, dtype=dtype)
    formats = (torch.contiguous_format, torch.channels_last)
    expected = None
    for of_parameters, of_input, of_gradient in itertools.product(formats, repeat=3):
        module = copy.deepcopy(original).to(memory_format=of_parameters)

        def backward_in_format(output, of_gradient=of_gradient):
            if output.dim() == 4:
                output.register_hook(lambda g: g.contiguous(memory_format=of_gradient))
            return output.clone()

        found, buffers = step(module, x.to(memory_format=of_input), change=backward_in_format)
        if expected is None:
            expected, expected_buffers = found, buffers
        close(found, expected, dtype)
        for a, e in zip(buffers, expected_buffers, strict=True):
            torch.testing.assert_close(a, e)


@every_module
@both_dtypes
def test_the_output_may_be_changed_in_place(make, dtype):
    module, x = make().to(dtype), torch.randn(2, 4, 6, 6, dtype=dtype)
    expected, _ = step(copy.deepcopy(module), x, change=lambda y: y.mul(2).relu())
    found, _ = step(module, x, change=lambda y: y.mul_(2).relu_())
    assert all(map(torch.equal, found, expected))


@every_module
@both_dtypes
def test_gradients_per_sample_in_evaluation(make, dtype):
    module = make().to(dtype).eval()
    x = torch.randn(3, 4, 6, 6, dtype=dtype)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, sample[None]).square().sum()

    actual = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        module.zero_grad()
        module(x[i : i + 1]).square().sum().backward()
        close([actual[name][i] for name in parameters], [p.grad for p in module.parameters()], dtype)


@every_module
def test_jacobians_of_the_input_in_evaluation(make):
    module = make().double().eval().requires_grad_(False)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in output.flatten()]
    expected = torch.stack(rows).unflatten(0, output.shape)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert relative_error(transform(module)(x), expected) < 1e-11


@pytest.mark.parametrize("bottleneck", [None, 2])
def test_training_under_torch_func_updates_running_statistics(bottleneck):
    """As nn.BatchNorm2d does there."""
    module = DNLBlock(4, 2, 3, bottleneck=bottleneck).double()
    plain, x = copy.deepcopy(module), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected, expected_buffers = step(plain, x, change=torch.square)
    buffers = dict(module.named_buffers())

    def loss(parameters):
        return torch.func.functional_call(module, (parameters, buffers), x).square()

    weights = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).reshape(expected[0].shape)
    _, pull = torch.func.vjp(loss, {name: p.detach() for name, p in module.named_parameters()})
    (found,) = pull(weights)
    close(list(found.values()), expected[2:], torch.float64)
    for a, e in zip(module.buffers(), expected_buffers, strict=True):
        torch.testing.assert_close(a, e)
