"""Networks with the structure of well-known ones, accelerated: the same numbers, the same module."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_as_good, assert_same, draws_like, everything, randomise
from copies import CASES, LinearBlock

import dnl_kernels as dnl
from dnl_kernels.nn.families import dense
from dnl_kernels.nn.families.non_local import rectified_sums
from dnl_kernels.ops.dnl_block import api


@pytest.fixture(autouse=True)
def small_blocks_too(monkeypatch):
    """Blocks of linear maps on kernels whatever their size."""
    monkeypatch.setattr(dense, "WORTH", (0, 0))


def both(name, dtype=torch.float64, training=True):
    make, shape, blocks = CASES[name]
    plain = randomise(make()).to(dtype).train(training)
    fast = copy.deepcopy(plain)
    report = dnl.accelerate(fast, report=True)
    assert len(report.accelerated) == blocks, str(report)
    for module in plain.modules():  # torch.utils.checkpoint counts a batch twice, an accelerated block once
        if getattr(module, "memory_efficient", False):
            module.memory_efficient = False
    return plain, fast, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name, training):
    plain, fast, x = both(name, training=training)
    for _ in range(2):  # the second time from the plan of the first
        assert_same(everything(fast, x), everything(plain, x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_good_as_the_original(name, training):
    plain, fast, x = both(name, torch.float32, training)
    draws = []
    for draw in draws_like(x, 5):
        exact = everything(copy.deepcopy(plain).double(), draw.double())
        draws.append((everything(copy.deepcopy(fast), draw), everything(copy.deepcopy(plain), draw), exact))
    assert draws[0][0]["output"].dtype == torch.float32
    assert_as_good(draws, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", [name for name, (_, shape, _) in CASES.items() if len(shape) == 4])
def test_channels_last(name):
    plain, fast, x = both(name)
    plain, fast = (m.to(memory_format=torch.channels_last) for m in (plain, fast))
    x = x.to(memory_format=torch.channels_last)
    assert_same(everything(fast, x), everything(plain, x))


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    """The dtype of the output is that of the original, the error of the order of the original's."""
    plain, fast, x = both(name, torch.float32)
    exact_model = copy.deepcopy(plain).double()

    def run(model, x):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            return {"output": model(x)}

    draws = []
    for draw in draws_like(x, 5):
        draws.append((run(fast, draw), run(plain, draw), everything(exact_model, draw.double())))
        assert draws[-1][0]["output"].dtype == draws[-1][1]["output"].dtype
    assert_as_good([(f, e, {"output": x["output"]}) for f, e, x in draws], torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", CASES)
def test_the_model_stays_what_it_was(name):
    plain, fast, x = both(name)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in plain.named_modules()]
    assert all(isinstance(a, type(b)) for a, b in zip(fast.modules(), plain.modules(), strict=True))
    assert repr(fast) == repr(plain)
    other = randomise(copy.deepcopy(plain), seed=1)
    fast.load_state_dict(other.state_dict())  # from the original ..
    plain.load_state_dict(fast.state_dict())  # .. and to it
    assert_same(everything(fast, x), everything(other, x))
    assert dnl.restore(fast) is fast
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert all(a.__dict__.keys() == b.__dict__.keys() for a, b in zip(fast.modules(), plain.modules(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_copies_and_files_are_accelerated_too(name):
    plain, fast, x = both(name)
    if not name.startswith("depth"):  # whose states no one can copy
        fast(x)  # with an executor
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)]
    for model in copies:
        classes = [type(m) for m in model.modules()]
        assert classes == [type(m) for m in fast.modules()]
        assert not {id(p) for p in model.parameters()} & {id(p) for p in fast.parameters()}
        model.load_state_dict(plain.state_dict())
        randomise(model, seed=2)
        assert_same(everything(model, x), everything(randomise(copy.deepcopy(plain), seed=2), x))
    assert [type(m) for m in dnl.restore(copies[0]).modules()] == [type(m) for m in plain.modules()]


def count_calls(monkeypatch):
    """Of the operator that runs a segment of a plan."""
    calls, run = [], api.dnl_block_with_statistics
    monkeypatch.setattr(api, "dnl_block_with_statistics", lambda *a, **k: (calls.append(1), run(*a, **k))[1])
    return calls


@pytest.mark.parametrize("rows, kernels", [(32, 0), (1 << 14, 1)])
def test_blocks_of_linear_maps_that_would_gain_nothing_run_as_they_did(monkeypatch, rows, kernels):
    monkeypatch.undo()
    model = dnl.accelerate(torch.nn.Sequential(LinearBlock(norm=False)))
    calls = count_calls(monkeypatch)
    everything(model, torch.randn(rows, 4))
    assert len(calls) == kernels
    model.eval()(torch.randn(rows, 4))
    with torch.no_grad():
        model(torch.randn(rows, 4))
    assert len(calls) == 2 * kernels


def test_every_kind_of_dense_block_has_layers_on_kernels(monkeypatch):
    """Otherwise the comparisons above would compare PyTorch with itself."""
    for name in ("linear, rows", "linear, list", "linear, shared activation", "linear, list of tokens"):
        model = dnl.accelerate(CASES[name][0]())
        calls = count_calls(monkeypatch)
        everything(model, torch.randn(CASES[name][1]))
        assert len(calls) == 1, name
    for name in ("list", "joined", "joined, 1d", "joined, 3d", "norm with activation", "functional", "tiramisu"):
        report = dnl.accelerate(CASES[name][0]().eval(), report=True)
        layers = [block.layers for block in report if block.family == "dense block"]
        assert layers == ["3 of 3 layers by kernels", "2 of 2 layers by kernels"], (name, str(report))


def test_rectified_sums_of_all_pairs():
    """What the concatenated non-local block adds up, from sorted sums: ties, nothing and all of it."""
    for a, b in (
        (torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 11, dtype=torch.float64)),
        (torch.randint(-2, 3, (2, 7)).double(), torch.randint(-2, 3, (2, 11)).double()),
        (torch.full((2, 7), -9.0).double(), torch.rand(2, 11).double()),
        (torch.full((2, 7), 9.0).double(), torch.rand(2, 11).double()),
    ):
        value = torch.randn(2, 3, 11, dtype=torch.float64)
        expected = value @ torch.relu(a[:, None, :] + b[:, :, None])
        torch.testing.assert_close(rectified_sums(a, b, value), expected, rtol=1e-12, atol=1e-12)
