"""Whole networks: a training step of ours against the same network in plain torch and in the packages users pick."""

import copy

import pytest
import torch
from torch import nn

from bench.comparison import DEVICE, SMOKE, Case, Way, compiled, of_module
from bench.peers import (
    PlainAttentionBlock,
    PlainDenseBlock,
    PlainNormActivation,
    PlainTransition,
    hyper_connections,
    onnx_runtime,
    openvino,
    peer,
)
from dnl_kernels.nn import DenseSum, DNLBlock, DNLNet, accelerate

SECONDS = 1.0


def loss_way(model: nn.Module, x: torch.Tensor, **options) -> Way:
    labels = torch.arange(len(x), device=x.device) % 10
    base = of_module(model, x, **options)
    return base._replace(call=lambda: nn.functional.cross_entropy(model(x), labels))


def plain(network: DNLNet) -> DNLNet:
    """A copy in plain torch, as a DenseNet is written, with the same weights."""
    twin = copy.deepcopy(network)
    twin.norm = PlainNormActivation(twin.norm.norm)
    for i, transition in enumerate(twin.transitions):
        twin.transitions[i] = PlainTransition(transition.norm.norm, transition.conv)
    for i, block in enumerate(network.blocks):
        config = block.config
        other = PlainDenseBlock(config.in_channels, config.num_layers, config.growth_rate)
        for norm, conv, layer in zip(other.norms, other.convs, block.layers, strict=True):
            norm.load_state_dict(layer.norm.state_dict())
            conv.load_state_dict(layer.affine.state_dict())
        twin.blocks[i] = other.to(DEVICE)
    return twin


@pytest.mark.parametrize("layers", [8, 16, 32])
def test_paper_densenet(record, layers):
    batch, size = (2, 8) if SMOKE else (64, 28) if layers < 32 else (32, 28)
    network = DNLNet.paper(num_layers=layers).to(DEVICE)
    x = torch.rand(batch, 3, size, size, device=DEVICE)
    twin = plain(network)
    exact = copy.deepcopy(twin).double()
    ways = {"ours": loss_way(network, x), "eager": _ordered(loss_way(twin, x), twin, network),
            "compile": "compiling a training step of these networks takes many minutes"}  # fmt: skip
    bars = {"eager": 3.5} if layers == 16 else {}
    exact_x = x.double()
    reference = _ordered(loss_way(exact, exact_x), exact, network)

    def redraw():
        exact_x.copy_(x.uniform_())

    record(Case("network", f"paper-L{layers}-28x28-B{batch}", ways, reference, bars=bars, redraw=redraw), SECONDS)


def _ordered(one: Way, plain_network: nn.Module, network: nn.Module) -> Way:
    """The way's leaves in the order of `network`'s parameters."""
    of = dict(plain_network.named_parameters())

    def name(ours: str) -> str:
        head, _, rest = ours.partition(".layers.")
        if not rest:
            return ours
        index, kind, leaf = rest.split(".")
        return f"{head}.{'norms' if kind == 'norm' else 'convs'}.{index}.{leaf}"

    return one._replace(leaves=[of[name(n)] for n, _ in network.named_parameters()])


@pytest.mark.parametrize("batch, bar", [(4, 1.7), (16, 1.8)])
def test_densenet121(record, batch, bar):
    import torchvision

    batch, size = (2, 64) if SMOKE else (batch, 224)
    model = torchvision.models.densenet121(num_classes=10).to(DEVICE)
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    ours, lean = accelerate(copy.deepcopy(model)), torchvision.models.densenet121(
        memory_efficient=True, num_classes=10
    ).to(DEVICE)  # fmt: skip
    lean.load_state_dict(model.state_dict())

    def timm(**options):
        import timm

        return loss_way(timm.create_model("densenet121", num_classes=10, **options).to(DEVICE), x, same=False)

    plain_way = loss_way(model, x)
    # Accelerated blocks are the same modules.
    ways = {
        "ours": loss_way(ours, x),
        "torchvision": plain_way,
        "torchvision memory_efficient": loss_way(lean, x),
        "timm": peer("timm", timm),
        "timm memory_efficient": peer("timm", lambda: timm(memory_efficient=True)),
    }
    exact = loss_way(copy.deepcopy(model).double(), x.double())
    record(Case("network", f"densenet121-B{batch}-{size}", ways, exact, bars={"torchvision": bar}), SECONDS)


