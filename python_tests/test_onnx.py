"""torch.onnx.export(dynamo=True) of every operator and module: standard operators, the same numbers in onnxruntime."""

import io

import onnxruntime
import pytest
import torch
from torch import nn

from dnl_kernels import DenseSum, DNLBlock, DNLNet, NonLocal2d
from dnl_kernels.nn.network import Transition
from dnl_kernels.testing import relative_error
from dnl_kernels.testing.operators import operators

OPERATORS = operators()


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = DenseSum(3, channels=8, channel_dim=1)
        nn.init.normal_(self.mix.weight)

    def forward(self, x):
        history = self.mix.history(x)
        history.append(torch.tanh(self.mix(history)))
        history.append(torch.tanh(self.mix(history)))
        return self.mix(history)


MODULES = {
    "block": lambda: DNLBlock(8, 2, 4),
    "block-bottleneck": lambda: DNLBlock(8, 2, 4, bottleneck=2),
    "block-paper": lambda: DNLBlock(8, 2, 4, preactivation=False, input_skip=True, activation="silu"),
    "block-softmax": lambda: DNLBlock(8, 2, 4, affine="conv1x1", kernel="softmax", heads=2),
    "block-gaussian": lambda: DNLBlock(8, 2, 4, affine="conv1x1", kernel="gaussian"),
    "net": lambda: DNLNet(8, 5, num_layers=(2, 2), growth_rate=4, bottleneck=2),
    "transition": lambda: Transition(8, 4, "batch", "gelu"),
    "nonlocal-softmax": lambda: NonLocal2d(8, zero_init=False),
    "nonlocal-gaussian": lambda: NonLocal2d(8, kernel="gaussian", zero_init=False),
    "nonlocal-dot": lambda: NonLocal2d(8, kernel="dot", zero_init=False),
    "dense-sum": Mixed,
}


def assert_exports(module, *arguments):
    module.eval()
    with torch.no_grad():
        expected = module(*arguments)
    program = torch.onnx.export(module, arguments, dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operators
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    inputs = {i.name: a.numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
    (found,) = session.run(None, inputs)
    assert relative_error(torch.from_numpy(found), expected) < 1e-5
    with torch.no_grad():
        assert torch.equal(module(*arguments), expected)  # the kernels run again


@pytest.mark.parametrize("op", OPERATORS, ids=[op.name for op in OPERATORS])
def test_operators(op):
    assert_exports(Call(op.call), *op.leaves(torch.float32, 2))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules(make):
    assert_exports(make(), torch.randn(2, 8, 6, 6))
