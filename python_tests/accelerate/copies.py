"""Dense networks in the forms in which people write them, small: the structure of well-known packages, for the tests of
the mechanism where the packages are not installed."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class ListLayer(nn.Module):
    """As torchvision's: it gets the list of all states."""

    def __init__(self, channels, growth, width, drop_rate=0.0, memory_efficient=False):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width * growth, growth, 3, padding=1, bias=False)
        self.drop_rate, self.memory_efficient = drop_rate, memory_efficient

    def bottleneck(self, *states):
        return self.conv1(self.relu1(self.norm1(torch.cat(states, 1))))

    def forward(self, states):
        if self.memory_efficient and any(x.requires_grad for x in states):
            z = checkpoint(self.bottleneck, *states, use_reentrant=False)
        else:
            z = self.bottleneck(*states)
        return F.dropout(self.conv2(self.relu2(self.norm2(z))), self.drop_rate, self.training)


class ListBlock(nn.ModuleDict):
    def __init__(self, channels, layers, growth, width=2, **options):
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = ListLayer(channels + i * growth, growth, width, **options)

    def forward(self, x):
        states = [x]
        for layer in self.values():
            states.append(layer(states))
        return torch.cat(states, 1)


class Transition(nn.Sequential):
    def __init__(self, channels, dims=2):
        super().__init__()
        self.norm = NORMS[dims](channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVOLUTIONS[dims](channels, channels // 2, 1, bias=False)
        self.pool = POOLS[dims](2, 2)


class DenseNet(nn.Module):
    """Stem, two blocks of the class given, a transition, a head."""

    def __init__(self, block=ListBlock, dims=2, **options):
        super().__init__()
        self.stem = CONVOLUTIONS[dims](3, 6, 3, padding=1)
        self.block1 = block(6, 3, 4, **options)
        self.transition = Transition(18, dims)
        self.block2 = block(9, 2, 4, **options)
        self.norm = NORMS[dims](17)
        self.head = nn.Linear(17, 5)

    def forward(self, x):
        x = self.block2(self.transition(self.block1(self.stem(x))))
        return self.head(F.relu(self.norm(x)).flatten(2).mean(2))


class JoinedLayer(nn.Module):
    """As MONAI's: a container of its own, any dimensions, and it appends its output itself."""

    def __init__(self, dims, channels, growth, width, dropout):
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("norm1", NORMS[dims](channels))
        self.layers.add_module("relu1", nn.ReLU(inplace=True))
        self.layers.add_module("conv1", CONVOLUTIONS[dims](channels, width * growth, 1, bias=False))
        self.layers.add_module("norm2", NORMS[dims](width * growth))
        self.layers.add_module("relu2", nn.ReLU(inplace=True))
        self.layers.add_module("conv2", CONVOLUTIONS[dims](width * growth, growth, 3, padding=1, bias=False))
        if dropout:
            self.layers.add_module("dropout", nn.Dropout(dropout))

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


class JoinedBlock(nn.Sequential):
    def __init__(self, channels, layers, growth, width=2, dims=2, dropout=0.0):
        super().__init__(*(JoinedLayer(dims, channels + i * growth, growth, width, dropout) for i in range(layers)))


class NormAct(nn.BatchNorm2d):
    """As timm's: the activation within the normalisation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class NormActLayer(nn.Module):
    def __init__(self, channels, growth, width):
        super().__init__()
        self.norm1 = NormAct(channels)
        self.conv1 = nn.Conv2d(channels, width * growth, 1, bias=False)
        self.norm2 = NormAct(width * growth)
        self.conv2 = nn.Conv2d(width * growth, growth, 3, padding=1, bias=False)

    def forward(self, states):
        return self.conv2(self.norm2(self.conv1(self.norm1(torch.cat(states, 1)))))


class NormActBlock(ListBlock):
    def __init__(self, channels, layers, growth, width=2):
        nn.ModuleDict.__init__(self)
        for i in range(layers):
            self[f"denselayer{i + 1}"] = NormActLayer(channels + i * growth, growth, width)


class TiramisuLayer(nn.Sequential):
    """As in FC-DenseNets: one convolution with bias, dropout of channels."""

    def __init__(self, channels, growth, dropout=0.0):
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(True))
        self.add_module("conv", nn.Conv2d(channels, growth, 3, padding=1))
        self.add_module("drop", nn.Dropout2d(dropout))


class TiramisuBlock(nn.Module):
    """The block appends; going up, only what is new is returned."""

    def __init__(self, channels, layers, growth, only_new=False, dropout=0.0):
        super().__init__()
        self.only_new = only_new
        self.layers = nn.ModuleList(TiramisuLayer(channels + i * growth, growth, dropout) for i in range(layers))

    def forward(self, x):
        new = []
        for layer in self.layers:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return torch.cat(new, 1) if self.only_new else x


class FunctionalLayer(nn.Module):
    """Activations as functions, names of its own."""

    def __init__(self, channels, growth, width=2):
        super().__init__()
        self.bn1, self.squeeze = nn.BatchNorm2d(channels), nn.Conv2d(channels, width * growth, 1, bias=False)
        self.bn2, self.expand = nn.BatchNorm2d(width * growth), nn.Conv2d(width * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.expand(F.relu(self.bn2(self.squeeze(F.relu(self.bn1(x))))))], 1)


class FunctionalBlock(nn.Sequential):
    def __init__(self, channels, layers, growth):
        super().__init__(*(FunctionalLayer(channels + i * growth, growth) for i in range(layers)))


class ResidualDenseBlock(nn.Module):
    """As BasicSR's, without norm, the last convolution to another width and scaled."""

    def __init__(self, channels=6, growth=4, slope=0.2, scale=0.2):
        super().__init__()
        for i in range(5):
            width = channels if i == 4 else growth
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels + i * growth, width, 3, 1, 1))
        self.lrelu = nn.LeakyReLU(slope, inplace=True)
        self.scale = scale

    def forward(self, x):
        states = [x]
        for i in range(1, 5):
            states.append(self.lrelu(getattr(self, f"conv{i}")(torch.cat(states, 1))))
        return self.conv5(torch.cat(states, 1)) * self.scale + x


