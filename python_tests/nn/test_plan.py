"""A block means what its submodules say: whatever was done to them, the result is that of calling them one by one."""

import copy
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops.misc import FrozenBatchNorm2d

from dnl_kernels.nn import DNLBlock
from dnl_kernels.testing import Exact, assert_within_budget, exactly

FORMS = {
    "densenet": {},
    "bottleneck": {"bottleneck": 2},
    "post-activation": {"preactivation": False},
    "no-norm": {"preactivation": False, "norm": None, "activation": "leaky_relu"},
    "attention": {"affine": "conv1x1", "kernel": "softmax"},
    "window": {"connectivity": 2},
    "skip": {"preactivation": False, "input_skip": True, "tau": "1/L"},
    "tokens": {"affine": "linear"},
    "growth": {"growth_rate": [3, 3, 2, 4]},
    "dropout": {"dropout": 0.3, "bottleneck": 2},
}


def block_of(form, change=None, dtype=torch.float64, seed=0):
    """The same block whenever it is asked for: what was done to one cannot always be copied."""
    torch.manual_seed(seed)
    options = {"growth_rate": 3, **FORMS[form]}
    block = DNLBlock(5, 4, dtype=dtype, **options)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(0.8).add_(torch.rand_like(tensor) * (0.5 if "running_var" in name else 0.2))
    if change is not None:
        change(block)
    return block


def seeded(*sizes, **options):
    torch.manual_seed(0)
    return DNLBlock(*sizes, **options)


def input_of(form):
    shape = (3, 7, 5) if form == "tokens" else (3, 5, 6, 7)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def one_by_one(block, x):
    states = [x]
    for layer in block.layers:
        states.append(layer(states))
    return torch.cat(states, -1 if block.config.affine == "linear" else 1)


