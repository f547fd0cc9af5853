"""What users do to the modules of a network, before and after it is accelerated: the same as for the original."""

import types

import pytest
import torch
from compare import assert_same, everything, randomise
from copies import DenseNet, JoinedBlock, ListBlock, NormActBlock, SharedPerceptron, TiramisuBlock
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dnl_kernels as dnl
from dnl_kernels.nn.families import dense

B = "block1.denselayer2"


def later(model):
    return model.block1.denselayer2


class Wrapped(nn.Module):
    """As a LoRA adapter stands in the place of a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False, dtype=base.weight.dtype)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, dtype=base.weight.dtype)
        randomise(self, 9)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Scaled(nn.Module):
    """A wrapper of a whole layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states):
        return 0.5 * self.layer(states)


class OtherLayer(type(ListBlock(1, 1, 1).denselayer1)):
    """The same children, another meaning."""

    def forward(self, states):
        return 2 * super().forward(states)


def put(path, make):
    """A module in the place of another one, which it is made of."""

    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        new = make(getattr(parent, name))
        parent._modules[name] = new.to(next(model.parameters()).dtype)

    return change


def attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def frozen(paths):
    def change(model):
        for path in paths:
            model.get_submodule(path).eval()
            for parameter in model.get_submodule(path).parameters():
                parameter.requires_grad_(False)

    return change


def conv(like, **options):
    new = nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, bias=False, **options)
    new.weight = like.weight
    return new


def batch_norm(like, **options):
    return randomise(nn.BatchNorm2d(like.num_features, **options), 3)


def frozen_batch_norm(like):
    from torchvision.ops import FrozenBatchNorm2d

    new = FrozenBatchNorm2d(like.num_features, eps=1e-3)
    new.load_state_dict(like.state_dict(), strict=False)
    return new


def with_bias(model):
    model.block1.denselayer2.conv2.bias = nn.Parameter(torch.linspace(0, 1, 4, dtype=torch.float64))


def other_forward(model):
    """On the instance."""
    layer = later(model)
    layer.forward = types.MethodType(lambda self, states: 3 * type(self).forward(self, states), layer)


def other_layer(model):
    new = OtherLayer(10, 4, 2).double()
    new.load_state_dict(model.block1.denselayer2.state_dict())
    model.block1["denselayer2"] = new


def other_block_forward(model):
    block = model.block1
    block.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), block)


def frozen_with_eps(model):
    put(f"{B}.norm1", frozen_batch_norm)(model)
    model(torch.zeros(1, 3, 8, 7, dtype=torch.float64))
    later(model).norm1.eps = 0.5


def pruned(model):
    for module in model.modules():
        if type(module) is nn.Conv2d:
            prune.random_unstructured(module, "weight", 3)


def plus_one(module, inputs):
    return (inputs[0] + 1,)


def one_more(model):
    model.block2["denselayer3"] = type(model.block2.denselayer1)(17, 4, 2).double()
    randomise(model.block2, 4)
    model.norm = batch_norm(nn.BatchNorm2d(21)).double()
    model.head = randomise(nn.Linear(21, 5), 5).double()


def one_less(model):
    del model.block2["denselayer2"]
    model.norm = batch_norm(nn.BatchNorm2d(13)).double()
    model.head = randomise(nn.Linear(13, 5), 5).double()


