"""A training step of a bottleneck block, csrc/dnl_bottleneck: states, statistics and every gradient against the
reference in float64, and what its results do not depend on."""

import pytest
import torch

from dnl_kernels.ops.dnl_block import api, bottleneck, reference
from dnl_kernels.ops.dnl_block.config import BlockConfig, LayerParameters
from dnl_kernels.testing import assert_within_budget, cotangent, exactly

HOLES = ((True,), (False, True), (True, False, False))
QUICK = ("test_schema", "test_faketensor")


def block(in_channels=5, layers=2, growth=4, bottleneck=2, connectivity=None, training=True, **options):
    connectivity = connectivity or tuple((True,) * (layer + 1) for layer in range(layers))
    return BlockConfig(
        in_channels, len(connectivity), growth, connectivity, bottleneck=bottleneck, training=training, **options
    )


def parameters_of(config, bias=False):
    """Random float64 tensors of every layer, scaled so that the states keep the size of x0. A bias in front of a batch
    norm has no gradient but rounding, and is there on request."""
    layers = []
    for layer in range(config.num_layers):
        drawn = {}
        for name, shape in config.shapes(layer).items():
            if name == "affine_bias" and not bias:
                continue
            t = torch.randn(shape, dtype=torch.float64)
            if name.endswith("var") or name.endswith("norm_weight"):
                t = t.abs() + 0.5
            elif len(shape) > 1:
                t = t * (2 / t[0].numel()) ** 0.5
            drawn[name] = t
        layers.append(LayerParameters(**drawn))
    return layers


def given(config, shape, dtype, bias=False):
    """x0 and the layers in dtype, and the same numbers in float64."""
    x = torch.randn(shape[0], config.in_channels, *shape[1:], dtype=torch.float64).to(dtype)
    layers = [LayerParameters(*(t if t is None else t.to(dtype) for t in p)) for p in parameters_of(config, bias)]
    wide = [LayerParameters(*(t if t is None else t.double() for t in p)) for p in layers]
    return (x, layers), (x.double(), wide)


def step(run, x, layers, config):
    """The states, the statistics by their names, and every gradient by its tensor's name."""
    leaves = {"x0": x.detach().requires_grad_()}
    for i, p in enumerate(layers):
        for name, t in p._asdict().items():
            if t is not None and not name.endswith(("norm_mean", "norm_var")):
                leaves[f"{i}.{name}"] = t.detach().requires_grad_()
    rows = [
        p._replace(**{n: leaves[f"{i}.{n}"] for n in p._fields if f"{i}.{n}" in leaves}) for i, p in enumerate(layers)
    ]
    states, statistics = run(leaves["x0"], rows, config)
    gradients = torch.autograd.grad(states, list(leaves.values()), cotangent(states))
    found = {"d" + name: g for name, g in zip(leaves, gradients, strict=True)}
    if statistics is not None:
        for name in ("states_mean", "states_var", "inner_mean", "inner_var"):
            value = getattr(statistics, name)
            found[name] = torch.stack(value) if isinstance(value, list) else value
    return {"states": states.detach(), **found}


def check(config, shape, dtype, levels, bias=False):
    tensors, wide = given(config, shape, dtype, bias)
    assert bottleneck.limit(*tensors, config, None) is None
    exact = exactly(lambda: step(reference.dnl_block, *wide, config), dtype, dtype)
    for _ in levels():
        found = step(bottleneck.dnl_block, *tensors, config)
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            assert_within_budget(name, found[name], value)


CASES = {  # a block and the shape of its images
    "odd": (block(37, 2, 12, 4), (3, 7, 7)),
    "a batch of small maps": (block(3, 3, 5, 3), (13, 4, 5)),
    "two pixels": (block(4), (4, 1, 2)),
    "one pixel": (block(4), (9, 1, 1)),
    "a row": (block(4), (1, 1, 49)),
    "a column": (block(4), (2, 37, 1)),
    "several panels and groups of tiles": (block(20, 1, 16, 4), (2, 19, 23)),
    "many channels, some outputs": (block(130, 1, 17, 1), (2, 5, 6)),
    "holes": (block(18, connectivity=HOLES, growth=9), (3, 4, 6)),
    "silu, scaled": (block(activation="silu", tau=1 / 3), (2, 6, 7)),
    "leaky relu, large eps": (block(activation="leaky_relu(0.2)", eps=0.5), (2, 5, 4)),
    "given statistics": (block(19, 2, 6, 3, training=False), (2, 7, 6)),
    "no norm": (block(norm=None, training=False, activation="tanh"), (2, 5, 7)),
}