def everything(run, block, x):
    """Output, every gradient and every buffer after it."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    out = run(block, x)
    wanted = {"x": x} | {name: p for name, p in block.named_parameters() if p.requires_grad}
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    gradients = torch.autograd.grad(out, list(wanted.values()), g, allow_unused=True)
    return {"output": out, **dict(zip(wanted, gradients, strict=True)), **dict(block.named_buffers())}


def assert_equals_its_submodules(make, x):
    """The block that `make` makes, and its submodules called one by one."""
    found, expected = everything(lambda block, x: block(x), make(), x), everything(one_by_one, make(), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class LowRank(nn.Module):
    """A frozen convolution and a trained correction of it, as adapters for fine-tuning wrap layers."""

    def __init__(self, base):
        super().__init__()
        self.base, width = base.requires_grad_(False), base.in_channels
        self.down = nn.Conv2d(width, 2, 1, bias=False, dtype=base.weight.dtype)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def frozen(norm):
    new = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.dtype)
    new.load_state_dict({name: tensor for name, tensor in norm.state_dict().items() if name != "num_batches_tracked"})
    return new


def instance_norm(norm):
    return nn.InstanceNorm2d(norm.num_features, affine=True, dtype=norm.weight.dtype)


def without_affine(norm):
    new = nn.BatchNorm2d(norm.num_features, affine=False).double()
    new.running_var.mul_(2)
    return new


def circular(conv):
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [p for p in reversed(conv.padding) for _ in range(2)]


def dilated(conv):
    conv.dilation, conv.padding = (2, 2), tuple(2 * p for p in conv.padding)


def wide(layer):
    return layer.affine if layer.inner is None else layer.inner


def doubled(layer):
    plain = layer.affine.forward
    layer.affine.forward = lambda x: plain(x) * 2


def assign(name, make):
    def change(layer):
        setattr(layer, name, make(getattr(layer, name)))

    return change


CHANGES = {
    "norm in evaluation mode": lambda layer: layer.norm.eval(),
    "eps": lambda layer: setattr(layer.norm, "eps", 0.1),
    "momentum": lambda layer: setattr(layer.norm, "momentum", 0.7),
    "cumulative": lambda layer: setattr(layer.norm, "momentum", None),
    "instance norm": assign("norm", instance_norm),
    "frozen norm": assign("norm", frozen),
    "no gamma": assign("norm", without_affine),
    "no norm": assign("norm", lambda norm: nn.Identity()),
    "sync norm in evaluation mode": assign("norm", lambda norm: nn.SyncBatchNorm.convert_sync_batchnorm(norm).eval()),
    "subclass": assign("norm", lambda norm: type("Halved", (nn.BatchNorm2d,), {
        "forward": lambda self, x: nn.BatchNorm2d.forward(self, x) / 2})(norm.num_features).double()),
    "forward of its own": doubled,
    "forward hook": lambda layer: layer.affine.register_forward_hook(lambda m, args, out: out * 1.5),
    "pre-hook": lambda layer: layer.norm.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "backward hook": lambda layer: layer.affine.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    "layer hook": lambda layer: layer.register_forward_hook(lambda m, args, out: out * 3),
    "pruning": lambda layer: prune.l1_unstructured(layer.affine, "weight", 0.5),
    "weight norm": lambda layer: parametrizations.weight_norm(layer.affine),
    "weight norm by hook": lambda layer: torch.nn.utils.weight_norm(layer.affine),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.affine),
    "adapter": assign("affine", LowRank),
    "circular padding": lambda layer: circular(wide(layer)),
    "dilation": lambda layer: dilated(wide(layer)),
    "ELU": lambda layer: setattr(layer, "activation", nn.ELU()),
    "PReLU": lambda layer: setattr(layer, "activation", nn.PReLU().double()),
    "SiLU": lambda layer: setattr(layer, "activation", nn.SiLU()),
    "steeper leaky slope": lambda layer: setattr(layer, "activation", nn.LeakyReLU(0.3)),
    "frozen weight": lambda layer: layer.affine.weight.requires_grad_(False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("form", ["densenet", "bottleneck", "post-activation", "window", "attention"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_submodule_says_is_honoured(change, form):
    x = input_of(form)
    assert_equals_its_submodules(lambda: block_of(form, lambda block: CHANGES[change](block.layers[2])), x)

    def later(block):  # a plan was there before
        block.eval()(x)
        CHANGES[change](block.layers[2])

    assert_equals_its_submodules(lambda: block_of(form, later), x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_every_form_equals_its_submodules(form, training):
    x = input_of(form)
    assert_equals_its_submodules(lambda: block_of(form).train(training), x)
    if training and form == "dropout":
        return
    narrow, of = block_of(form, dtype=torch.float32).train(training), x.float()
    wide = copy.deepcopy(narrow).double()
    found = everything(lambda block, x: block(x), narrow, of)
    exact = exactly(lambda: everything(one_by_one, copy.deepcopy(wide), of.double()), torch.float32)
    for name, value in exact.items():
        if isinstance(value, Exact) and value.value.is_floating_point():
            assert_within_budget(name, found[name], value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_mixtures_equal_their_submodules(data):
    form = data.draw(st.sampled_from(["densenet", "bottleneck", "post-activation", "growth", "window", "skip"]))
    changes = [data.draw(st.sampled_from([None, None, *CHANGES])) for _ in range(4)]
    modes = [data.draw(st.booleans()) for _ in range(4)] if data.draw(st.booleans()) else None

    def change(block):
        for layer, name in zip(block.layers, changes, strict=True):
            if name:
                CHANGES[name](layer)
        if modes:
            block.eval()
            for layer, mode in zip(block.layers, modes, strict=True):
                layer.norm.train(mode)

    x = input_of(form)
    if data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    assert_equals_its_submodules(lambda: block_of(form, change, seed=3), x)


def test_the_plan_follows_every_change_and_back():
    block, x = block_of("densenet"), input_of("densenet")
    assert block.explain(x).splitlines()[0] == "layers.0 .. layers.3: whole block"
    calls = []
    hook = block.layers[1].register_forward_hook(lambda *_: calls.append(1))
    block(x)
    assert calls == [1]
    assert "layers.1: by their submodules: has a forward hook" in block.explain(x).splitlines()
    hook.remove()
    block(x)
    assert calls == [1] and block.explain(x).splitlines()[0] == "layers.0 .. layers.3: whole block"
    block.layers[3].norm.eps = 1.0
    assert "layers.0 .. layers.2" in block.explain(x) and "layers.3" in block.explain(x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        block(x)
    finally:
        handle.remove()
    assert all(m in calls for m in block.modules() if m is not block.layers)


def test_copies_do_not_share_a_plan():
    block, x = block_of("bottleneck"), input_of("bottleneck")
    expected = block.eval()(x)
    twins = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)]
    for twin in twins:
        assert torch.equal(twin(x), expected)
    twins[0].layers[0].norm.eps = 1.0
    assert not torch.equal(twins[0](x), expected) and torch.equal(block(x), expected)
    replica = block._replicate_for_data_parallel()
    assert replica._plan is block._plan and torch.equal(replica(x), expected) and torch.equal(block(x), expected)


def test_a_step_over_layers_of_other_kinds_counts_statistics_once():
    block, x = block_of("bottleneck"), input_of("bottleneck")
    block.layers[1].norm.eval()
    block(x)
    counts = [int(n.num_batches_tracked) for layer in block.layers for n in (layer.norm, layer.inner_norm)]
    assert counts == [1, 1, 0, 1, 1, 1, 1, 1]
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True).sum().backward()
    assert [int(layer.norm.num_batches_tracked) for layer in block.layers][0] == 2


@pytest.mark.parametrize("dims, size", [(1, (9,)), (3, (3, 4, 5))])
@pytest.mark.parametrize("bottleneck", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_signals_and_volumes(dims, size, bottleneck, training):
    block = DNLBlock(4, 3, 2, spatial_dims=dims, bottleneck=bottleneck, dtype=torch.float64).train(training)
    assert isinstance(block.layers[0].affine, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1])
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert block(x).shape == (2, 10, *size)
    make = {"spatial_dims": dims, "bottleneck": bottleneck, "dtype": torch.float64}
    assert_equals_its_submodules(lambda: seeded(4, 3, 2, **make).train(training), x)
    expected = (
        "bottleneck block" if bottleneck else "by their submodules: the kernels have no layer without a bottleneck"
    )
    assert expected in block.explain(x)
    assert block(x[:0]).shape == (0, 10, *size)


def test_a_volume_keeps_memory_linear_in_depth():
    saved = []
    for layers in (4, 8):
        block, x = DNLBlock(4, layers, 4, spatial_dims=3, bottleneck=2), torch.randn(1, 4, 6, 6, 6, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            block(x)
        saved.append(sum(sizes) - 4 * 216 - sum(p.numel() for p in block.parameters()))
    assert 1.8 < saved[1] / saved[0] < 2.2  # states and inner activations; plain PyTorch: 2.9


def test_an_activation_module_and_dropout():
    block = DNLBlock(4, 2, 2, activation=nn.PReLU(), bottleneck=2, dtype=torch.float64)
    slopes = [name for name, _ in block.named_parameters() if name.endswith("activation.weight")]
    assert slopes == [f"layers.{i}.{name}.weight" for i in range(2) for name in ("activation", "inner_activation")]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert_equals_its_submodules(lambda: copy.deepcopy(block), x)
    block = DNLBlock(4, 2, 2, dropout=0.5, dtype=torch.float64)
    assert "draws a dropout of 0.5" in block.explain(x) and "whole block" in block.eval().explain(x)
    with pytest.raises(ValueError, match="dropout is 2"):
        DNLBlock(4, 2, 2, dropout=2)
    with pytest.raises(ValueError, match=r"growth_rate is \[1, 2, 3\]; expected an integer >= 1, or 2 of them"):
        DNLBlock(4, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        DNLBlock(4, 2, 2, spatial_dims=4)


@pytest.mark.parametrize("form", ["densenet", "bottleneck"])
def test_kept_weights_follow_every_change(form):
    block = block_of(form).eval()
    x = input_of(form).detach()

    def check(message):
        """Packed weights of before would be wrong by per cents."""
        least = 1e-9 if x.dtype == torch.float64 else 1e-5
        with torch.no_grad():
            torch.testing.assert_close(block(x), one_by_one(block, x), rtol=least, atol=least, msg=message)

    check("first")
    kept = block._plan.segments(block, x)[0].kept
    made = kept._entry.made
    check("again")
    assert kept._entry.made is made  # nothing was packed again
    layer = block.layers[1]
    with torch.no_grad():
        layer.affine.weight.mul_(1.5)
    check("in place")
    assert kept._entry.made is not made
    layer.affine.weight.data.mul_(0.5)
    check("through .data")
    layer.norm.weight.data[0] += 1
    check("one number of a vector, through .data")
    layer.norm.running_mean.data.add_(1)
    check("a buffer through .data")
    layer.affine.weight.data = torch.randn_like(layer.affine.weight)
    check("another .data")
    layer.affine.weight = nn.Parameter(torch.randn_like(layer.affine.weight))
    check("another parameter")
    block.load_state_dict({name: t + 0.1 for name, t in block.state_dict().items()})
    check("load_state_dict")
    one = torch.randn_like(layer.affine.weight[:1])
    layer.affine.weight.data = one.expand(layer.affine.weight.shape)
    check("an expanded weight, whose memory is smaller than it says")
    assert kept._entry is None
    block.float(), (x := x.float())
    check("another dtype")
    y = block(x.requires_grad_())  # recorded: not from packed weights
    assert y.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(block(x), y)


def test_a_layer_that_is_replaced_in_the_list():
    """By one like it, by something else, and back."""

    class Halved(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, states):
            return 0.5 * self.layer(states)

    torch.manual_seed(0)
    block, other = (DNLBlock(4, 3, 5).double().eval() for _ in range(2))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        before, first = block(x), block.layers[1]
        for layer in (other.layers[1], Halved(first)):
            block.layers[1] = layer
            states = [x]
            for module in block.layers:
                states.append(module(states))
            torch.testing.assert_close(block(x), torch.cat(states, 1))
            assert not torch.allclose(block(x), before)
        block.layers[1] = first
        torch.testing.assert_close(block(x), before)
