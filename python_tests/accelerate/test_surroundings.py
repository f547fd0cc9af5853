"""The stem and the final pooling of an accelerated network: in evaluation one pass each, the same numbers, and the
modules themselves wherever they say something else."""

import copy
import threading

import pytest
import torch
from compare import assert_same, everything, randomise
from copies import Features, NormAct, NormActBlock, VolumeFeatures
from torch import nn
from torch.nn import functional as F

import dnl_kernels as dnl
from dnl_kernels.nn.families import stem
from dnl_kernels.ops.transition import cpu

FORMS = {
    "functions": Features,
    "norm with activation": lambda: Features(NormActBlock, NormAct),
    "volumes": VolumeFeatures,
}


def both(make=Features, dtype=torch.float64):
    torch.manual_seed(0)
    plain = randomise(make()).to(dtype).eval()
    x = torch.randn((2, 3, 4, 5, 6) if make is VolumeFeatures else (2, 3, 17, 14), dtype=dtype)
    return plain, copy.deepcopy(plain), x


@pytest.fixture
def passes(monkeypatch):
    """The kernels that were called."""
    seen = []
    for name in ("norm_activation_max_pool", "norm_activation_mean"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, original=original, name=name: (seen.append(name[16:]), original(*a))[1]
        )
    return seen