# Channels of the input, layers, growth rate, images, their side: the blocks of densenet121 and of DenseNet-BC-100.
BOTTLENECKS = [
    (64, 6, 32, 4, 56), (128, 12, 32, 4, 28), (256, 24, 32, 4, 14), (512, 16, 32, 4, 7),
    (24, 16, 12, 64, 32), (108, 16, 12, 64, 16), (150, 16, 12, 64, 8), (24, 4, 12, 8, 4),
]  # fmt: skip


@pytest.mark.parametrize("channels, layers, growth, batch, size", BOTTLENECKS)
def test_bottleneck_block(record, channels, layers, growth, batch, size):
    """A training step of torchvision's block: ours, eager, and eager on channels-last images."""
    from torchvision.models.densenet import _DenseBlock

    layers, batch, size = (2, 2, 6) if SMOKE else (layers, batch, size)
    plain_block = _DenseBlock(layers, channels, 4, growth, 0.0).to(DEVICE)
    x = torch.randn(batch, channels, size, size, device=DEVICE)
    ours, exact = accelerate(copy.deepcopy(plain_block)), copy.deepcopy(plain_block).double()
    last = copy.deepcopy(plain_block).to(memory_format=torch.channels_last)
    leaves = [t.detach().requires_grad_() for t in (x, x.to(memory_format=torch.channels_last), x.double())]
    ways = {
        "ours": of_module(ours, leaves[0]),
        "eager": of_module(plain_block, leaves[0]),
        "eager channels_last": of_module(last, leaves[1]),
    }
    name = f"bottleneck-L{layers}-G{growth}-{size}x{size}-B{batch}"
    record(Case("network", name, ways, of_module(exact, leaves[2]), bars={"eager": 1.5}), SECONDS)


def settled(model: nn.Module, size: int) -> nn.Module:
    """The model in evaluation, its running statistics those of some images."""
    model.to(DEVICE).train()
    with torch.no_grad():
        for _ in range(1 if SMOKE else 20):
            model(torch.randn(4, 3, size, size, device=DEVICE))
    return model.eval()


def evaluation_case(name: str, model: nn.Module, x: torch.Tensor, bars: dict[str, float]) -> Case:
    """A torchvision DenseNet without gradients: ours, eager, torch.compile and the runtimes."""
    eager = of_module(model, x, train=False)._replace(leaves=[x])
    ours = of_module(accelerate(copy.deepcopy(model)), x, train=False)._replace(leaves=[x])
    ways = {"ours": ours, "eager": eager, "compile": compiled(eager, torch.compile(model, dynamic=False))}
    if DEVICE == "cpu":
        ways |= {
            "onnxruntime": peer("onnxruntime", lambda: onnx_runtime(model, x)),
            "openvino": peer("openvino", lambda: openvino(model, x)),
        }
    exact_x = x.double()
    exact = of_module(copy.deepcopy(model).double(), exact_x, train=False)._replace(leaves=[exact_x])
    return Case("network", name, ways, exact, train=False, bars=bars)


BARS = {"eager": 1.9, "compile": 1.3, "onnxruntime": 1.1, "openvino": 1.1}
LARGE_BARS = {"eager": 1.6, "onnxruntime": 1.0, "openvino": 1.0}
EVALUATED = [
    ("densenet121", 1, BARS), ("densenet121", 8, BARS | {"compile": 1.5}),
    *((name, batch, LARGE_BARS) for name in ("densenet161", "densenet169", "densenet201") for batch in (1, 4)),
]  # fmt: skip
if SMOKE:  # where all are of one small image
    EVALUATED = [*{name: (name, batch, bars) for name, batch, bars in EVALUATED}.values()]


@pytest.mark.parametrize("name, batch, bars", EVALUATED, ids=lambda v: str(v) if not isinstance(v, dict) else "")
def test_densenet_in_evaluation(record, name, batch, bars):
    import torchvision

    batch, size = (1, 32) if SMOKE else (batch, 224)
    model = settled(getattr(torchvision.models, name)(num_classes=10), 64 if SMOKE else 96)
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    record(evaluation_case(f"{name}-eval-B{batch}-{size}", model, x, bars), SECONDS)


