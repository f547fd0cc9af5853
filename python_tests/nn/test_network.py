"""DNLNet, and torchvision's densenet121 with its blocks accelerated."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import densenet121

import dnl_kernels as dnl
from dnl_kernels.testing import relative_error


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (7, 5), (28, 28)])
def test_the_paper_network_takes_images_of_any_size(size):
    net = dnl.DNLNet.paper(2, in_channels=1, num_classes=10)
    assert net(torch.randn(2, 1, *size)).shape == (2, 10)


def test_the_paper_network_is_what_it_says():
    net = dnl.DNLNet.paper(4)
    assert [block.config.num_layers for block in net.blocks] == [4] * 4
    assert [block.config.growth_rate for block in net.blocks] == [6] * 4
    # stem 12; each block adds 4 * 6 channels, each transition halves them
    assert [block.config.in_channels for block in net.blocks] == [12, 18, 21, 22]
    assert net.classifier.in_features == 46
    assert all(block.config.bottleneck is None and block.config.tau == 1.0 for block in net.blocks)
    assert not any(name.endswith("bias") and "norm" not in name for name, _ in net.named_parameters()
                   if not name.startswith("classifier"))  # fmt: skip


class Plain(nn.Module):
    """DNLNet.paper from PyTorch's own modules, with its parameters."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x):
        net = self.net
        x = net.stem(x)
        for index, block in enumerate(net.blocks):
            if index:
                transition = net.transitions[index - 1]
                x = transition.conv(torch.relu(transition.norm.norm(x)))
                x = nn.functional.avg_pool2d(x, 2)
            for layer in block.layers:
                x = torch.cat([x, layer.affine(torch.relu(layer.norm(x)))], 1)
        return net.classifier(torch.relu(net.norm.norm(x)).mean((2, 3)))


def test_equals_the_plain_network_over_training_steps():
    net = dnl.DNLNet.paper(3, in_channels=1).double()
    plain = Plain(net)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (net, plain)]
    for _ in range(3):
        x, target = torch.rand(6, 1, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))
        losses = []
        for module, optimizer in zip((net, plain), optimizers, strict=True):
            loss = nn.functional.cross_entropy(module(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for (name, a), b in zip(net.state_dict().items(), plain.net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options",
    [
        {"preactivation": False, "norm": None, "tau": "1/L", "input_skip": True, "activation": "tanh"},
        {"kernel": "softmax", "preactivation": False},
        {"kernel": "gaussian", "heads": 2},
        {"bottleneck": 2, "compression": 1.0, "stem_channels": 5},
    ],
)
def test_variants_train(options):
    net = dnl.DNLNet.paper(2, in_channels=1, **options)
    loss = nn.functional.cross_entropy(net(torch.rand(4, 1, 8, 8)), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_layers": []}, "num_layers is empty"),
        ({"num_layers": [2], "compression": 0}, r"compression is 0; expected a number in \(0, 1\]"),
        ({"num_layers": [2], "affine": "linear"}, "affine is 'linear'; expected 'conv3x3' or 'conv1x1'"),
    ],
)
def test_a_bad_network_is_named(arguments, message):
    with pytest.raises(ValueError, match="DNLNet: " + message):
        dnl.DNLNet(3, 10, growth_rate=4, **arguments)


def train_step(model, x, target):
    loss = nn.functional.cross_entropy(model(x), target)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def test_accelerated_densenet121_equals_the_original():
    """In float64: with float32 batch statistics of a few values, either network is 1e-3 from the truth."""
    torch.manual_seed(0)
    original = densenet121(weights=None).double()
    fast = copy.deepcopy(original)
    assert len(dnl.accelerate(fast, report=True).accelerated) == 9
    x, target = torch.rand(2, 3, 64, 64, dtype=torch.float64), torch.tensor([3, 5])
    for _ in range(2):
        loss, grads = train_step(fast, x, target)
        expected, expected_grads = train_step(original, x, target)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for (name, _), a, e in zip(original.named_parameters(), grads, expected_grads, strict=True):
            assert relative_error(a, e) < 1e-6, name
    for (name, e), a in zip(original.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), original.eval()(x), rtol=1e-9, atol=1e-9)