class SequentialResidualDenseBlock(nn.Module):
    """As spandrel's: every convolution with its activation in a container."""

    def __init__(self, channels=6, growth=4):
        super().__init__()
        for i in range(4):
            conv = nn.Conv2d(channels + i * growth, growth, 3, 1, 1)
            self.add_module(f"conv{i + 1}", nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True)))
        self.conv5 = nn.Sequential(nn.Conv2d(channels + 4 * growth, channels, 3, 1, 1))

    def forward(self, x):
        states = [x]
        for i in range(1, 5):
            states.append(getattr(self, f"conv{i}")(torch.cat(states, 1)))
        return self.conv5(torch.cat(states, 1)) * 0.2 + x


class Upscaler(nn.Module):
    def __init__(self, block=ResidualDenseBlock):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(block(), block())
        self.last = nn.Conv2d(6, 12, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.last(self.body(self.first(x))), 2)


class PlainLayer(nn.Module):
    """As in residual dense networks: convolution, activation, appended."""

    def __init__(self, channels, growth):
        super().__init__()
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return torch.cat([x, self.relu(self.conv(x))], 1)


class FusedBlock(nn.Module):
    def __init__(self, channels=6, layers=3, growth=6):
        super().__init__()
        self.layers = nn.Sequential(*(PlainLayer(channels + i * growth, growth) for i in range(layers)))
        self.lff = nn.Conv2d(channels + layers * growth, growth, 1)

    def forward(self, x):
        return x + self.lff(self.layers(x))


