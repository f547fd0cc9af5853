"""The CUDA source of the resident dnl_block, run by the emulator: against float64, schedules, strides, traffic, and the
reason of every refusal."""

import re

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import composition, resident
from dnl_kernels.testing import assert_within_budget, cuda_traffic, exactly
from dnl_kernels.testing.cuda_emulator import BACKEND, SCHEDULES
from dnl_kernels.testing.dnl_block import CASES, DENSE3, SPARSE3, WINDOW3, Case, inputs

every_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)


def case(positions=(4, 5), batch=2, **options) -> Case:
    options = {"in_channels": 3, "num_layers": 3, "growth_rate": 2, "connectivity": DENSE3, "norm": None} | options
    return Case(CASES["no-norm"].config._replace(**options), positions, batch)


def dense(layers: int) -> tuple[tuple[bool, ...], ...]:
    return tuple((True,) * (layer + 1) for layer in range(layers))


TAKEN = {name: CASES[name] for name in ("densenet-eval", "equation-1", "no-norm")} | {
    "empty-batch": CASES["empty-batch"]._replace(config=CASES["densenet-eval"].config),
    "densenet-8x8": case((8, 8), norm="batch", num_layers=4, connectivity=dense(4), in_channels=12, growth_rate=6),
    "densenet-16x16": case((16, 16), 1, norm="batch", in_channels=13, growth_rate=8, activation="silu", tau=0.5),
    "paper-window": case((8, 8), preactivation=False, norm="batch", connectivity=WINDOW3, activation="tanh"),
    "paper-in-place": case((7, 9), preactivation=False, in_channels=20, growth_rate=5, tau=1 / 3, activation="gelu"),
    "paper-skip": case((5, 8), preactivation=False, input_skip=True, connectivity=SPARSE3, norm="batch"),
    "pointwise": case((8, 8), affine="conv1x1", norm="batch", in_channels=17, growth_rate=11, connectivity=SPARSE3),
    "wide": case((6, 16), affine="conv1x1", in_channels=4, growth_rate=32, activation="leaky_relu"),
    "wide-3x3": case((3, 7), in_channels=2, growth_rate=19, activation="relu", connectivity=WINDOW3),
    "one-pixel": case((1, 1), norm="batch"),
    "images-share-a-tile": case((2, 3), 257, num_layers=2, connectivity=dense(2), in_channels=2, norm="batch"),
}  # fmt: skip


def run(case, x0, layers, backend):
    layers = [dnl.LayerParameters(**layer) for layer in layers]
    return dnl.dnl_block(x0, layers, case.config, backend=backend)


def refusal(case, x0, layers, backend=BACKEND):
    return resident.limit(x0, [dnl.LayerParameters(**layer) for layer in layers], case.config, backend)


def check(emulated, case, x0, layers):
    assert refusal(case, x0, layers) is None
    emulated.counts()
    y = run(case, x0, layers, BACKEND)
    assert emulated.counts()["launches"] == (1 if y.numel() else 0)
    wide = x0.double(), [{n: t.double() for n, t in layer.items()} for layer in layers]
    assert_within_budget("states", y, exactly(lambda: run(case, *wide, "reference"), y.dtype, y.dtype))
    assert torch.equal(y[:, : x0.shape[1]], x0)
    return y


@pytest.mark.parametrize("name", TAKEN)
@every_dtype
def test_against_float64(emulated, name, dtype):
    check(emulated, TAKEN[name], *inputs(TAKEN[name], dtype))


def test_parameters_of_a_norm_may_be_float32(emulated):
    x0, layers = inputs(TAKEN["densenet-eval"], torch.bfloat16)
    wide = [{n: t.float() if "norm" in n else t for n, t in layer.items()} for layer in layers]
    assert torch.equal(
        check(emulated, TAKEN["densenet-eval"], x0, wide), run(TAKEN["densenet-eval"], x0, layers, BACKEND)
    )


def test_parameters_may_be_left_out(emulated):
    x0, layers = inputs(TAKEN["densenet-eval"], torch.float32)
    check(
        emulated,
        TAKEN["densenet-eval"],
        x0,
        [{n: t for n, t in layer.items() if n not in ("affine_bias", "norm_weight", "norm_bias")} for layer in layers],
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s)), indirect=True)
@pytest.mark.parametrize("name", ["densenet-8x8", "paper-in-place"])
def test_every_schedule_gives_the_same_bits(emulated, schedule, name):
    case = TAKEN[name]._replace(batch=1)
    x0, layers = inputs(case, torch.float16)
    y = run(case, x0, layers, BACKEND)
    emulated.configure()
    assert torch.equal(y, run(case, x0, layers, BACKEND))


@every_dtype
def test_strides_of_the_input(emulated, dtype):
    case = TAKEN["densenet-8x8"]
    x0, layers = inputs(case, dtype)
    expected = run(case, x0, layers, BACKEND)
    buffer = torch.randn(2, 20, 8, 8).to(dtype)
    buffer[:, 5:17] = x0
    odd = torch.empty(x0.numel() + 1, dtype=dtype)
    odd[1:] = x0.flatten()
    for given in (
        buffer[:, 5:17],
        odd[1:].view_as(x0),
        x0.to(memory_format=torch.channels_last),
        x0.mT.contiguous().mT,
    ):
        assert torch.equal(run(case, given, layers, BACKEND), expected)


def test_a_state_that_is_not_read_does_not_matter(emulated):
    """Not even where it is NaN and its place is multiplied by zero."""
    for preactivation in (True, False):
        case_ = case(connectivity=((True,), (True, False), (False, False, True)), preactivation=preactivation)
        x0, layers = inputs(case_, torch.float16)
        layers[0]["affine_bias"] = torch.full_like(layers[0]["affine_bias"], torch.nan)
        y = run(case_, x0, layers, BACKEND)
        assert y[:, 3:5].isnan().all() and not y[:, 5:].isnan().any()