NORMS = [
    f"block{b}.denselayer{i}.norm{n}" for b, layers in ((1, 3), (2, 2)) for i in range(1, layers + 1) for n in (1, 2)
]
MUTATIONS = {
    "leaky relu": put(f"{B}.relu1", lambda old: nn.LeakyReLU(0.2)),
    "leaky relu twice": lambda model: [put(f"{B}.relu{i}", lambda old: nn.LeakyReLU(0.2))(model) for i in (1, 2)],
    "silu": put(f"{B}.relu2", lambda old: nn.SiLU()),
    "prelu": put(f"{B}.relu2", lambda old: nn.PReLU()),
    "no activation": put(f"{B}.relu1", lambda old: nn.Identity()),
    "dilated": put(f"{B}.conv2", lambda old: conv(old, padding=2, dilation=2)),
    "dilated in place": lambda model: [setattr(later(model).conv2, n, (2, 2)) for n in ("padding", "dilation")],
    "circular padding": put(f"{B}.conv2", lambda old: conv(old, padding=1, padding_mode="circular")),
    "reflected padding": put(f"{B}.conv2", lambda old: conv(old, padding=1, padding_mode="reflect")),
    "transition without pooling": put("transition.pool", lambda old: nn.Identity()),
    "transition with max pooling": put("transition.pool", lambda old: nn.MaxPool2d(2, 2)),
    "transition with padded pooling": put("transition.pool", lambda old: nn.AvgPool2d(2, 2, padding=1)),
    "transition with ceil pooling": attribute("transition.pool", "ceil_mode", True),
    "transition with padded convolution": attribute("transition.conv", "padding", (1, 1)),
    "transition with bias": put("transition.conv", lambda old: randomise(nn.Conv2d(18, 9, 1), 3)),
    "transition with silu": put("transition.relu", lambda old: nn.SiLU()),
    "transition with group norm": put("transition.norm", lambda old: nn.GroupNorm(3, 18)),
    "hook within the transition": lambda model: model.transition.conv.register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook within the transition": lambda model: model.transition.pool.register_forward_pre_hook(plus_one),
    "eps of the second norm": attribute(f"{B}.norm2", "eps", 0.1),
    "eps of the first norm": attribute(f"{B}.norm1", "eps", 0.1),
    "eps of one layer": lambda model: [setattr(n, "eps", 0.1) for n in (later(model).norm1, later(model).norm2)],
    "momentum of one layer": attribute(f"{B}.norm1", "momentum", 0.7),
    "cumulative momentum": attribute(f"{B}.norm2", "momentum", None),
    "no running statistics": put(f"{B}.norm1", lambda old: batch_norm(old, track_running_stats=False)),
    "norm without weights": put(f"{B}.norm1", lambda old: batch_norm(old, affine=False)),
    "instance norm": put(f"{B}.norm1", lambda old: nn.InstanceNorm2d(old.num_features, affine=True)),
    "group norm": put(f"{B}.norm2", lambda old: nn.GroupNorm(2, old.num_features)),
    "no norm": put(f"{B}.norm1", lambda old: nn.Identity()),
    "frozen batch norm": put(f"{B}.norm1", frozen_batch_norm),
    "frozen batch norm everywhere": lambda model: [put(path, frozen_batch_norm)(model) for path in NORMS],
    "eps of a frozen batch norm": frozen_with_eps,
    "one layer's norms frozen": frozen([f"{B}.norm1", f"{B}.norm2"]),
    "one norm frozen": frozen([f"{B}.norm1"]),
    "all norms but the last frozen": frozen(NORMS[:-1]),
    "all norms frozen": frozen(NORMS),
    "a layer without gradients": lambda model: later(model).requires_grad_(False),
    "dropout of a later layer": attribute(B, "drop_rate", 0.4),
    "recomputation of a later layer": attribute(B, "memory_efficient", False),
    "hook on a layer": lambda model: later(model).register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook on a layer": lambda model: later(model).register_forward_pre_hook(lambda m, i: ([2 * x for x in i[0]],)),
    "hook on a convolution": lambda model: later(model).conv1.register_forward_hook(lambda m, i, o: o + 1),
    "hook on a norm": lambda model: later(model).norm2.register_forward_hook(lambda m, i, o: o + 1),
    "hook on an activation": lambda model: later(model).relu2.register_forward_hook(lambda m, i, o: o + 1),
    "hook on the block": lambda model: model.block1.register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook on the block": lambda model: model.block1.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "backward hook": lambda model: later(model).conv2.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "backward pre-hook": lambda model: later(model).conv2.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)),
    "backward hook on the block": lambda model: model.block1.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "pruned": lambda model: prune.l1_unstructured(later(model).conv1, "weight", 0.5),
    "pruned everywhere": pruned,
    "weight norm, hooks": lambda model: weight_norm(later(model).conv2),
    "weight norm": lambda model: parametrizations.weight_norm(later(model).conv2),
    "spectral norm, hooks": lambda model: spectral_norm(later(model).conv2),
    "spectral norm": lambda model: parametrizations.spectral_norm(later(model).conv2),
    "adapter on the first convolution": put(f"{B}.conv1", Wrapped),
    "adapter on the second convolution": put(f"{B}.conv2", Wrapped),
    "adapter in the transition": put("transition.conv", Wrapped),
    "wrapper of a layer": put(B, Scaled),
    "a layer of another class": other_layer,
    "a convolution with bias": with_bias,
    "a layer's forward": other_forward,
    "the block's forward": other_block_forward,
    "one more layer": one_more,
    "one less layer": one_less,
    "a parameter in another dtype": lambda model: later(model).float() and put(B, lambda old: old)(model),
}  # fmt: skip