class NonLocal(nn.Module):
    """As mmcv's, with its names and attributes."""

    def __init__(self, channels=6, dims=2, mode="embedded_gaussian", use_scale=True, sub_sample=False):
        super().__init__()
        self.in_channels, self.inter_channels = channels, channels // 2
        self.mode, self.use_scale, self.sub_sample = mode, use_scale, sub_sample
        conv = CONVOLUTIONS[dims]
        self.g, self.conv_out = conv(channels, channels // 2, 1), conv(channels // 2, channels, 1)
        pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)
        if mode != "gaussian":
            self.theta, self.phi = conv(channels, channels // 2, 1), conv(channels, channels // 2, 1)
        if sub_sample:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x):
        g = self.g(x).flatten(2).mT
        theta = x if self.mode == "gaussian" else self.theta(x)
        phi = (self.phi(x) if self.sub_sample else x) if self.mode == "gaussian" else self.phi(x)
        pairs = theta.flatten(2).mT @ phi.flatten(2)
        if self.mode == "dot_product":
            weights = pairs / pairs.shape[-1]
        else:
            scaled = self.mode == "embedded_gaussian" and self.use_scale
            weights = (pairs / theta.shape[1] ** 0.5 if scaled else pairs).softmax(-1)
        y = (weights @ g).mT.contiguous().view(len(x), self.inter_channels, *x.shape[2:])
        return x + self.conv_out(y)


class DepthWeightedAverage(nn.Module):
    """As DenseFormer's: states come one after the other, some calls return their average."""

    def __init__(self, n_blocks=5, dilation=1, period=1):
        super().__init__()
        self.n_blocks, self.dilation, self.period = n_blocks, dilation, period
        self.alphas = nn.ModuleList(
            nn.Linear((i + 1 + dilation) // dilation, 1, bias=False) if (i + 1) % period == 0 else None
            for i in range(n_blocks)
        )
        self.accumulators = None

    def init_accumulators(self, x):
        self.dtype = x.dtype  # of all states
        self.accumulators = [[x]] + [[] for _ in range(self.dilation - 1)]

    def forward(self, x, block_idx):
        states = self.accumulators[(block_idx + 1) % self.dilation]
        states.append(x.to(self.dtype))
        if (block_idx + 1) % self.period:
            return x
        return torch.tensordot(self.alphas[block_idx].weight.view(-1), torch.stack(states), dims=1)


class DenseFormer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.average = DepthWeightedAverage(**options)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        self.average.init_accumulators(x)
        for i, block in enumerate(self.blocks):
            x = self.average(torch.tanh(block(x)), i)
        return x


class Features(nn.Module):
    """As torchvision's networks: one nn.Sequential from the stem to the last normalisation, the rest in the forward."""

    def __init__(self, block=ListBlock, norm=None, pool=None):
        super().__init__()
        relu = {} if norm else {"relu0": nn.ReLU(inplace=True)}
        norm = norm or nn.BatchNorm2d
        parts = {"conv0": nn.Conv2d(3, 6, 3, padding=1), "norm0": norm(6), **relu}
        parts |= {"pool0": pool or nn.MaxPool2d(3, 2, 1), "block1": block(6, 3, 4), "transition1": Transition(18)}
        self.features = nn.Sequential(OrderedDict(parts | {"block2": block(9, 2, 4), "norm5": norm(17)}))
        self.classifier = nn.Linear(17, 5)

    def forward(self, x):
        z = F.relu(self.features(x))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(z, (1, 1)), 1))


class VolumeFeatures(nn.Module):
    """As MONAI's: activation, pooling and classifier in a second nn.Sequential; three dimensions."""

    def __init__(self):
        super().__init__()
        parts = {"conv0": nn.Conv3d(3, 6, 3, padding=1), "block1": JoinedBlock(6, 3, 4, dims=3)}
        self.features = nn.Sequential(OrderedDict(parts | {"norm5": nn.BatchNorm3d(18)}))
        self.class_layers = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(1), nn.Linear(18, 5))

    def forward(self, x):
        return self.class_layers(self.features(x))


class LinearLayer(nn.Module):
    """Of rows or tokens: a linear map and its activation, appended; norm: in front of them."""

    def __init__(self, channels, growth, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        self.act = nn.SiLU()
        self.linear = nn.Linear(channels, growth)

    def forward(self, x):
        return torch.cat([x, self.linear(self.act(self.norm(x)))], -1)


class LinearBlock(nn.Sequential):
    def __init__(self, channels=4, layers=3, growth=5, norm=True):
        super().__init__(*(LinearLayer(channels + i * growth, growth, norm) for i in range(layers)))


class Perceptron(nn.Module):
    """Linear maps in a list, the activation and the concatenation in the forward, and a last map."""

    def __init__(self, channels=4, layers=3, growth=5):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels + i * growth, growth) for i in range(layers))
        self.out = nn.Linear(channels + layers * growth, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.gelu(layer(x))], -1)
        return self.out(x)


