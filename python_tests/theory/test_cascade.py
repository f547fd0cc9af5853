"""Whole networks carried to another depth, with their optimiser's momentum."""

import itertools

import pytest
import torch
from torch import nn

from dnl_kernels import theory
from dnl_kernels.nn import DNLBlock, DNLNet

ORDERS = [
    {"preactivation": True},
    {"preactivation": False, "norm": None, "input_skip": True, "tau": "1/L"},
    {"preactivation": False, "kernel": "softmax", "input_skip": True},
    {"preactivation": True, "bottleneck": 2, "compression": 1.0},
]


def network(layers=4, seed=0, **options):
    torch.manual_seed(seed)
    net = DNLNet(2, 3, num_layers=[layers, layers], growth_rate=3, stem_channels=5, **options).double()
    with torch.no_grad():
        for tensor in itertools.chain(net.parameters(), net.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return net


def trained(net, steps=2):
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for _ in range(steps):
        sgd.zero_grad()
        net(x).square().sum().backward()
        sgd.step()
    return sgd


@pytest.mark.parametrize("options", ORDERS)
def test_coarsen_inverts_refine_on_a_whole_network(options):
    net = network(**options)
    sgd = trained(net)
    fine, faster = theory.refine(net, sgd)
    assert [block.config.num_layers for block in fine.blocks] == [8, 8]
    assert fine.blocks[1].config.in_channels > net.blocks[1].config.in_channels
    back, slower = theory.coarsen(fine, faster)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(back.state_dict()[name].double(), tensor.double(), rtol=1e-13, atol=1e-15), name
    for (name, ours), theirs in zip(net.named_parameters(), back.parameters(), strict=True):
        momentum = sgd.state[ours]["momentum_buffer"]
        assert torch.allclose(slower.state[theirs]["momentum_buffer"], momentum, rtol=1e-13, atol=1e-15), name
    assert torch.isfinite(fine(torch.randn(2, 2, 6, 6, dtype=torch.float64))).all()
    assert slower.defaults == sgd.defaults
    assert {k: v for k, v in slower.param_groups[0].items() if k != "params"} == {
        k: v for k, v in sgd.param_groups[0].items() if k != "params"
    }


def test_momentum_is_carried_as_the_derivative_of_the_parameters():
    """refine(theta + v) - refine(theta) is what refine makes of a momentum v: in every tensor, the new filters too."""
    net = network()
    sgd = trained(net)
    torch.manual_seed(1)
    fine, faster = theory.refine(net, sgd)
    moved = network()
    moved.load_state_dict(net.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(moved.parameters(), net.parameters(), strict=True):
            ours.add_(sgd.state[theirs]["momentum_buffer"])
    torch.manual_seed(1)
    ahead = dict(theory.refine(moved).named_parameters())
    for name, p in fine.named_parameters():
        momentum = faster.state[p]["momentum_buffer"]
        assert (ahead[name] - p - momentum).abs().max() < 1e-12 * (1 + p.abs().max()), name
    assert any(faster.state[p]["momentum_buffer"].abs().max() > 0 for p in fine.blocks[1].parameters())


@pytest.mark.parametrize("options", [ORDERS[0], ORDERS[1]])
def test_outputs_converge_under_refinement(options):
    """x'^{2j} - x^j = O(tau): each refinement of what has become a smooth curve moves the output half as much."""
    net = network(2, **options).eval()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        outputs = [net(x)]
        for _ in range(5):
            net = theory.refine(net)
            outputs.append(net(x))
    gaps = [(b - a).abs().max().item() for a, b in itertools.pairwise(outputs)]
    assert gaps[4] < 0.6 * gaps[3] < 0.6 * gaps[2]


def test_new_filters_of_a_transition_have_no_effect_yet():
    net = network()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    outputs, filters = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fine = theory.refine(net)
        filters.append(fine.transitions[0].conv.weight)
        outputs.append(fine.train()(x))
    old = net.transitions[0].conv.out_channels
    assert torch.equal(filters[0][:old], filters[1][:old])
    assert not torch.equal(filters[0][old:], filters[1][old:])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-13
    outputs[1].square().sum().backward()
    assert filters[1].grad is not None
    assert fine.blocks[1].layers[0].affine.weight.grad[:, old:].abs().max() > 0, "what reads them learns"


def test_settings_of_a_block_are_kept_or_refused():
    block = DNLBlock(
        3, 4, 2, affine="conv1x1", spatial_dims=1, dropout=0.25, activation=nn.PReLU(), dtype=torch.float64
    )
    block.layers[2].norm.weight.requires_grad_(False)
    fine = theory.refine(block)
    assert (fine.config.spatial_dims, fine.layers[7].dropout) == (1, 0.25)
    assert isinstance(fine.layers[7].activation, nn.PReLU)
    frozen = [not layer.norm.weight.requires_grad for layer in fine.layers]
    assert frozen == [False, False, False, False, True, True, False, False]
    block.layers[1].norm = nn.SyncBatchNorm(5).double()
    with pytest.raises(TypeError, match=r"layers\.1\.norm is a SyncBatchNorm"):
        theory.refine(block)
    net = network()
    net.classifier = nn.Bilinear(2, 2, 2)
    with pytest.raises(TypeError, match="classifier must be a Linear, got Bilinear"):
        theory.refine(net)
    net.stem.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="source's stem has hooks"):
        theory.refine(net)
    with pytest.raises(ValueError, match="one growth rate"):
        theory.refine(DNLBlock(3, 2, [2, 4], affine="conv1x1"))


def test_what_cannot_be_carried_is_named():
    net = network()
    with pytest.raises(TypeError, match=r"torch.optim.SGD, .* got Adam"):
        theory.refine(net, torch.optim.Adam(net.parameters()))
    first, *rest = net.parameters()
    with pytest.raises(ValueError, match="one parameter group, got 2"):
        theory.refine(net, torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=1.0))
    with pytest.raises(ValueError, match="all parameters of source"):
        theory.refine(net, torch.optim.SGD(rest, lr=1.0))
    with pytest.raises(TypeError, match="DNLNet or DiscreteParameters, got Linear"):
        theory.refine(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="optimizer must be None"):
        theory.coarsen(theory.DiscreteParameters.zeros(4, 1), torch.optim.SGD(rest, lr=1.0))
    with pytest.raises(ValueError, match="at least 4 layers"):
        theory.coarsen(network(2))


