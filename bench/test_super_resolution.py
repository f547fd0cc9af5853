"""Networks of wide 3x3 layers without norms, RRDBNet (Real-ESRGAN) and RDN, against plain torch and runtimes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dnl_kernels as dnl
from bench.comparison import DEVICE, SMOKE, Case, Way, of_module
from bench.peers import peer

SECONDS = 6.0


class Convolution(nn.Conv2d):
    """A 3x3 convolution; `ours` says whose."""

    ours = False

    def __init__(self, channels: int, outputs: int):
        super().__init__(channels, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return dnl.dense_conv2d([x], self.weight, self.bias) if self.ours else super().forward(x)


class DenseLayers(nn.Module):
    """x -> cat(x, x_1, ..., x_L), x_{l+1} = act(conv(cat of what there is))."""

    ours = False

    def __init__(self, channels: int, layers: int, growth: int, slope: float):
        super().__init__()
        self.slope, activation = slope, f"leaky_relu({slope})" if slope else "relu"
        self.block = dnl.DNLBlock(
            channels, layers, growth, norm=None, preactivation=False, activation=activation, affine="conv3x3"
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.ours:
            return self.block(x)
        states = [x]
        for layer in self.block.layers:
            y = F.conv2d(torch.cat(states, 1), layer.affine.weight, layer.affine.bias, padding=1)
            states.append(F.leaky_relu(y, self.slope) if self.slope else F.relu(y))
        return torch.cat(states, 1)


class RDB(nn.Module):
    """The residual dense block of Real-ESRGAN: four dense layers, a fifth convolution, a scaled residual."""

    def __init__(self, channels: int = 64, growth: int = 32):
        super().__init__()
        self.layers = DenseLayers(channels, 4, growth, 0.2)
        self.last = Convolution(channels + 4 * growth, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.last(self.layers(x))


class RRDBNet(nn.Module):
    """Four times the side."""

    def __init__(self, blocks: int, channels: int = 64, growth: int = 32):
        super().__init__()
        self.first, self.last = Convolution(3, channels), Convolution(channels, 3)
        self.body = nn.ModuleList(nn.Sequential(*(RDB(channels, growth) for _ in range(3))) for _ in range(blocks))
        self.trunk, *self.up = (Convolution(channels, channels) for _ in range(4))
        self.up = nn.ModuleList(self.up)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x
        for block in self.body:
            y = y + 0.2 * block(y)
        x = x + self.trunk(y)
        for conv in self.up[:2]:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return self.last(F.leaky_relu(self.up[2](x), 0.2))


class RDN(nn.Module):
    """Residual dense network of D blocks of C layers, twice the side by pixel shuffling."""

    def __init__(self, blocks: int = 4, layers: int = 6, growth: int = 32, channels: int = 64):
        super().__init__()
        self.first, self.second = Convolution(3, channels), Convolution(channels, channels)
        self.dense = nn.ModuleList(DenseLayers(channels, layers, growth, 0.0) for _ in range(blocks))
        self.fuse = nn.ModuleList(nn.Conv2d(channels + layers * growth, channels, 1) for _ in range(blocks))
        self.all = nn.Conv2d(blocks * channels, channels, 1)
        self.trunk, self.up, self.last = (
            Convolution(channels, channels), Convolution(channels, 4 * channels), Convolution(channels, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        x, found = self.second(first), []
        for dense, fuse in zip(self.dense, self.fuse, strict=True):
            x = x + fuse(dense(x))
            found.append(x)
        x = first + self.trunk(self.all(torch.cat(found, 1)))
        return self.last(F.pixel_shuffle(self.up(x), 2))


NETWORKS = {"rrdbnet": (RRDBNet, 4, 128), "rdn": (RDN, 4, 64)}


def onnx_of(model: nn.Module, x: Tensor) -> bytes:
    import io

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    return file.getvalue()


def onnxruntime(model: nn.Module, x: Tensor) -> Way:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(onnx_of(model, x), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Way(lambda: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), [x])


def openvino(model: nn.Module, x: Tensor) -> Way:
    """In float32: by default it multiplies as bfloat16 on processors that can."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    network = ov.Core().compile_model(ov.convert_model(model, example_input=x), "CPU", settings)
    return Way(lambda: torch.from_numpy(network([x.numpy()])[0]), [x])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_super_resolution(record, name, train):
    kind, blocks, size = NETWORKS[name]
    blocks, size = (1, 16) if SMOKE else (blocks, size)
    plain = kind(blocks).to(DEVICE)
    ours = copy.deepcopy(plain)
    for module in ours.modules():
        if isinstance(module, (Convolution, DenseLayers)):
            module.ours = True
    x = torch.rand(1, 3, size, size, device=DEVICE)
    ways = {"ours": of_module(ours, x, train=train), "eager": of_module(plain, x, train=train)}
    if not train and DEVICE == "cpu" and not SMOKE:
        ways["onnxruntime"] = peer("onnxruntime", lambda: onnxruntime(plain.eval(), x))
        ways["openvino"] = peer("openvino", lambda: openvino(plain.eval(), x))
    exact_x = x.double()
    exact = of_module(copy.deepcopy(plain).double(), exact_x, train=train)

    def redraw():
        exact_x.copy_(x.uniform_())

    bars = {"eager": 1.5} if train else {"eager": 1.7, "onnxruntime": 1.5, "openvino": 1.5}
    if name == "rdn":
        bars = {} if train else {"eager": 1.7}
    record(Case("network", f"{name}-{size}-B1", ways, exact, train=train, bars=bars, redraw=redraw), SECONDS)
