"""3x3 convolutions of many channels on the CPU, in Winograd's form: dense_conv2d and the block against float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

import dnl_kernels as dnl
from dnl_kernels.testing import assert_within_budget, exactly

CHANNELS = [((16,), 16), ((64,), 32), ((17, 1, 30), 19), ((33, 32), 70), ((20,), 131)]
SIDES = [(1, 1), (1, 49), (49, 1), (2, 3), (4, 2), (5, 33), (8, 8), (13, 31), (33, 34)]


def results(backend, states, parameters, dy, **call):
    states = [s.detach().requires_grad_() for s in states]
    parameters = {k: v.detach().requires_grad_() for k, v in parameters.items()}
    y = dnl.dense_conv2d(states, **parameters, backend=backend, **call)
    names = [*(f"states[{j}]" for j in range(len(states))), *parameters]
    return {"y": y.detach()} | dict(
        zip(names, torch.autograd.grad(y, [*states, *parameters.values()], dy.to(y)), strict=True)
    )


def draw(channels, outputs, batch, sides, norm):
    total = sum(channels)
    states = [torch.randn(batch, c, *sides, dtype=torch.float64) for c in channels]
    parameters = {"weight": torch.randn(outputs, total, 3, 3, dtype=torch.float64) / (3 * total**0.5)}
    parameters["bias"] = torch.randn(outputs, dtype=torch.float64)
    if norm:
        parameters |= {n: torch.rand(total, dtype=torch.float64) + 0.5 for n in ("norm_scale", "norm_shift")}
    return states, parameters, torch.randn(batch, outputs, *sides, dtype=torch.float64)


def check(drawn, dtype, levels=lambda: [None], **call):
    states, parameters, dy = drawn
    # The same numbers in both precisions.
    narrow = [s.to(dtype) for s in states], {k: v.to(dtype) for k, v in parameters.items()}, dy.to(dtype)
    wide = [s.double() for s in narrow[0]], {k: v.double() for k, v in narrow[1].items()}, narrow[2].double()
    exact = exactly(lambda: results("reference", *wide, **call), dtype)
    for _ in levels():
        for name, found in results("cpu", *narrow, **call).items():
            assert_within_budget(name, found, exact[name])


@pytest.mark.parametrize("channels, outputs", CHANNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_channel_count(levels, channels, outputs, dtype):
    check(draw(channels, outputs, 2, (5, 11), True), dtype, levels, activation="leaky_relu(0.2)", scale=0.7)


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_size(levels, sides, batch):
    check(draw((21,), 18, batch, sides, False), torch.float32, levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_widths_from_1_to_49(levels, dtype):
    for n in range(1, 50):
        check(draw((16,), 16, 1, (5, n), False), dtype, levels)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_prologues_and_long_sums_over_tiles(levels, activation):
    check(draw((40,), 24, 2, (41, 37), True), torch.float32, levels, activation=activation)


def test_half_types_and_strided_states():
    for dtype in (torch.bfloat16, torch.float16):
        check(draw((32,), 16, 2, (7, 10), False), dtype)
    states, parameters, dy = draw((48,), 16, 2, (10, 7), False)
    slices = [states[0][:, 1:20], states[0][:, 20:34].transpose(2, 3).contiguous().transpose(2, 3)]
    parameters["weight"] = parameters["weight"][:, :33]
    check((slices, parameters, dy), torch.float64)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)"])
def test_activations_at_exact_zeros(levels, activation):
    """The slope there is torch's; a budget allows either."""
    states, parameters, dy = draw((20,), 18, 2, (6, 41), False)
    states[0][:, ::3] = 0.0
    states[0][:, 1::3, :, ::2] = -0.0
    expected = results("reference", states, parameters, dy, activation=activation)
    for _ in levels():
        found = results("cpu", states, parameters, dy, activation=activation)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_an_empty_batch():
    states, parameters, dy = draw((16,), 16, 0, (5, 5), True)
    found = results("cpu", states, parameters, dy, activation="relu")
    assert found["y"].shape == (0, 16, 5, 5) and found["states[0]"].shape == (0, 16, 5, 5)
    assert all(not found[name].any() for name in parameters)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 40, 50)], ids=str)
def test_the_same_bits_from_1_2_and_3_threads(isa, shape):
    batch, *sides = shape
    states, parameters, dy = draw((40,), 72, batch, sides, True)
    narrow = [s.float() for s in states], {k: v.float() for k, v in parameters.items()}, dy.float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results("cpu", *narrow, activation="relu"))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name]), name


