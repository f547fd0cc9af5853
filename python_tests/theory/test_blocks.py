"""Blocks as samples of curves: depth doubled and halved, and the regularizer of a block's own parameters."""

import itertools

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.nn import DNLBlock

VARIANTS = [
    {"affine": "conv3x3"},
    {"affine": "conv3x3", "bottleneck": 2},
    {"affine": "conv1x1", "preactivation": False, "input_skip": True},
    {
        "affine": "linear",
        "preactivation": False,
        "norm": None,
        "kernel": "softmax",
        "heads": 2,
        "projection_bias": True,
    },
    {"affine": "linear", "preactivation": False, "norm": None, "kernel": "gaussian", "tau": "1/L", "residual": True},
]


def inputs(block, batch=2):
    config = block.config
    shape = (batch, 5, config.in_channels) if config.affine == "linear" else (batch, config.in_channels, 4, 4)
    return torch.randn(shape, dtype=torch.float64)


def make(layers=4, in_channels=3, growth=2, **options):
    block = DNLBlock(in_channels, layers, growth, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in itertools.chain(block.parameters(), block.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return block.eval()


@pytest.mark.parametrize("options", VARIANTS)
def test_coarsen_inverts_refine_exactly(options):
    block = make(**options)
    fine = theory.refine(block)
    assert fine.config.num_layers == 8
    assert fine.config._replace(num_layers=4, connectivity=(), tau=0) == block.config._replace(connectivity=(), tau=0)
    assert not fine.training
    back = theory.coarsen(fine)
    for name, tensor in block.state_dict().items():
        assert torch.allclose(back.state_dict()[name], tensor, rtol=1e-14, atol=0), name
    assert torch.isfinite(fine(inputs(fine))).all()


def literal(layers, curves, tau="1/L", **options):
    """Eq. (1) as a block: local tanh on tokens, equal widths, an input skip, K from curves."""
    d = curves.dim
    block = DNLBlock(
        d, layers, d, affine="linear", norm=None, preactivation=False, activation="tanh", input_skip=True, tau=tau,
        dtype=torch.float64, **options,
    )  # fmt: skip
    P = theory.sample_pointwise(curves, layers)
    with torch.no_grad():
        for index, layer in enumerate(block.layers):
            row = P.row("K", index) / (layers * block.config.tau)
            layer.affine.weight.copy_(torch.cat(list(row), 1))
            layer.skip.weight.copy_(P.A[index])
            layer.skip.bias.copy_(P.a[index])
    zero_b = theory.DiscreteParameters(P.A, P.a, P.K, torch.zeros_like(P.b), P.vartheta)
    return block, zero_b


@pytest.mark.parametrize("tau", ["1/L", 1.0])
def test_a_block_is_eq_1_and_has_its_regularizer(tau):
    block, P = literal(6, theory.ParameterCurves.random_smooth(3, 1), tau)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    states = theory.forward(P, x, theory.LayerMap()).states
    assert (block(x).unflatten(-1, (7, 3)).movedim(2, 0) - states).abs().max() < 1e-13
    for p in (2, 4):
        assert theory.regularizer(block, p).item() == pytest.approx(theory.regularizer(P, p).item(), rel=1e-12)
    only = theory.regularizer(block, weights={"A": 3.0}, anchor="initial")
    assert only.item() == pytest.approx(theory.regularizer(P, weights={"A": 3.0}, anchor="initial").item(), rel=1e-13)


def kron(P, positions):
    """I_N (x) Theta: the same matrices and biases at every position, position-major."""
    eye = torch.eye(positions, dtype=torch.float64)

    def spread(value):
        if value.ndim == 3:
            blocks = torch.einsum("nm,lab->lnamb", eye, value)
            return blocks.reshape(len(value), positions * value.shape[1], positions * value.shape[2])
        return value.repeat(1, positions)

    return theory.DiscreteParameters(spread(P.A), spread(P.a), spread(P.K), spread(P.b), P.vartheta)


@pytest.mark.parametrize("p", [2, 4])
def test_the_regularizer_of_a_triangle_without_the_inputs_column(p):
    """An input of another width: K's triangle starts at j = 1, and its differences are still those of step 1 / L."""
    layers, inputs, growth = 5, 3, 2
    block = make(layers, inputs, growth, affine="conv1x1", norm=None)
    K = {
        (i, j): layers * block.config.tau * layer.affine.weight[:, inputs + (j - 1) * growth :][:, :growth]
        for i, layer in enumerate(block.layers)
        for j in range(1, i + 1)
    }
    rises = [K[i + 1, j] - K[i, j] for i, j in K if i + 1 < layers] + [K[i, j + 1] - K[i, j] for i, j in K if j < i]
    expected = sum((1 if i == j else 2) * k.norm() ** p for (i, j), k in K.items())
    expected += sum(2 * (rise * layers).norm() ** p for rise in rises)
    only = dict.fromkeys("Aab", 0.0) | {"vartheta": 0.0, "K": 1.0}
    assert theory.regularizer(block, p, only).item() == pytest.approx(expected.item() / layers**2, rel=1e-12)


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (theory.LocalKernel(), {"value": "curve"}),
        (theory.GaussianKernel(), {}),
        (theory.EmbeddedGaussianKernel(), {"value": "curve"}),
        (theory.RBFKernel(), {"value": "curve"}),
        (theory.RBFKernel(0.6), {}),
    ],
)
def test_as_block_is_eq_1_through_the_package(kernel, options, backend):
    """Theta of one position, given to `dnl_block`, against the dense recursion on all positions together."""
    d, positions, layers = 3, 4, 7
    phi = theory.LayerMap(theory.NonLocalOperator(kernel, positions=positions, **options), "tanh")
    curves = theory.ParameterCurves.random_smooth(d, 2, vartheta=phi.parameter_count(d * positions))
    P = theory.sample_pointwise(curves, layers)
    x = torch.randn(2, positions, d, dtype=torch.float64)
    expected = theory.forward(kron(P, positions), x.flatten(1), phi).states
    block = theory.as_block(P, phi, backend=backend)
    try:
        states = block(x).unflatten(-1, (layers + 1, d)).movedim(2, 0).flatten(2)
    except (RuntimeError, ValueError) as error:
        if backend != "cpu" or "cpu" not in str(error):
            raise
        pytest.skip(f"this installation has no CPU kernels: {error}")
    assert (states - expected).abs().max() < 1e-13


