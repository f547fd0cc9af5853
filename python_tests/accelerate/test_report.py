"""What `accelerate` says, what it refuses, and that its proof leaves no trace."""

import copy
import pickle
import random

import pytest
import torch
from compare import everything, randomise
from copies import DenseNet, JoinedBlock, ListBlock, ResidualDenseBlock, TiramisuBlock, Upscaler
from torch import nn

import dnl_kernels as dnl


def test_the_report_lists_every_block():
    model = DenseNet()
    model.block2.denselayer1.register_forward_hook(lambda module, inputs, out: None)
    model.transition.pool = nn.MaxPool2d(2)
    report = dnl.accelerate(model.eval(), report=True)
    assert report.accelerated == ["block1", "block2"]
    assert report.refused == {"transition": "its pooling is MaxPool2d, not AvgPool2d"}
    assert str(report).splitlines() == [
        "block1 (ListBlock, dense block): accelerated, 3 of 3 layers by kernels",
        "transition (Transition, transition): left as it is: its pooling is MaxPool2d, not AvgPool2d",
        "block2 (ListBlock, dense block): accelerated, 1 of 2 layers by kernels; by their submodules: "
        "denselayer1: has a forward hook",
    ]


def test_a_refused_block_is_a_warning_or_an_error():
    model = DenseNet()
    model.transition.pool = nn.Identity()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"accelerate: transition \(Transition, transition\): left as it is: its pooling"
    ):
        dnl.accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == classes  # nothing was changed
    with pytest.warns(UserWarning, match="accelerate: transition .*: left as it is: its pooling is Identity"):
        assert dnl.accelerate(model) is model
    assert type(model.block1) is not ListBlock


def test_nothing_to_accelerate_is_an_error_that_says_what_was_looked_for():
    with pytest.raises(
        ValueError, match="model is of type Linear without a block .* dense blocks: .*non-local blocks of"
    ):
        dnl.accelerate(nn.Linear(2, 2))
    import torchvision

    with pytest.raises(ValueError, match="of type ResNet without a block"):
        dnl.accelerate(torchvision.models.resnet18())


@pytest.mark.parametrize(
    "model, message",
    [
        (3, "model is of type int; expected a torch.nn.Module"),
        (torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "model: it is scripted or traced"),
        (nn.Sequential(torch.fx.symbolic_trace(nn.Linear(2, 2))), "model: 0 in it is a torch.fx graph"),
        (torch.compile(nn.Linear(2, 2)), r"model: it is compiled \(OptimizedModule\)"),
    ],
    ids=["number", "traced", "graph", "compiled"],
)
def test_what_cannot_be_accelerated_is_named(model, message):
    with pytest.raises(TypeError, match="accelerate: " + message):
        dnl.accelerate(model)


def test_bad_arguments():
    with pytest.raises(TypeError, match="restore: model is of type int"):
        dnl.restore(3)
    with pytest.raises(ValueError, match="backend is 'cupid'"):
        dnl.accelerate(DenseNet(), backend="cupid")