def evaluate(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_is_by_one_pass_each(passes, form, dtype):
    plain, fast, x = both(FORMS[form], dtype)
    report = dnl.accelerate(fast, report=True)
    passes.clear()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for _ in range(2):
        torch.testing.assert_close(evaluate(fast, x), evaluate(plain, x), rtol=tolerance, atol=tolerance)
    assert passes == (["mean"] * 2 if form == "volumes" else ["max_pool", "mean"] * 2)
    names = ["", "features"] if form != "volumes" else [""]
    assert [name for name in report.accelerated if "block" not in name and "transition" not in name] == names
    with torch.no_grad():  # an optimiser's step
        for model in (plain, fast):
            for parameter in model.parameters():
                parameter.mul_(1.5)
    torch.testing.assert_close(evaluate(fast, x), evaluate(plain, x), rtol=10 * tolerance, atol=10 * tolerance)


def test_what_needs_gradients_is_by_the_modules(passes):
    plain, fast, x = both()
    dnl.accelerate(fast)
    passes.clear()
    assert_same(everything(fast, x), everything(plain, x))
    assert not passes
    fast.train(), plain.train()
    assert_same(everything(fast, x), everything(plain, x))
    torch.testing.assert_close(evaluate(fast, x), evaluate(plain, x))
    assert not passes


def test_features_called_alone_are_maps(passes):
    plain, fast, x = both()
    dnl.accelerate(fast)
    passes.clear()
    found = evaluate(fast.features, x)
    torch.testing.assert_close(found, evaluate(plain.features, x))
    assert found.shape[2:] != (1, 1) and passes == ["max_pool"]


def hooked(path, kind="register_forward_hook"):
    def change(model):
        hook = (lambda m, i, o: 2 * o) if kind == "register_forward_hook" else (lambda m, i: (2 * i[0],))
        getattr(model.get_submodule(path), kind)(hook)

    return change


def replaced(name, make):
    return lambda model: setattr(model.features, name, make(getattr(model.features, name)).double().eval())


def other_forward(path):
    def change(model):
        module = model.get_submodule(path)
        module.forward = lambda x: 3 * type(module).forward(module, x)

    return change


CHANGES = {
    "hook on the stem's norm": (hooked("features.norm0"), ["mean"]),
    "hook on the stem's activation": (hooked("features.relu0"), ["mean"]),
    "pre-hook on the stem's pooling": (hooked("features.pool0", "register_forward_pre_hook"), ["mean"]),
    "hook on the last norm": (hooked("features.norm5"), ["max_pool"]),
    "hook on the features": (hooked("features"), ["max_pool"]),
    "pre-hook on the classifier": (hooked("classifier", "register_forward_pre_hook"), ["max_pool"]),
    "hook on the network": (hooked(""), ["max_pool", "mean"]),
    "forward of the last norm": (other_forward("features.norm5"), ["max_pool"]),
    "forward of the features": (other_forward("features"), ["max_pool"]),
    "forward of the network": (other_forward(""), ["max_pool", "mean"]),
    "another maximum": (replaced("pool0", lambda old: nn.MaxPool2d(2, 2)), ["mean"]),
    "ceiled maximum": (lambda model: setattr(model.features.pool0, "ceil_mode", True), ["mean"]),
    "dilated maximum": (lambda model: setattr(model.features.pool0, "dilation", 2), ["mean"]),
    "a mean": (replaced("pool0", lambda old: nn.AvgPool2d(3, 2, 1)), ["mean"]),
    "no pooling": (replaced("pool0", lambda old: nn.Identity()), ["mean"]),
    "silu in the stem": (replaced("relu0", lambda old: nn.SiLU()), ["max_pool", "mean"]),
    "prelu in the stem": (replaced("relu0", lambda old: nn.PReLU()), ["mean"]),
    "eps": (lambda model: [setattr(n, "eps", 0.3) for n in (model.features.norm0, model.features.norm5)],
            ["max_pool", "mean"]),
    "group norm in the stem": (replaced("norm0", lambda old: nn.GroupNorm(2, 6)), ["mean"]),
    "group norm at the end": (replaced("norm5", lambda old: nn.GroupNorm(1, 17)), ["max_pool"]),
    "batch statistics at the end": (lambda model: model.features.norm5.train(), ["max_pool"]),
    "batch statistics in the stem": (lambda model: model.features.norm0.train(), ["mean"]),
    "a further module at the end": (lambda model: model.features.append(nn.Softplus()), ["max_pool"]),
    "a classifier of modules": (
        lambda model: setattr(model, "classifier", nn.Sequential(nn.Dropout(0.5), model.classifier).eval()),
        ["max_pool"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_modules_say_is_honoured(passes, name, when):
    change, kernels = CHANGES[name]
    plain, fast, x = both()
    if when == "after":
        dnl.accelerate(fast)
        evaluate(fast, x)
    change(plain)
    change(fast)
    if when == "before":
        dnl.accelerate(fast, report=True)
    passes.clear()
    torch.testing.assert_close(evaluate(fast, x), evaluate(plain, x), rtol=1e-9, atol=1e-9)
    if when == "after":
        assert passes == kernels
    assert set(passes) >= set(kernels) or "hook" in name or "forward" in name
    assert_same(everything(fast, x), everything(plain, x))


class Maximum(Features):
    def forward(self, x):
        z = F.relu(self.features(x))
        return self.classifier(torch.flatten(F.adaptive_max_pool2d(z, (1, 1)), 1))


class Both(Features):
    """Its pooling is an attribute."""

    pooling = "mean"

    def __init__(self):
        super().__init__()
        self.pooling = "mean"

    def forward(self, x):
        z = F.relu(self.features(x)).flatten(2)
        return self.classifier(z.mean(2) if self.pooling == "mean" else z.amax(2))


class Leaky(Features):
    def forward(self, x):
        return self.classifier(F.leaky_relu(self.features(x), 0.1).flatten(2).mean(2))


@pytest.mark.parametrize("make", [Maximum, Leaky])
def test_a_network_that_reads_something_else_is_left(passes, make):
    plain, fast, x = both(make)
    report = dnl.accelerate(fast, report=True)
    assert "" not in report.accelerated and "features" in report.accelerated and not report.refused
    passes.clear()
    torch.testing.assert_close(evaluate(fast, x), evaluate(plain, x))
    assert passes == ["max_pool"]


@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "after it"])
def test_an_attribute_that_changes(passes, first):
    plain, fast, x = both(Both)
    dnl.accelerate(fast)
    if not first:
        evaluate(fast, x)
    plain.pooling = fast.pooling = "maximum"
    for model in (fast, copy.deepcopy(fast)):
        passes.clear()
        torch.testing.assert_close(evaluate(model, x), evaluate(plain, x))
        assert passes == ["max_pool"]


def test_replaced_stems_are_not_listed_and_stay():
    for pool in (nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)):
        model = Features(pool=pool)
        report = dnl.accelerate(model, strict=True, report=True)
        assert report.accelerated == ["", "features.block1", "features.transition1", "features.block2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_half_and_channels_last(passes, dtype):
    plain, fast, x = both(dtype=torch.float32)
    dnl.accelerate(fast)
    plain, fast = (m.to(dtype, memory_format=torch.channels_last) for m in (plain, fast))
    x = x.to(dtype, memory_format=torch.channels_last)
    exact = evaluate(copy.deepcopy(plain).double(), x.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, eager = evaluate(fast, x), evaluate(plain, x)
        assert found.dtype == eager.dtype
        error, allowed = ((t.double() - exact).abs().max() for t in (found, eager))
        assert error <= 2 * allowed + 4 * torch.finfo(found.dtype).eps * exact.abs().max()


def test_threads_do_not_see_each_other():
    """One evaluates the network while another one evaluates its features."""
    plain, fast, x = both()
    dnl.accelerate(fast)
    logits, maps, wrong = evaluate(plain, x), evaluate(plain.features, x), []

    def run(module, expected):
        for _ in range(50):
            if not torch.allclose(evaluate(module, x), expected):
                wrong.append(type(module).__name__)

    threads = [threading.Thread(target=run, args=args) for args in ((fast, logits), (fast.features, maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fully_shard(tmp_path):
    """The network as one group, accelerated before and after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, before, x = both()
        after = copy.deepcopy(plain)
        fully_shard(dnl.accelerate(before), mesh=init_device_mesh("cpu", (1,)))
        fully_shard(after, mesh=init_device_mesh("cpu", (1,)))
        assert "features" in dnl.accelerate(after, report=True).accelerated
        for model in (before, after):
            torch.testing.assert_close(evaluate(model, x), evaluate(plain, x))
            found, expected = everything(model, x), everything(plain, x)
            found = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}
            assert_same(found, expected)
            torch.testing.assert_close(evaluate(model, x), evaluate(plain, x))
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_leaves_no_trace():
    _, fast, x = both()
    dnl.accelerate(fast)
    evaluate(fast, x)
    with pytest.raises(RuntimeError):
        evaluate(fast, x[:, :2])
    assert stem.POOLED.get() is None
    assert evaluate(fast.features, x).shape[2:] != (1, 1)
