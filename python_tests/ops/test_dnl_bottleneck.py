"""A bottleneck block in evaluation, csrc/dnl_bottleneck, against the reference in float64; when it runs, and when the
weights that it keeps packed are packed again."""

import pytest
import torch

from dnl_kernels import _extension
from dnl_kernels.nn import DNLBlock
from dnl_kernels.ops.dnl_block import bottleneck, reference
from dnl_kernels.ops.dnl_block.config import BlockConfig, LayerParameters
from dnl_kernels.testing import assert_within_budget, exactly, relative_error

WINDOW = ((True,), (True, True), (False, True, True))
HOLES = ((True,), (False, True), (True, False, False))


def triangle(layers):
    return tuple((True,) * (layer + 1) for layer in range(layers))


def block(in_channels=5, layers=3, growth=4, bottleneck=2, connectivity=None, **options):
    connectivity = connectivity or triangle(layers)
    return BlockConfig(in_channels, len(connectivity), growth, connectivity, bottleneck=bottleneck, **options)


def parameters_of(config, dtype=torch.float64, bias=True):
    """Random tensors of every layer, scaled so that the states keep the size of x0."""
    layers = []
    for layer in range(config.num_layers):
        drawn = {}
        for name, shape in config.shapes(layer).items():
            if not bias and name.endswith("bias"):
                continue
            t = torch.randn(shape, dtype=torch.float64)
            if name.endswith("var") or name.endswith("norm_weight"):
                t = t.abs() + 0.5
            elif len(shape) > 1:
                t = t * (2 / t[0].numel()) ** 0.5
            drawn[name] = t.to(dtype)
        layers.append(LayerParameters(**drawn))
    return layers


def cast(layers, dtype):
    return [LayerParameters(*(t if t is None else t.to(dtype) for t in p)) for p in layers]


def image(config, batch, height, width, dtype):
    return torch.randn(batch, config.in_channels, height, width, dtype=torch.float64).to(dtype)


LEVELS = _extension._C.isa_levels() if _extension._C else []


def check(config, shape, dtype, bias=True, x=None, levels=lambda: [None]):
    """The states within the budget, and not by the path for training."""
    layers = parameters_of(config, dtype, bias)
    x = image(config, *shape, dtype) if x is None else x
    wide = x.double(), cast(layers, torch.float64)
    with torch.no_grad():
        exact = exactly(lambda: reference.dnl_block(*wide, config)[0], dtype)
        for _ in levels():
            states, statistics = bottleneck.dnl_block(x, layers, config)
            assert statistics is None and states.is_contiguous()
            assert torch.equal(states[:, : config.in_channels], x)
            assert_within_budget("states", states, exact)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """How many blocks were evaluated by the kernels: every test of values says so."""
    calls = []
    evaluate = bottleneck.evaluate
    monkeypatch.setattr(bottleneck, "evaluate", lambda *a: (calls.append(1), evaluate(*a))[1])
    return calls