@pytest.mark.parametrize("config, shape", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_step_on_every_instruction_set(levels, config, shape, dtype):
    check(config, shape, dtype, levels, bias=not config.training)


def test_partial_sums_of_many_pixels(levels):
    """Several chunks of pixels and of tiles, each with several panels and groups."""
    check(block(17, 1, 8, 2), (2, 60, 59), torch.float32, levels)


def test_a_bias_in_front_of_a_norm_has_no_gradient():
    config = block(6, 2, 8, 2)
    (x, layers), _ = given(config, (2, 9, 9), torch.float64, bias=True)
    found = step(bottleneck.dnl_block, x, layers, config)
    for layer in range(2):
        assert found[f"d{layer}.affine_bias"].abs().max() < 1e-12 * found[f"d{layer}.affine_weight"].abs().max()


def test_means_far_from_zero_keep_their_variance(levels):
    """Channels of the input around 1000, and a bias that takes y there: the sums of squares would cancel."""
    config = block(6, 1, 4, 2)
    (x, layers), _ = given(config, (4, 8, 9), torch.float64, bias=True)
    x, layers = x + 1000, [layers[0]._replace(affine_bias=layers[0].affine_bias + 1000)]
    x, layers = x.float(), [LayerParameters(*(t if t is None else t.float() for t in layers[0]))]
    wide = [LayerParameters(*(t if t is None else t.double() for t in layers[0]))]
    with torch.no_grad():
        _, exact = reference.dnl_block(x.double(), wide, config)
    for _ in levels():
        _, found = bottleneck.dnl_block(x, layers, config)
        assert (found.states_var[:6] / exact.states_var[:6] - 1).abs().max() < 1e-5
        # y is stored in float32: its spacing near 1000 is 6e-5, against a deviation of about 1
        assert (found.inner_var[0] / exact.inner_var[0] - 1).abs().max() < 1e-3


def test_relu_is_flat_at_zero(levels):
    """Every activation stands on its kink, where relu's slope is 0: no gradient comes back through the layers."""
    config = block(3, 2, 4, 2, training=False)
    (x, layers), _ = given(config, (2, 4, 5), torch.float64)
    layers = [p._replace(norm_bias=p.norm_bias * 0, norm_mean=p.norm_mean * 0, inner_norm_bias=p.inner_norm_bias * 0,
                         inner_norm_mean=p.inner_norm_mean * 0) for p in layers]  # fmt: skip
    for _ in levels():
        found = step(bottleneck.dnl_block, x * 0, layers, config)
        assert found["d0.norm_bias"].abs().max() == 0 and found["d1.inner_norm_bias"].abs().max() == 0
        assert torch.equal(found["dx0"], cotangent(found["states"])[:, :3])


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training):
    config = block(training=training)
    (x, layers), _ = given(config, (0, 4, 4), torch.float32)
    found = step(bottleneck.dnl_block, x, layers, config)
    assert found["states"].shape == (0, 13, 4, 4)
    assert all(found[name].abs().sum() == 0 for name in found if name.startswith("d"))