def test_depth_regularity_tells_curves_from_independent_layers(tmp_path):
    """Roughness halves with the depth for samples of one curve and stays for independent entries."""
    curves = theory.ParameterCurves.random_smooth(2, 1)
    reports = [theory.depth_regularity(theory.sample_pointwise(curves, layers)) for layers in (16, 32)]
    for k in (0, 1):
        assert 0.4 < reports[1].roughness[k] / reports[0].roughness[k] < 0.6
    rough = [theory.depth_regularity(DNLBlock(3, n, 3, affine="conv1x1", norm=None)) for n in (16, 32)]
    assert all(1.2 < value < 1.6 for report in rough for value in report.roughness)
    P = theory.sample_pointwise(curves, 5)
    report = theory.depth_regularity(P)
    assert report.regularizer == pytest.approx(theory.regularizer(P).item())
    assert report.size[3, 1].item() == pytest.approx(P.row("K", 3)[1].norm().item())
    assert report.in_t[2, 1].item() == pytest.approx(5 * (P.row("K", 3)[1] - P.row("K", 2)[1]).norm().item())
    assert report.in_s[3, 1].item() == pytest.approx(5 * (P.row("K", 3)[2] - P.row("K", 3)[1]).norm().item())
    assert torch.isnan(report.size[1, 3]) and torch.isnan(report.in_t[4, 0]) and torch.isnan(report.in_s[2, 2])
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'dnl_kernels[experiments]'")
    from dnl_kernels.experiments import regularity

    regularity.draw(rough[0], tmp_path / "K.png")
    assert (tmp_path / "K.png").read_bytes().startswith(b"\x89PNG")