class SharedPerceptron(Perceptron):
    """One activation module behind every map."""

    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, self.act(layer(x))], -1)
        return self.out(x)


# name: how the model is made, the shape of an input, how many blocks are accelerated
CASES = {
    "list": (DenseNet, (3, 3, 8, 7), 3),
    "list, dropout": (lambda: DenseNet(drop_rate=0.3), (3, 3, 8, 7), 3),
    "list, memory efficient": (lambda: DenseNet(memory_efficient=True), (3, 3, 8, 7), 3),
    "joined": (lambda: DenseNet(JoinedBlock), (3, 3, 8, 7), 3),
    "joined, dropout": (lambda: DenseNet(JoinedBlock, dropout=0.2), (3, 3, 8, 7), 3),
    "joined, 1d": (lambda: DenseNet(lambda *a: JoinedBlock(*a, dims=1), dims=1), (4, 3, 9), 3),
    "joined, 3d": (lambda: DenseNet(lambda *a: JoinedBlock(*a, dims=3), dims=3), (2, 3, 4, 5, 6), 3),
    "norm with activation": (lambda: DenseNet(NormActBlock), (3, 3, 8, 7), 3),
    "functional": (lambda: DenseNet(FunctionalBlock), (3, 3, 8, 7), 3),
    "features": (Features, (3, 3, 16, 14), 5),
    "features, norm with activation": (lambda: Features(NormActBlock, NormAct), (3, 3, 16, 14), 5),
    "features, 3d": (VolumeFeatures, (2, 3, 4, 5, 6), 2),
    "linear, rows": (lambda: nn.Sequential(LinearBlock()), (7, 4), 1),
    "linear, list": (lambda: nn.Sequential(Perceptron()), (7, 4), 1),
    "linear, shared activation": (lambda: nn.Sequential(SharedPerceptron()), (7, 4), 1),
    "linear, list of tokens": (lambda: nn.Sequential(Perceptron()), (2, 7, 4), 1),
    "tiramisu": (lambda: DenseNet(TiramisuBlock), (3, 3, 8, 7), 3),
    "tiramisu, dropout": (lambda: DenseNet(TiramisuBlock, dropout=0.2), (3, 3, 8, 7), 3),
    "tiramisu, alone": (lambda: nn.Sequential(TiramisuBlock(3, 3, 4)), (3, 3, 8, 7), 1),
    "tiramisu, up": (lambda: nn.Sequential(TiramisuBlock(3, 3, 4, only_new=True)), (3, 3, 8, 7), 1),
    "residual dense": (Upscaler, (2, 3, 6, 5), 2),
    "residual dense, relu": (lambda: Upscaler(lambda: ResidualDenseBlock(slope=0.01, scale=1.0)), (2, 3, 6, 5), 2),
    "residual dense, sequential": (lambda: Upscaler(SequentialResidualDenseBlock), (2, 3, 6, 5), 2),
    "residual dense network": (lambda: Upscaler(FusedBlock), (2, 3, 6, 5), 2),
    **{
        f"non-local, {mode}, {dims}d, {'sampled' if sampled else 'all'}": (
            lambda mode=mode, dims=dims, sampled=sampled: nn.Sequential(
                NonLocal(dims=dims, mode=mode, sub_sample=sampled)
            ),
            (2, 6, *(6, 4, 4)[:dims]),
            1,
        )
        for mode in ("gaussian", "embedded_gaussian", "dot_product")
        for dims in (1, 2, 3)
        for sampled in (False, True)
    },
    "non-local, unscaled": (lambda: nn.Sequential(NonLocal(use_scale=False)), (2, 6, 5, 4), 1),
    "depth-weighted": (DenseFormer, (2, 3, 4), 1),
    "depth-weighted, dilated": (lambda: DenseFormer(dilation=2), (2, 3, 4), 1),
    "depth-weighted, period": (lambda: DenseFormer(dilation=2, period=3), (2, 3, 4), 1),
}