SHAPES = {
    "one pixel": (2, 1, 1),
    "two pixels": (3, 1, 2),
    "a row": (1, 1, 49),
    "a column": (2, 37, 1),
    "odd": (3, 7, 7),
    "odd by even": (1, 11, 18),
    "wider than a panel": (1, 3, 49),
    "a batch of small maps": (13, 4, 5),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_on_every_instruction_set(levels, counted, shape):
    config = block(in_channels=37, layers=2, growth=12, bottleneck=4)
    check(config, shape, torch.float64, levels=levels)
    assert len(counted) == len(LEVELS)


def check_integers(config, shape, dtype, levels):
    """One layer of small integers, whose products and sums, Winograd's halves and quarters of them too, are exact in
    every order."""

    def integers(*shape):
        return torch.randint(-3, 4, shape).to(dtype)

    drawn = {name: integers(*size) for name, size in config.shapes(0).items()}
    drawn |= {name: torch.ones_like(t) for name, t in drawn.items() if name.endswith("var")}
    layers, x = [LayerParameters(**drawn)], integers(shape[0], config.in_channels, *shape[1:])
    with torch.no_grad():
        exact, _ = reference.dnl_block(x.double(), cast(layers, torch.float64), config)
        for level in levels():
            found, _ = bottleneck.dnl_block(x, layers, config)
            assert torch.equal(found.double(), exact), (level, config, shape)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_dtypes
def test_every_width_and_every_number_of_channels(levels, counted, dtype):
    """Every remainder of a tile, of a vector, of a panel and of a block of channels."""
    for n in range(1, 50):
        for sizes, shape in (((3, 2), (1, 3, n)), ((3, 2), (1, n, 2)), ((2, n), (1, 2, 3)), ((n, 1), (1, 3, 2))):
            check_integers(block(sizes[0], 1, sizes[1], 1, eps=0.0), shape, dtype, levels)
    assert len(counted) == 49 * 4 * len(LEVELS)


@both_dtypes
def test_two_groups_of_images(levels, counted, dtype):
    check_integers(block(3, 1, 12, 4, eps=0.0), (3 if dtype == torch.float64 else 5, 60, 59), dtype, levels)
    assert len(counted) == len(LEVELS)


CHANNELS = [
    (1, 1, 1), (2, 5, 1), (3, 7, 2), (16, 16, 1), (17, 12, 4), (64, 32, 4), (95, 24, 2), (97, 13, 3), (200, 48, 4),
    (300, 40, 1), (33, 20, 3),
]  # fmt: skip


@pytest.mark.parametrize("in_channels, growth, factor", CHANNELS)
def test_every_number_of_channels_on_every_instruction_set(levels, counted, in_channels, growth, factor):
    config = block(in_channels, 2, growth, factor)
    check(config, (2, 5, 6), torch.float32, levels=levels)
    assert len(counted) == len(LEVELS)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("norm", ["batch", None])
def test_every_activation(levels, counted, activation, norm):
    config = block(activation=activation, norm=norm, tau=1 / 3)
    check(config, (2, 6, 7), torch.float64, levels=levels)
    check(config, (2, 6, 7), torch.float32, levels=levels)
    assert len(counted) == 2 * len(LEVELS)


@pytest.mark.parametrize("connectivity", [WINDOW, HOLES], ids=["window", "holes"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_read_some_of_the_states(levels, counted, connectivity, bias):
    config = block(connectivity=connectivity, growth=9, in_channels=110, bottleneck=2)
    check(config, (2, 6, 7), torch.float64, bias, levels=levels)
    assert len(counted) == len(LEVELS)


def test_a_densenet_block_of_many_layers(levels, counted):
    """Winograd's form rounds more than a direct convolution, layer after layer."""
    config = block(64, 12, 32, 4, eps=1e-3)
    check(config, (1, 7, 8), torch.float32, bias=False, levels=levels)
    assert len(counted) == len(LEVELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(counted, dtype):
    """Narrow weights, float32 normalisations and states that are rounded at the end."""
    config = block(in_channels=20, growth=8, bottleneck=4)
    check(config, (2, 9, 10), dtype)
    assert len(counted) == 1


def test_an_empty_batch(counted):
    config = block()
    states, _ = bottleneck.dnl_block(torch.empty(0, 5, 4, 4), parameters_of(config, torch.float32), config)
    assert states.shape == (0, 17, 4, 4) and len(counted) == 1


def test_strided_inputs(levels, counted):
    config = block(in_channels=6)
    wide = torch.randn(3, 12, 9, 14)
    for x in (
        wide[:, ::2],
        wide.transpose(2, 3)[:, :6],
        wide[::2, 2:8, 1:, 3:],
        wide.to(memory_format=torch.channels_last)[:, :6],
    ):
        check(config, (), torch.float32, x=x, levels=levels)
    assert len(counted) == 4 * len(LEVELS)


def test_infinities_and_nan_stay_where_they_belong(counted):
    """A NaN reaches the pixels around it, and no others; so does an infinity, in Winograd's form, as NaN."""
    config = block(in_channels=4, layers=1, growth=16, bottleneck=1)
    layers, x = parameters_of(config, torch.float32), torch.randn(1, 4, 12, 12)
    x[0, 1, 5, 6] = torch.nan
    with torch.no_grad():
        states, _ = bottleneck.dnl_block(x, layers, config)
        eager, _ = reference.dnl_block(x, layers, config)
    found, expected = states[:, 4:].isnan(), eager[:, 4:].isnan()
    assert expected.any() and bool((found | ~expected).all())
    far = torch.ones(12, 12, dtype=torch.bool)
    far[3:9, 4:10] = False  # the tiles of 2 x 2 whose 4 x 4 inputs hold the pixel
    assert not found[:, :, far].any()
    assert relative_error(states[:, 4:, far], eager.double()[:, 4:, far]) < 1e-5


@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 14, 14), (3, 30, 31), (5, 2, 2)])
def test_the_number_of_threads_changes_no_bit(isa, shape):
    config = block(40, 4, 12, 4)
    layers, x, before = (
        parameters_of(config, torch.float32),
        image(config, *shape, torch.float32),
        torch.get_num_threads(),
    )
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [bottleneck.dnl_block(x, layers, config)[0] for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_sample_does_not_depend_on_its_batch():
    config = block(40, 3, 12, 4)
    layers, x = parameters_of(config, torch.float32), image(config, 9, 7, 6, torch.float32)
    together = bottleneck.dnl_block(x, layers, config)[0]
    for i in range(9):
        assert torch.equal(bottleneck.dnl_block(x[i : i + 1], layers, config)[0], together[i : i + 1])


# --- when the kernels run ---------------------------------------------------------------------------------------------


def test_gradients_and_tangents_take_the_differentiable_path(counted):
    config = block()
    layers, x = parameters_of(config), image(config, 2, 5, 5, torch.float64)
    assert bottleneck.dnl_block(x.requires_grad_(), layers, config)[0].requires_grad
    assert not counted
    with torch.no_grad():
        bottleneck.dnl_block(x, layers, config)
    assert len(counted) == 1
    direction = torch.randn_like(x)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(bottleneck.dnl_block(dual, layers, config)[0]).tangent
    _, expected = torch.autograd.functional.jvp(lambda x: reference.dnl_block(x, layers, config)[0], x, direction)
    assert len(counted) == 1 and relative_error(tangent, expected) < 1e-10


# --- packed weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def packs(monkeypatch):
    """The list of what was packed."""
    made = []
    pack = bottleneck.pack
    monkeypatch.setattr(bottleneck, "pack", lambda *a: (made.append(1), pack(*a))[1])
    return made


def evaluated(net, x):
    with torch.no_grad():
        return net(x)


def expected_of(net, x):
    """The block through the reference: no kernels, nothing kept."""
    with torch.no_grad():
        return reference.dnl_block(x, [layer.tensors() for layer in net.layers], net.config)[0]


def a_block(**options):
    net = DNLBlock(6, 3, 4, bottleneck=2, **options).eval()
    for layer in net.layers:
        for norm in (layer.norm, layer.inner_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net, torch.randn(2, 6, 5, 7)


def replace_data(net):
    net.layers[1].inner.weight.data = torch.randn_like(net.layers[1].inner.weight)


def replace_parameter(net):
    net.layers[1].inner.weight = torch.nn.Parameter(torch.randn_like(net.layers[1].inner.weight))


def step_of_an_optimiser(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()


def load(net):
    net.load_state_dict({k: v + 0.25 for k, v in net.state_dict().items()})


@torch.no_grad()
def in_place(net):
    net.layers[2].affine.weight.mul_(2)


@torch.no_grad()
def statistics(net):
    net.layers[0].inner_norm.running_var.add_(1)


@torch.no_grad()
def a_training_step(net):
    net.train()
    net(torch.randn(4, 6, 5, 7))
    net.eval()


CHANGES = [replace_data, replace_parameter, step_of_an_optimiser, load, in_place, statistics, a_training_step]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_are_packed_once_and_again_when_they_change(packs, change):
    net, x = a_block()
    first = evaluated(net, x)
    assert torch.equal(evaluated(net, x), first) and len(packs) == 1
    change(net)
    assert relative_error(evaluated(net, x), expected_of(net, x).double()) < 1e-5
    assert not torch.equal(evaluated(net, x), first) and len(packs) == 2


def test_another_type_is_packed_apart(packs):
    net, x = a_block()
    evaluated(net, x)
    net.double()
    assert relative_error(evaluated(net, x.double()), expected_of(net, x.double())) < 1e-12
    net.float()
    evaluated(net, x)
    assert len(packs) == 3


def test_blocks_and_configurations_are_packed_apart(packs):
    (net, x), (other, _) = a_block(), a_block()
    for _ in range(2):
        for each in (net, other):
            assert relative_error(evaluated(each, x), expected_of(each, x).double()) < 1e-5
    assert len(packs) == 2
    net.config = net.config._replace(eps=0.5)
    for layer in net.layers:
        layer.norm.eps = layer.inner_norm.eps = 0.5
    assert relative_error(evaluated(net, x), expected_of(net, x).double()) < 1e-5
    assert len(packs) == 3


def test_tensors_of_inference_mode_are_packed_every_time(packs):
    """They have no version that would tell of a change."""
    with torch.inference_mode():
        net, x = a_block()
        net(x)
        net.layers[0].affine.weight.mul_(2)
        assert relative_error(net(x), expected_of(net, x).double()) < 1e-5
    assert len(packs) == 2


def test_operators_are_what_their_fakes_say():
    for config in (block(), block(growth=20, in_channels=33, bottleneck=3), block(connectivity=HOLES)):
        tensors = [getattr(p, n) for p in parameters_of(config, torch.float32) for n in bottleneck.NAMES]
        arguments = (tensors, bottleneck.flattened(config.connectivity), config.in_channels, config.growth_rate,
                     config.bottleneck, True, 1.0, 1e-5)  # fmt: skip
        torch.library.opcheck(torch.ops.dnl.dnl_bottleneck_pack.default, arguments)
        packed, x = bottleneck.pack(tensors, config), image(config, 2, 5, 3, torch.float32)
        torch.library.opcheck(
            torch.ops.dnl.dnl_bottleneck_eval.default,
            (x, packed, bottleneck.flattened(config.connectivity), config.growth_rate, config.bottleneck, "relu"),
        )


def test_packed_weights_of_another_block_are_refused():
    config = block()
    packed = bottleneck.pack(
        [getattr(p, n) for p in parameters_of(config, torch.float32) for n in bottleneck.NAMES], config
    )
    x = torch.randn(1, 5, 4, 4)
    others = ((packed[:-1], config), (packed, config._replace(growth_rate=17)), (packed.double(), config))
    for wrong, used in others:
        with pytest.raises(RuntimeError, match="packed weights of another block"):
            bottleneck.evaluate(x, wrong, used)