def test_nan_stays_in_its_neighbourhood(emulated):
    case_ = case((6, 6), 1, num_layers=1, connectivity=((True,),))
    for dtype in (torch.bfloat16, torch.float32):
        x0, layers = inputs(case_, dtype)
        x0[0, 1, 5, 5] = torch.nan
        y = run(case_, x0, layers, BACKEND)[0, 3]
        assert y.isnan().nonzero().tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]]


@every_dtype
def test_traffic_and_bank_conflicts(emulated, dtype):
    """x_0 and the filters are read once by each block of threads, the states written once."""
    rows = cuda_traffic.block_rows(emulated, dtype)
    assert len(rows) == 2
    for row in rows:
        assert 1 <= row.ratio <= row.bar and row.conflicts == 0, row
    case = TAKEN["densenet-8x8"]._replace(batch=1)
    x0, layers = inputs(case, dtype)
    with emulated.tracing():
        y = run(case, x0, layers, BACKEND)
    size = x0.element_size()
    assert emulated.traffic(x0)[0].requested == x0.numel() * size
    assert emulated.traffic(y)[1].requested == y.numel() * size and emulated.traffic(y)[0].requested == 0


def test_the_stated_shared_memory_is_what_the_kernel_asks_for(emulated, monkeypatch):
    """The emulator refuses 227 KiB and says how much it was: `limit` counts that and 1 KiB for the tables."""
    monkeypatch.setattr(_backend, "SMALLEST_SHARED_MEMORY", 1 << 30)
    for dtype in (torch.float16, torch.float32):
        for growth, affine, positions in (
            (6, "conv3x3", (32, 37)),
            (13, "conv1x1", (33, 38)),
            (32, "conv3x3", (20, 8)),
        ):
            case_ = case(positions, 1, growth_rate=growth, affine=affine, num_layers=33, connectivity=dense(33))
            x0, layers = inputs(case_, dtype)
            with pytest.raises(RuntimeError, match="dynamic shared memory") as error:
                run(case_, x0, layers, BACKEND)
            asked = int(re.search(r"(\d+) of dynamic shared memory", str(error.value)).group(1))
            assert asked + 1024 == resident.shared_bytes(*positions, case_.config, x0.element_size())[1]


REFUSED = {
    "statistics of the batch": case(norm="batch", training=True),
    "kernel='local' and a convolution, not 'softmax'": case(kernel="softmax", head_dim=2),
    "kernel='local' and a convolution, not 'local' and 'linear'": case((7,), affine="linear"),
    "no bottleneck": case(bottleneck=2),
    "input skip in the paper's order only": case(input_skip=True),
    "at most 64 layers, not 65": case((1, 1), num_layers=65, connectivity=dense(65)),
    "a growth rate of at most 32, not 33": case(growth_rate=33),
    "images of 36x36 have 1344 positions, more than 1280": case((36, 36)),
    r"images? of 32x32 and 32 layers needs? \d+ bytes of shared memory, of which a block has 101376": case(
        (32, 32), num_layers=32, connectivity=dense(32), growth_rate=6
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_every_refusal_says_its_reason(emulated, reason):
    refused = REFUSED[reason]
    assert re.search(reason, refusal(refused, *inputs(refused, torch.float16)))


def test_other_refusals_and_what_runs_instead(emulated, caplog):
    case_ = case()
    x0, layers = inputs(case_, torch.float32)
    assert "CUDA kernel only" in refusal(case_, x0, layers, "cpu") and resident.choose(x0, None) is None
    assert "float64" in refusal(case_, x0.double(), layers)
    x0.requires_grad_()
    assert "no gradients" in refusal(case_, x0, layers)
    with torch.no_grad():
        assert refusal(case_, x0, layers) is None
    _backend._log_once.cache_clear()
    emulated.counts()
    with caplog.at_level("INFO", "dnl_kernels"):
        y = run(case_, x0, layers, BACKEND)
    assert "no gradients" in caplog.text and emulated.counts()["launches"] == 3  # the composition: a layer a launch
    parameters = [dnl.LayerParameters(**layer) for layer in layers]
    assert torch.equal(y, composition.dnl_block(x0, parameters, case_.config, BACKEND)[0])
    (g,) = torch.autograd.grad(y.square().sum(), x0)
    (e,) = torch.autograd.grad(run(case_, x0, layers, "reference").square().sum(), x0)
    torch.testing.assert_close(g, e)


def test_forward_mode_comes_from_the_reference(emulated):
    case_ = case()
    x0, layers = inputs(case_, torch.float32)
    found = []
    for backend in (BACKEND, "reference"):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x0, torch.ones_like(x0))
            found.append(torch.autograd.forward_ad.unpack_dual(run(case_, dual, layers, backend)))
    assert found[0].tangent is not None
    torch.testing.assert_close(*found)


def test_images_without_pixels(emulated):
    x0, layers = inputs(case((0, 4)), torch.float16)
    assert run(case((0, 4)), x0, layers, BACKEND).shape == (2, 9, 0, 4)


def test_the_largest_block_runs(emulated, monkeypatch):
    """64 layers; 1280 positions."""
    deep = case((1, 2), 1, num_layers=64, connectivity=dense(64), growth_rate=1, tau=1 / 64)
    check(emulated, deep, *inputs(deep, torch.bfloat16))
    monkeypatch.setattr(_backend, "SMALLEST_SHARED_MEMORY", 227 << 10)  # as on an H100
    large = case((64, 20), 1, num_layers=1, connectivity=dense(1), affine="conv1x1")
    check(emulated, large, *inputs(large, torch.bfloat16))
