"""The last state by segments: eq. (1)'s, with its gradients, and with the memory of O(sqrt L) states."""

import pytest
import torch

from dnl_kernels import theory


def curves_of(kind, dim=3):
    smooth = theory.ParameterCurves.random_smooth(dim, 1, scale=0.7, vartheta=1)
    leaves = [smooth.K.coefficients.requires_grad_(), smooth.b.coefficients.requires_grad_()]
    leaves.append(smooth.A.coefficients.requires_grad_())
    K = smooth.K
    if kind == "exponential":
        matrices = torch.randn(2, dim, dim, dtype=torch.float64).requires_grad_()
        K = theory.ExponentialSumKernel(torch.tensor([0.5, 4.0], dtype=torch.float64), matrices)
        leaves[0] = matrices
    return theory.ParameterCurves(smooth.A, smooth.a, K, smooth.b, smooth.vartheta, dim), leaves


@pytest.mark.parametrize("kind", ["separable", "exponential"])
@pytest.mark.parametrize(("layers", "segment", "first"), [(17, None, "lifted"), (12, 4, "input"), (5, 9, "input")])
def test_segments_are_the_recursion(kind, layers, segment, first):
    curves, leaves = curves_of(kind)
    phi = theory.LayerMap.of("rbf", positions=3)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, dtype=torch.float64)
    whole = theory.forward(curves, x, phi, layers=layers, first=first).final
    parts = theory.final_state(curves, x, phi, layers=layers, segment=segment, first=first)
    assert (parts - whole).abs().max() < 1e-14
    exact = torch.autograd.grad((weights * whole).sum(), [x, *leaves])
    for ours, theirs in zip(torch.autograd.grad((weights * parts).sum(), [x, *leaves]), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-13 * (1 + theirs.abs().max())


def kept(compute):
    """Bytes that the graph of a computation holds, tensors that share memory counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compute()
    assert out.requires_grad
    return sum(storages.values())


def test_memory_grows_like_the_root_of_the_depth():
    """16 times the layers: 4 times the memory, where the recursion takes 16 times as much."""
    curves, _ = curves_of("separable")
    phi = theory.LayerMap.of("local")
    x = torch.randn(512, 3, dtype=torch.float64, requires_grad=True)
    by_segments = [kept(lambda n=n: theory.final_state(curves, x, phi, layers=n)) for n in (16, 256)]
    whole = [kept(lambda n=n: theory.forward(curves, x, phi, layers=n).final) for n in (16, 256)]
    assert whole[1] > 10 * whole[0]
    assert by_segments[1] < 5 * by_segments[0]
    assert by_segments[1] < whole[1] / 8


def test_other_kernels_are_refused():
    curves = theory.ParameterCurves.random_smooth(2, 1)
    dense = theory.ParameterCurves(curves.A, curves.a, curves.K.evaluate, dim=2)
    with pytest.raises(TypeError, match="K must be a SeparableKernel or an ExponentialSumKernel, got CallableKernel"):
        theory.final_state(dense, torch.zeros(2, dtype=torch.float64), theory.LayerMap.of("local"), layers=4)