def test_what_is_not_finite_stays_in_its_image_and_near_its_place(isa):
    """A tile mixes its 6 x 4 inputs: a NaN reaches the tiles that read it, further than the 3 x 3 pixels of a direct
    convolution, and nothing else."""
    x = torch.ones(3, 16, 12, 12)
    x[1, 3, 5, 0], x[1, 2, 11, 11] = float("nan"), float("inf")
    y = dnl.dense_conv2d([x], torch.ones(16, 16, 3, 3), backend="cpu")
    assert y[0].isfinite().all() and y[2].isfinite().all()
    assert y[1, :, 4:7, 0:2].isnan().all() and y[1, :, 10:, 10:].isfinite().logical_not().all()
    assert y[1, :, 4:7, 4:8].isfinite().all() and y[1, :, 0:3].isfinite().all()


def test_what_lies_outside_an_image_is_zero(levels):
    """Neighbours in the numbering of tiles, and rows of other images, reach nothing."""
    weight = torch.randn(16, 16, 3, 3)
    for width in (1, 2, 3, 5):
        x = torch.full((3, 16, 6, width), 1e30)
        x[1] = torch.randn(16, 6, width)
        exact = exactly(lambda x=x: F.conv2d(x[1:2].double(), weight.double(), padding=1), torch.float32)
        for level in levels():
            y = dnl.dense_conv2d([x], weight, backend="cpu")
            assert_within_budget(f"{level}, width {width}", y[1:2], exact)


def gradients(block, x, dy):
    leaf = x.detach().requires_grad_()
    y = block(leaf)
    found = torch.autograd.grad(y, [leaf, *block.parameters()], dy.to(y))
    return {"y": y.detach()} | dict(zip(["x", *(n for n, _ in block.named_parameters())], found, strict=True))


SKIPS = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]) > 0
BLOCKS = {
    "rdb": {"norm": None, "preactivation": False, "activation": "leaky_relu(0.2)"},
    "rdn": {"norm": None, "preactivation": False, "activation": "relu", "tau": 0.5},
    "preactivation": {"norm": None, "activation": "leaky_relu(-0.5)"},
    "densenet": {"norm": "batch"},
    "paper": {"norm": "batch", "preactivation": False, "activation": "silu"},
    "connectivity": {"norm": None, "preactivation": False, "connectivity": SKIPS, "activation": "relu"},
    "input-skip": {"norm": None, "preactivation": False, "input_skip": True, "activation": "tanh"},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_blocks(levels, name, training):
    options = {"affine": "conv3x3", "kernel": "local"} | BLOCKS[name]
    layers = len(options["connectivity"]) if "connectivity" in options else 3
    block = dnl.DNLBlock(24, layers, 18, backend="cpu", **options).train(training)
    x, dy = torch.randn(3, 24, 11, 14), torch.randn(3, 24 + layers * 18, 11, 14)
    reference = dnl.DNLBlock(24, layers, 18, backend="reference", **options).train(training)
    reference.load_state_dict(block.state_dict())
    initial, wide = copy.deepcopy(block.state_dict()), reference.double()

    def everything():
        """A copy each time: a forward pass in training changes the running statistics."""
        fresh = copy.deepcopy(wide)
        return gradients(fresh, x.double(), dy), dict(fresh.named_buffers())

    exact, buffers = exactly(everything, torch.float32)
    for level in levels():
        block.load_state_dict(initial)
        for key, found in gradients(block, x, dy).items():
            assert_within_budget(f"{level}: {key}", found, exact[key])
        for key, found in block.named_buffers():  # running statistics
            assert_within_budget(f"{level}: {key}", found, buffers[key]) if found.is_floating_point() else None


def test_second_derivatives_of_a_wide_block():
    options = {"affine": "conv3x3", "kernel": "local", "norm": None, "preactivation": False}
    block = dnl.DNLBlock(16, 2, 16, activation="leaky_relu(0.2)", backend="cpu", **options).double()
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64, requires_grad=True)

    def directional(module):
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *module.parameters()])

    reference = dnl.DNLBlock(16, 2, 16, activation="leaky_relu(0.2)", backend="reference", **options).double()
    reference.load_state_dict(block.state_dict())
    for a, e in zip(directional(block), directional(reference), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