def densenet_bc(growth: int = 12, layers: int = 16) -> nn.Module:
    """DenseNet-BC for CIFAR (100 layers for 16 in a block), with torchvision's blocks and its own stem."""
    import torchvision

    model = torchvision.models.DenseNet(growth, (layers,) * 3, 2 * growth, num_classes=10)
    model.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def test_densenet_bc_in_evaluation(record):
    batch, size = (2, 16) if SMOKE else (64, 32)
    model = settled(densenet_bc(), size)
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    case = evaluation_case(f"densenet-bc-100-eval-B{batch}-{size}", model, x, {"eager": 2.0, "compile": 1.5})
    record(case, SECONDS)


def test_densenet_bc_in_training(record):
    batch, size = (2, 16) if SMOKE else (64, 32)
    model = densenet_bc().to(DEVICE)
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    ways = {"ours": loss_way(accelerate(copy.deepcopy(model)), x), "eager": loss_way(model, x)}
    exact = loss_way(copy.deepcopy(model).double(), x.double())
    record(Case("network", f"densenet-bc-100-B{batch}-{size}", ways, exact, bars={"eager": 2.5}), SECONDS)


def test_dense_attention(record):
    """A block of 8 dense softmax layers on 32 x 32 images: bars of the CPU issue."""
    batch, size = (2, 8) if SMOKE else (8, 32)
    block = DNLBlock(16, 8, 16, affine="conv1x1", kernel="softmax").to(DEVICE)
    twin = PlainAttentionBlock(16, 8, 16).to(DEVICE)
    for i, layer in enumerate(block.layers):
        twin.norms[i].load_state_dict(layer.norm.state_dict())
        with torch.no_grad():
            twin.convs[i].weight.copy_(layer.affine.weight)
            parts = [layer.query.weight, layer.key.weight, layer.value.weight]
            twin.projections[i].weight.copy_(torch.cat(parts))
            twin.outputs[i].weight.copy_(layer.output.weight)
    x = torch.randn(batch, 16, size, size, device=DEVICE)
    leaves = x.clone().requires_grad_()
    ways = {"ours": of_module(block, leaves), "eager": of_module(twin, leaves)}
    exact_x = x.double().requires_grad_()
    exact = of_module(copy.deepcopy(twin).double(), exact_x)
    # Parameters are stored differently, so the output and the gradient of x are what is compared.
    ways = {name: one._replace(leaves=[leaves]) for name, one in ways.items()}
    record(Case("network", f"dense-attention-L8-{size}x{size}-B{batch}", ways, exact._replace(leaves=[exact_x]),
                bars={"eager": 3.0}), SECONDS)  # fmt: skip


class Transformer(nn.Module):
    """`layers` pre-norm blocks; `mix` makes every block's input a weighted sum of all earlier states."""

    def __init__(self, layers: int, width: int, mix: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.mix = DenseSum(layers + 1) if mix else None
        self.weight = None if mix else nn.Parameter(torch.eye(layers + 1))

    def forward(self, x):
        if self.mix is not None:
            history = self.mix.history(x)
            y = self.mix(history)
            for block in self.blocks:
                history.append(block(y))
                y = self.mix(history)
            return y
        states, y = [x], self.weight[0, 0] * x
        for i, block in enumerate(self.blocks):
            states.append(block(y))
            y = sum(self.weight[i + 1, j] * state for j, state in enumerate(states))
        return y


def test_depth_weighted_transformer(record):
    """12 layers with sums over depth, by DenseSum and by hand; hyper-connections as another way to connect depth."""
    layers, width, shape = 12, 256, (2, 16) if SMOKE else (8, 128)
    ours, twin = (Transformer(layers, width, mix).to(DEVICE) for mix in (True, False))
    twin.blocks.load_state_dict(ours.blocks.state_dict())
    x = torch.randn(*shape, width, device=DEVICE)
    a = x.clone().requires_grad_()

    def ordered(model, leaf):
        weight = model.mix.weight if model.mix is not None else model.weight
        one = of_module(model, leaf)
        return one._replace(leaves=[leaf, weight, *model.blocks.parameters()])

    exact_x, exact = x.double().requires_grad_(), copy.deepcopy(twin).double()

    def streams():
        def branch():
            return nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )

        return of_module(hyper_connections(layers, width, branch), a, same=False)

    ways = {"ours": ordered(ours, a), "eager": ordered(twin, a),
            "hyper-connections (feed-forward blocks only)": peer("hyper_connections", streams)}  # fmt: skip
    record(Case("network", "depth-weighted-transformer-L12", ways, ordered(exact, exact_x)), SECONDS)