def test_the_proof_leaves_no_trace():
    model = randomise(DenseNet(drop_rate=0.3))
    model.block1.denselayer1.norm1.eval()
    seen = []
    model.block1.denselayer2.conv1.register_forward_hook(lambda *_: seen.append(1))
    model.block1.register_forward_pre_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 8, 7)
    model(x).sum().backward()
    seen.clear()
    grads = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.no_grad():
        assert len(dnl.accelerate(model, report=True).accelerated) == 3
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]
    assert not seen
    assert [m.training for m in model.modules()] == modes
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, model.parameters(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_second_time_is_the_first_time():
    torch.manual_seed(0)
    model = randomise(DenseNet(JoinedBlock)).double()
    first = dnl.accelerate(model, report=True)
    classes = [type(m) for m in model.modules()]
    assert str(dnl.accelerate(model, report=True, backend="reference")) == str(first)
    assert [type(m) for m in model.modules()] == classes
    model.transition.pool = nn.Identity()  # what is not understood any more goes back
    with pytest.warns(UserWarning, match="transition"):
        dnl.accelerate(model)
    assert type(model.transition).__mro__[1] is nn.Sequential
    assert type(model.block1) in classes


@pytest.mark.parametrize("verify", [True, False])
def test_a_difference_is_found_even_where_values_hide_it(verify):
    """A block whose last convolution starts at zero, and a scale that only a run tells."""

    class Odd(ResidualDenseBlock):
        def forward(self, x):
            return super().forward(x) + 1e-3 * self.conv1(x).mean()

    models = [Upscaler(Odd), Upscaler(lambda: ResidualDenseBlock(scale=0.125))]
    for model in models:
        for block in model.body:
            nn.init.zeros_(block.conv5.weight)
    odd, scaled = (dnl.accelerate(model, report=True, verify=verify) for model in models)
    assert not odd.accelerated and all("differs" in reason for reason in odd.refused.values())
    assert len(scaled.accelerated) == 2
    models[1].body[0].scale = 0.5  # an attribute that may mean anything: its own forward
    plain = dnl.restore(copy.deepcopy(models[1]))
    x = torch.randn(1, 3, 6, 5)
    torch.testing.assert_close(everything(models[1], x)["output"], everything(plain, x)["output"], rtol=0, atol=0)


def test_the_scale_is_not_mistaken_when_an_attribute_changes():
    model = TiramisuBlock(3, 3, 4)
    wrapped = nn.Sequential(model)
    dnl.accelerate(wrapped)
    x = torch.randn(2, 3, 6, 5)
    all_states = wrapped.eval()(x)
    model.only_new = True
    torch.testing.assert_close(wrapped(x), all_states[:, 3:])


@pytest.mark.parametrize("how", ["at once", "copied", "pickled"])
def test_attributes_are_those_of_the_proof(how):
    """Not those of the first call, nor those with which a copy begins."""
    model = nn.Sequential(ResidualDenseBlock(scale=0.5), TiramisuBlock(6, 3, 4)).double().eval()
    fast = dnl.accelerate(copy.deepcopy(model))
    x = torch.randn(2, 6, 6, 5, dtype=torch.float64)
    if how != "at once":
        fast(x)
    for m in (model, fast):
        m[0].scale, m[1].only_new = 0.125, True
    if how != "at once":
        fast = copy.deepcopy(fast) if how == "copied" else pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(fast(x), model(x))
    for m in (model, fast):
        m[0].scale, m[1].only_new = 0.5, False
        m[1].note = "of the user's"  # what is added to a block may mean anything as well
    torch.testing.assert_close(fast(x), model(x))


def test_a_layer_with_another_attribute_is_called():
    class Scaled(type(ListBlock(1, 1, 1).denselayer1)):
        scale = 1.0

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.scale = [1.0]

        def forward(self, states):
            return self.scale[0] * super().forward(states)

    class ScaledBlock(ListBlock):
        def __init__(self, channels, layers, growth):
            nn.ModuleDict.__init__(self)
            for i in range(layers):
                self[f"denselayer{i + 1}"] = Scaled(channels + i * growth, growth, 2)

    torch.manual_seed(0)
    model = randomise(DenseNet(ScaledBlock)).double()
    fast = copy.deepcopy(model)
    report = dnl.accelerate(fast, report=True)
    assert [block.layers[:6] for block in report] == ["3 of 3", "", "2 of 2"]
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    fast.eval()(x)
    for m in (model, fast):
        m.block1.denselayer2.scale[0] = 3.0
    found, expected = everything(fast.eval(), x), everything(model.eval(), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8)
    report = dnl.accelerate(fast, report=True)
    assert "differs" in report.refused["block1"]  # proved anew, as it is now


def test_a_list_of_maps_that_only_looks_like_a_block_is_not_mentioned():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(6, 2), nn.Linear(8, 2)])

        def forward(self, x):
            return sum(layer(x[:, : layer.in_features]) for layer in self.layers)

    report = dnl.accelerate(nn.Sequential(Steps(), DenseNet()), report=True)
    assert [block.family for block in report] == ["dense block", "transition", "dense block"] and not report.refused


def test_gradients_that_differ_are_found():
    class Detached(ListBlock):
        def forward(self, x):
            states = [x]
            for layer in self.values():
                states.append(layer([state.detach() for state in states]))
            return torch.cat(states, 1)

    report = dnl.accelerate(DenseNet(Detached), report=True)
    assert report.accelerated == ["transition"]
    assert all("in evaluation the gradient of" in reason for reason in report.refused.values()), str(report)