def test_a_block_converges_to_the_integral_equation():
    """The package's own network: order 1 towards the solution that eq. (7) has on all positions together."""
    d, positions, levels = 2, 3, (16, 32, 64)
    phi = theory.LayerMap.of("softmax", positions=positions)
    curves = theory.ParameterCurves.random_smooth(d, 3, vartheta=phi.parameter_count(d * positions))
    x = torch.randn(1, positions, d, dtype=torch.float64)
    eye = torch.eye(positions, dtype=torch.float64)
    whole = theory.ParameterCurves(
        lambda t: torch.einsum("nm,...ab->...namb", eye, curves.A(t)).reshape(*t.shape, d * positions, d * positions),
        lambda t: curves.a(t).repeat(*[1] * t.ndim, positions),
        lambda t, s: torch.einsum("nm,...ab->...namb", eye, curves.K.evaluate(t, s)).flatten(-4, -3).flatten(-2),
        lambda t, s: curves.b.evaluate(t, s).repeat(*[1] * t.ndim, positions),
        vartheta=curves.vartheta,
        dim=d * positions,
    )
    limit = theory.solve_integral_equation(whole, x.flatten(1), phi, layers=16, rtol=1e-8).final
    errors = []
    for layers in levels:
        block = theory.as_block(theory.sample_pointwise(curves, layers), phi)
        errors.append((block(x)[..., -d:].flatten(1) - limit).abs().max().item())
    assert theory.observed_order(errors, levels)[-1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("tau", ["1/L", 1.0])
def test_refining_changes_the_states_by_tau(tau):
    """x'^{2j} - x^j = O(tau): order 1 over L for the literal eq. (1)."""
    x, levels, gaps = torch.randn(1, 2, 3, dtype=torch.float64), (8, 16, 32), []
    curves = theory.ParameterCurves.random_smooth(3, 5)
    for layers in levels:
        block, _ = literal(layers, curves, tau)
        fine = theory.refine(block)
        assert fine.config.tau == (pytest.approx(1 / (2 * layers)) if tau == "1/L" else 1.0)
        coarse_states = block(x).unflatten(-1, (layers + 1, 3))
        fine_states = fine(x).unflatten(-1, (2 * layers + 1, 3))[..., ::2, :]
        gaps.append((fine_states - coarse_states).norm(dim=-1)[..., 1:].max().item())
    assert theory.observed_order(gaps, levels)[-1] == pytest.approx(1, abs=0.15)


def test_refining_an_absorbed_block_without_skip_keeps_its_forcing():
    """A plain block (tau = 1, no skip, unequal widths) whose weights are smooth in depth: order 1 again."""
    torch.manual_seed(0)
    levels, gaps, x = (8, 16, 32), [], torch.randn(2, 5, 3, 3, dtype=torch.float64)
    forcing, weight = torch.randn(2, 5, 1, 1, dtype=torch.float64), torch.randn(2, 2, 1, 1, dtype=torch.float64)
    for layers in levels:
        block = DNLBlock(5, layers, 2, affine="conv1x1", norm=None, activation="tanh", dtype=torch.float64)
        with torch.no_grad():
            for index, layer in enumerate(block.layers):
                t = index / layers
                states = [weight * (1 + t - j / layers) / layers for j in range(1, index + 1)]
                layer.affine.weight.copy_(torch.cat([forcing * (1 + t), *states], 1))
        fine = theory.refine(block)
        coarse_states = block(x)[:, 5:].unflatten(1, (layers, 2))
        fine_states = fine(x)[:, 5:].unflatten(1, (2 * layers, 2))[:, 1::2]
        gaps.append((fine_states - coarse_states).abs().max().item())
    assert gaps[-1] < 0.2
    assert theory.observed_order(gaps, levels)[-1] == pytest.approx(1, abs=0.15)


def test_refined_values_are_the_extension():
    """Even indices copy, odd ones average; the step is halved on the states' columns, not on the input's."""
    block = make(layers=4, affine="linear", norm=None)
    fine = theory.refine(block)
    old = [layer.affine.weight for layer in block.layers]
    new = [layer.affine.weight for layer in fine.layers]
    assert torch.equal(new[2][:, :3], old[1][:, :3])
    assert torch.allclose(new[3][:, :3], (old[1][:, :3] + old[2][:, :3]) / 2)
    S = lambda row, j: old[row][:, 3 + 2 * (j - 1) : 3 + 2 * j]  # noqa: E731
    assert torch.allclose(new[4][:, 3 + 2 * 1 : 3 + 2 * 2], S(2, 1) / 2)  # (l', j') = (4, 2) is (2, 1)
    average = (S(2, 1) + S(3, 1) + S(2, 2) + S(3, 2)) / 4
    assert torch.allclose(new[5][:, 3 + 2 * 2 : 3 + 2 * 3], average / 2)  # (5, 3) lies between
    assert torch.allclose(new[7][:, 3 + 2 * 6 :], S(3, 3) / 2)  # (7, 7): the copied last interval


@pytest.mark.parametrize("options", VARIANTS)
def test_regularizer_reaches_every_parameter(options):
    block = make(**options)
    value = theory.regularizer(block)
    value.backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    doubled = theory.regularizer(block, weights=2.0)
    assert doubled.item() == pytest.approx(2 * value.item(), rel=1e-14)


@pytest.mark.parametrize("options", VARIANTS[:4])
def test_the_gradient_of_a_blocks_regularizer_is_its_slope(options):
    """Along a random direction of all parameters, by a central difference."""
    block = make(**options)
    parameters = list(block.parameters())
    gradient = torch.autograd.grad(theory.regularizer(block, 4), parameters)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True)).item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(sign * 1e-5 * v)
            values.append(theory.regularizer(block, 4).item())
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(sign * 1e-5 * v)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_regularizer_of_one_layer_is_its_values(skip):
    """No neighbour, no difference: tau = 1, so R is the sum of the squares (of the fourth power for K)."""
    block = make(layers=1, affine="linear", norm=None, preactivation=False, input_skip=skip)
    layer = block.layers[0]
    W = layer.affine.weight
    expected = W.square().sum()
    if skip:
        expected = W.norm() ** 4 + layer.skip.weight.square().sum() + layer.skip.bias.square().sum()
    else:
        expected = expected + layer.affine.bias.square().sum()
    value = theory.regularizer(block)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.autograd.grad(value, W)[0].abs().max() > 0


