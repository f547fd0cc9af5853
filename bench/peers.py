"""What a user might pick instead: other packages where they are installed, and the same written by hand in torch."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.comparison import Way


def peer(package: str, make: Callable[[], Way]) -> Way | str:
    """make(), or why that peer is absent."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        return make()
    except ImportError as error:  # a package of its own that it lacks
        return f"{package} does not import: {error}"


@functools.cache
def _onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The model in evaluation, for inputs of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/model.onnx"
        torch.onnx.export(model, (torch.zeros(shape),), path, dynamo=True, external_data=False, verbose=False)
        with open(path, "rb") as file:
            return file.read()


def onnx_runtime(model: nn.Module, x: Tensor) -> Way:
    """`model(x)` by ONNX Runtime, on as many threads as torch has."""
    import onnx  # noqa: F401  (what the export needs)
    import onnxruntime
    import onnxscript  # noqa: F401

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(_onnx(model, tuple(x.shape)), options, providers=["CPUExecutionProvider"])
    name, given = session.get_inputs()[0].name, x.numpy()
    return Way(lambda: torch.from_numpy(session.run(None, {name: given})[0]), [x])


def openvino(model: nn.Module, x: Tensor) -> Way:
    """`model(x)` by OpenVINO in float32, on as many threads as torch has."""
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401
    from openvino import Core

    core = Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(_onnx(model, tuple(x.shape))), "CPU", settings).create_infer_request()
    given = x.numpy()
    return Way(lambda: torch.from_numpy(request.infer({0: given})[0].copy()), [x])


def sdpa_gaussian(q: Tensor, k: Tensor, v: Tensor, bandwidth: float) -> Tensor:
    """softmax(q.k - |k|^2 / 2) through one more feature, padded to the multiple of 8 that SDPA's fast path likes."""
    q, k = q / bandwidth, k / bandwidth
    width = q.shape[-1]
    bias = -k.square().sum(-1, keepdim=True) / 2
    pad = -(width + 1) % 8
    q = F.pad(torch.cat([q, torch.ones_like(bias)], -1), (0, pad))
    k = F.pad(torch.cat([k, bias], -1), (0, pad))
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]


def keops_gaussian(q: Tensor, k: Tensor, v: Tensor, bandwidth: float) -> Tensor:
    """[1, 1, N, D]: KeOps's normalised Gaussian convolution."""
    from pykeops.torch import LazyTensor

    x, y = LazyTensor(q[0, 0][:, None] / bandwidth), LazyTensor(k[0, 0][None] / bandwidth)
    weights = -((x - y) ** 2).sum(-1) / 2
    return weights.sumsoftmaxweight(LazyTensor(v[0, 0][None].contiguous()), axis=1)[None, None]


class PlainNonLocal2d(nn.Module):
    """Wang et al.'s block as it is usually written: two products and a softmax over all pairs of pixels."""

    def __init__(self, theta: nn.Module, phi: nn.Module, g: nn.Module, out: nn.Module, norm: nn.Module):
        super().__init__()
        self.theta, self.phi, self.g, self.out, self.norm = theta, phi, g, out, norm

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        weights = torch.softmax(theta.mT @ phi / theta.shape[1] ** 0.5, -1)
        y = (weights @ g.mT).mT.unflatten(2, x.shape[2:])
        return x + self.norm(self.out(y))


class PlainNormActivation(nn.Module):
    """BN and ReLU of a NormActivation's parameters."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


class PlainTransition(nn.Module):
    """DenseNet's: the convolution first, then the pooling."""

    def __init__(self, norm: nn.BatchNorm2d, conv: nn.Conv2d):
        super().__init__()
        self.norm, self.conv = PlainNormActivation(norm), conv

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.conv(self.norm(x)), 2, ceil_mode=True)


class PlainDenseBlock(nn.Module):
    """BN, ReLU, 3x3 convolution of the concatenation, L times."""

    def __init__(self, channels: int, layers: int, growth: int):
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            states.append(conv(torch.relu(norm(torch.cat(states, 1)))))
        return torch.cat(states, 1)


class PlainAttentionBlock(nn.Module):
    """The dense attention block by hand: BN, ReLU and 1x1 convolution of the concatenation, SDPA over the pixels."""

    def __init__(self, channels: int, layers: int, growth: int, heads: int = 1):
        super().__init__()
        widths = [channels + i * growth for i in range(layers)]
        self.heads = heads
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 1, bias=False) for w in widths)
        self.projections = nn.ModuleList(nn.Linear(growth, 3 * growth, bias=False) for _ in widths)
        self.outputs = nn.ModuleList(nn.Linear(growth, growth, bias=False) for _ in widths)

    def forward(self, x: Tensor) -> Tensor:
        states, size = [x], x.shape[2:]
        for norm, conv, projection, output in zip(self.norms, self.convs, self.projections, self.outputs, strict=True):
            y = conv(torch.relu(norm(torch.cat(states, 1)))).flatten(2).mT
            parts = projection(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*parts)
            states.append(output(attended.transpose(1, 2).flatten(2)).mT.unflatten(2, size))
        return torch.cat(states, 1)


def dense_sums_eager(states: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """All depth-weighted sums y_l = sum_{j <= l} w_lj x_j, a product and an addition at a time."""
    found = []
    for call in range(len(states)):
        y = weight[call, 0] * states[0]
        for j in range(1, call + 1):
            y = y + weight[call, j] * states[j]
        found.append(y)
    return found


def dense_sums_stacked(states: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The same as DenseFormer publishes its formula: a stack of the states so far, contracted with the weights."""
    return [
        torch.einsum("j,j...->...", weight[call, : call + 1], torch.stack(list(states[: call + 1])))
        for call in range(len(states))
    ]


def hyper_connections(layers: int, width: int, branch: Callable[[], nn.Module], streams: int = 4) -> Any:
    """A stack of blocks with hyper-connections' residual streams around them: another way to keep depth connected."""
    from hyper_connections import get_init_and_expand_reduce_stream_functions

    init, expand, reduce = get_init_and_expand_reduce_stream_functions(streams)
    wrapped = nn.ModuleList(init(dim=width, branch=branch()) for _ in range(layers))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = wrapped

        def forward(self, x):
            x = expand(x)
            for block in self.blocks:
                x = block(x)
            return reduce(x)

    return Stack()