def network(seed=0, block=ListBlock):
    torch.manual_seed(seed)
    return randomise(DenseNet(block)).double()


def steps(model, x):
    """Two steps of training, then evaluation; the modes that the mutation set stay in training."""
    found = {}
    for step in range(2):
        found |= {f"training {step}: {name}": value for name, value in everything(model, x + step).items()}
    modes = {module: module.training for module in model.modules()}
    found |= {f"evaluation: {name}": value for name, value in everything(model.eval(), x).items()}
    for module, mode in modes.items():
        module.training = mode
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_equals_the_original(name, when):
    change = MUTATIONS[name]
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    plain, fast = network(), network()
    if when == "after":
        dnl.accelerate(fast).eval()(x)  # a plan is there already
        fast.train()
    for model in (plain, fast):
        torch.manual_seed(1)
        change(model)
    if when == "before":
        report = dnl.accelerate(fast, report=True)
        assert report.accelerated, str(report)
    assert_same(steps(fast, x), steps(plain, x), 1e-8)


@pytest.mark.parametrize("undo", [True, False], ids=["removed", "kept"])
def test_hooks_come_and_go(undo):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    plain, fast = network(), dnl.accelerate(network())
    seen = []
    for model in (plain, fast):
        handle = later(model).conv2.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().clone()))
        model(x)
        if undo:
            handle.remove()
        model(x)
    assert len(seen) == (2 if undo else 4)
    half = len(seen) // 2
    for a, b in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_a_block_under_two_names_is_one_block():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = network().block1
            self.back = nn.Conv2d(18, 6, 1)
            self.again = self.block

        def forward(self, x):
            return self.again(self.back(self.block(torch.cat([x, x], 1))))

    plain, fast = (randomise(Twice()).double() for _ in range(2))
    report = dnl.accelerate(fast, report=True)
    assert report.accelerated == ["block"] and fast.block is fast.again
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert_same(steps(fast, x), steps(plain, x))


@pytest.mark.parametrize("block", [JoinedBlock, NormActBlock], ids=["joined", "norm with activation"])
def test_other_forms_follow_their_modules_too(block):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    plain, fast = network(block=block), dnl.accelerate(network(block=block))
    changes = [
        lambda layer: setattr(get(layer, "norm2"), "eps", 0.2),
        lambda layer: setattr(get(layer, "norm1"), "momentum", 0.6),
        lambda layer: get(layer, "conv1").register_forward_hook(lambda m, i, o: 2 * o),
        lambda layer: prune.l1_unstructured(get(layer, "conv2"), "weight", 0.5),
    ]

    def get(layer, name):
        return (layer.layers if hasattr(layer, "layers") else layer)._modules[name]

    for change in changes:
        for model in (plain, fast):
            change(list(model.block1.children())[1])
        assert_same(steps(fast, x), steps(plain, x), 1e-8)
    if block is NormActBlock:
        for model in (plain, fast):
            model.block1.denselayer1.norm1.act = nn.SiLU()
            model.transition.norm.eps = 0.3
        assert_same(steps(fast, x), steps(plain, x), 1e-8)
    else:
        for model in (plain, fast):
            layer = list(model.block1.children())[0]
            layer.layers.add_module("scale", nn.Hardtanh(-0.1, 0.1))
        assert_same(steps(fast, x), steps(plain, x), 1e-8)