def test_regularizer_of_a_smooth_block_does_not_grow_with_depth():
    """A refined block's R_L stays bounded (Lemma 8), where a rough block of the same size has a far larger one."""
    block, _ = literal(8, theory.ParameterCurves.random_smooth(2, 3))
    values = [theory.regularizer(block).item()]
    for _ in range(2):
        block = theory.refine(block)
        values.append(theory.regularizer(block).item())
    assert max(values) < 1.5 * min(values)


def test_discrete_parameters_refine_too():
    P = theory.sample_pointwise(theory.ParameterCurves.random_smooth(2, 2), 4)
    fine = theory.refine(P)
    assert fine.layers == 8
    assert all(torch.equal(value, getattr(P, name)) for name, value in theory.coarsen(fine).items())


def test_what_cannot_be_carried():
    with pytest.raises(ValueError, match="connectivity='dense'"):
        theory.refine(DNLBlock(3, 4, 2, connectivity=2))
    with pytest.raises(ValueError, match="even number of layers"):
        theory.coarsen(DNLBlock(3, 5, 2))
    with pytest.raises(ValueError, match="at least 4 layers"):
        theory.coarsen(DNLBlock(3, 2, 2))
    with pytest.raises(ValueError, match="at least 2 layers"):
        theory.refine(DNLBlock(3, 1, 2))
    with pytest.raises(TypeError, match="DNLBlock"):
        theory.refine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 <= p"):
        theory.regularizer(DNLBlock(3, 4, 2), 1)
    with pytest.raises(ValueError, match="parameters must have connectivity='dense'"):
        theory.regularizer(DNLBlock(3, 4, 2, connectivity=2))
    P = theory.DiscreteParameters.zeros(2, 2)
    with pytest.raises(ValueError, match="normalization 'row'"):
        theory.as_block(P, theory.LayerMap(theory.NonLocalOperator(theory.RBFKernel(1.0), "sym", positions=2)))
    with pytest.raises(ValueError, match="softplus"):
        theory.as_block(P, theory.LayerMap(None, "softplus"))