def test_strided_images_and_gradients(levels):
    config = block(6, 2, 5, 2)
    (_, layers), _ = given(config, (1, 1, 1), torch.float64)
    wide = torch.randn(3, 12, 9, 14, dtype=torch.float64)
    inputs = [wide[:, ::2], wide.transpose(2, 3)[:, :6], wide[::2, 2:8, 1:, 3:]]
    inputs.append(wide.to(memory_format=torch.channels_last)[:, :6])
    for _ in levels():
        for x in inputs:
            leaf = x.detach().requires_grad_()
            states, _ = bottleneck.dnl_block(leaf, layers, config)
            g = torch.randn(states.shape[0], states.shape[2], states.shape[3], states.shape[1], dtype=torch.float64)
            (dx,) = torch.autograd.grad(states, leaf, g.permute(0, 3, 1, 2))
            again = x.contiguous().requires_grad_()
            states, _ = bottleneck.dnl_block(again, layers, config)
            (expected,) = torch.autograd.grad(states, again, g.permute(0, 3, 1, 2).contiguous())
            assert torch.equal(dx, expected)


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 30, 31), (5, 2, 2)])
def test_the_number_of_threads_changes_no_bit(isa, shape):
    config, before = block(40, 3, 12, 4), torch.get_num_threads()
    (x, layers), _ = given(config, shape, torch.float32)
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(step(bottleneck.dnl_block, x, layers, config))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype):
    config = block(20, 2, 8, 4)
    (x, layers), wide = given(config, (2, 9, 10), dtype)
    norms = [
        p._replace(**{n: t.float() for n, t in p._asdict().items() if t is not None and "norm" in n}) for p in layers
    ]
    found = step(bottleneck.dnl_block, x, norms, config)
    exact = step(reference.dnl_block, *wide, config)
    rounding = 2 * torch.finfo(dtype).eps
    for name, value in exact.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < 8 * rounding, (name, error)
    assert found["states"].dtype == found["d0.affine_weight"].dtype == dtype
    assert found["d0.norm_weight"].dtype == found["states_mean"].dtype == torch.float32


def test_nothing_is_kept_without_gradients_and_statistics_are_the_same():
    config = block(9, 3, 6, 2)
    (x, layers), _ = given(config, (3, 6, 5), torch.float32)
    tensors = [getattr(p, name) for p in layers for name in bottleneck.NAMES]
    kernel = torch.ops.dnl.dnl_bottleneck_fwd.default
    kept, not_kept = (kernel(x, tensors, keep, *bottleneck._static(config)) for keep in (True, False))
    assert kept[1].shape[0] == 3 and not_kept[1].shape[0] == 0
    assert all(torch.equal(kept[i], not_kept[i]) for i in (0, 2, 3, 4, 5))


def test_the_operators_are_what_their_fakes_say():
    for config in (block(), block(9, growth=20, bottleneck=3), block(connectivity=HOLES, norm=None, training=False)):
        (x, layers), _ = given(config, (2, 5, 3), torch.float32)
        tensors = [getattr(p, name) for p in layers for name in bottleneck.NAMES]
        static = bottleneck._static(config)
        torch.library.opcheck(torch.ops.dnl.dnl_bottleneck_fwd.default, (x, tensors, True, *static), test_utils=QUICK)
        found = torch.ops.dnl.dnl_bottleneck_fwd.default(x, tensors, True, *static)
        backward = (torch.randn_like(found[0]), *found, tensors, *static)
        torch.library.opcheck(torch.ops.dnl.dnl_bottleneck_bwd.default, backward, test_utils=QUICK)


def test_what_the_forward_pass_kept_of_another_block_is_refused():
    config = block()
    (x, layers), _ = given(config, (2, 5, 3), torch.float32)
    tensors = [getattr(p, name) for p in layers for name in bottleneck.NAMES]
    states, inner, *statistics = torch.ops.dnl.dnl_bottleneck_fwd.default(x, tensors, True, *bottleneck._static(config))
    backward = torch.ops.dnl.dnl_bottleneck_bwd.default
    with pytest.raises(RuntimeError, match="what the forward pass kept"):
        backward(states, states, inner[:1], *statistics, tensors, *bottleneck._static(config))
    with pytest.raises(RuntimeError, match="dnl_bottleneck: statistics"):
        backward(states, states, inner, statistics[0][:-1], *statistics[1:], tensors, *bottleneck._static(config))


def test_the_block_takes_this_way_and_says_so():
    config = block()
    (x, layers), _ = given(config, (2, 5, 3), torch.float32)
    assert api.explain(x, layers, config)[0] == "bottleneck block"
    assert api.explain(x, layers, config._replace(input_skip=True))[0] != "bottleneck block"