def test_synchronised_statistics():
    """In one process they are those of the batch."""
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    plain, fast = network(), dnl.accelerate(network())
    plain, fast = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (plain, fast))
    assert type(fast.block1.denselayer1.norm1) is nn.SyncBatchNorm
    assert_same(steps(fast, x), steps(plain, x))


def test_a_class_with_a_forward_of_its_own_is_left():
    class Doubled(ListBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, fast = network(block=Doubled), network(block=Doubled)
    with pytest.warns(UserWarning, match=r"block1 \(Doubled, dense block\): left as it is: its forward differs"):
        dnl.accelerate(fast)
    assert type(fast.block1) is Doubled and type(fast.transition) is not type(plain.transition)
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    assert_same(everything(fast, x), everything(plain, x))


def test_a_class_that_changes_its_forward_later(monkeypatch):
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    fast, plain = dnl.accelerate(network()), network()
    old = ListBlock.forward
    monkeypatch.setattr(ListBlock, "forward", lambda self, x: 2 * old(self, x))
    assert_same(everything(fast, x), everything(plain, x))


LINEAR_CHANGES = {
    "hook on a map": lambda block: block.layers[1].register_forward_hook(lambda m, i, o: 2 * o),
    "hook on the activation": lambda block: block.act.register_forward_hook(lambda m, i, o: o + 1),
    "hook on the last map": lambda block: block.out.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "another activation": lambda block: setattr(block, "act", nn.ELU()),
    "another slope": lambda block: setattr(block.act, "negative_slope", 0.5),
    "adapter": lambda block: block.layers.__setitem__(2, nn.Sequential(block.layers[2], nn.Tanh())),
    "pruned": lambda block: prune.l1_unstructured(block.layers[0], "weight", 0.5),
    "weight norm": lambda block: parametrizations.weight_norm(block.layers[2]),
    "a wider map": lambda block: block.layers.append(nn.Linear(19, 5).double()) and setattr(
        block, "out", randomise(nn.Linear(24, 2)).double()
    ),
    "dropout behind": lambda block: setattr(block, "out", nn.Sequential(nn.Dropout(0.3), block.out)),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", LINEAR_CHANGES)
def test_blocks_of_linear_maps_follow_their_modules(monkeypatch, name, when):
    monkeypatch.setattr(dense, "WORTH", (0, 0))
    plain, fast = (nn.Sequential(randomise(SharedPerceptron()).double()) for _ in range(2))
    x = torch.randn(7, 4, dtype=torch.float64)
    if when == "after":
        everything(dnl.accelerate(fast), x)
    for model in (plain, fast):
        torch.manual_seed(1)
        LINEAR_CHANGES[name](model[0])
    if when == "before":
        assert len(dnl.accelerate(fast, report=True)) == 1
    assert_same(steps(fast, x), steps(plain, x), 1e-8)


def test_a_layer_that_is_replaced_in_the_list_of_a_block():
    plain, fast = (nn.Sequential(randomise(TiramisuBlock(3, 3, 4)).double()) for _ in range(2))
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
    everything(plain, x), everything(dnl.accelerate(fast), x)
    for model in (plain, fast):
        model[0].layers[1] = nn.Sequential(model[0].layers[1], nn.Tanh())
    assert_same(steps(fast, x), steps(plain, x))
