"""Every operator under what composes with autograd: checkpoints, hooks, torch.func, forward mode, changes in place.

What is compared with is ordinary: the operator called sample by sample, and derivatives by its own backward pass.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dnl_kernels import _backend
from dnl_kernels.testing import relative_error
from dnl_kernels.testing.operators import operators

OPERATORS = operators()
every_operator = pytest.mark.parametrize("op", OPERATORS, ids=[op.name for op in OPERATORS])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def leaves_of(op, dtype=torch.float64, batch=2):
    return [leaf.requires_grad_() for leaf in op.leaves(dtype, batch)]


def constants(leaves):
    return tuple(leaf.detach() for leaf in leaves)


def assert_equal_up_to_rounding(actual, expected, dtype):
    """Sums of some hundred products in another order, by the size of the largest: nothing here is ill-conditioned."""
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype == dtype and relative_error(a, e) < bound, (i, relative_error(a, e))


def jacobians(op, leaves):
    """d output / d leaf, a row for each number of the output, by as many backward passes of the kernels."""
    output = op.call(*leaves)
    assert "Operator" in type(output.grad_fn).__name__ or op.name in ("dnl_layer", "dnl_block")
    rows = [torch.autograd.grad(y, leaves, retain_graph=True) for y in output.flatten()]
    return [torch.stack(column).unflatten(0, output.shape) for column in zip(*rows, strict=True)]


@every_operator
@both_dtypes
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(op, dtype, reentrant):
    leaves = leaves_of(op, dtype)
    expected = op.call(*leaves)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, weights)
    output = checkpoint(op.call, *leaves, use_reentrant=reentrant)
    output.backward(weights)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, (leaf.grad for leaf in leaves), expected_grads))


@every_operator
def test_what_is_kept_is_unpacked_once(op):
    leaves, counts = leaves_of(op), {"packed": 0, "unpacked": 0}

    def count(name):
        def hook(tensor):
            counts[name] += 1
            return tensor

        return hook

    with torch.autograd.graph.saved_tensors_hooks(count("packed"), count("unpacked")):
        output = op.call(*leaves)
    torch.autograd.grad(output.sum(), leaves)
    assert 0 < counts["unpacked"] == counts["packed"]


@every_operator
@both_dtypes
def test_the_output_may_be_changed_in_place(op, dtype):
    leaves = leaves_of(op, dtype)
    weights = torch.randn_like(op.call(*leaves))
    expected = torch.autograd.grad(op.call(*leaves).mul(3).tanh(), leaves, weights)
    output = op.call(*leaves)
    output.mul_(3).tanh_()
    assert all(map(torch.equal, torch.autograd.grad(output, leaves, weights), expected))


@every_operator
@both_dtypes
def test_vmap_of_every_argument_and_of_all(op, dtype):
    leaves = constants(leaves_of(op, dtype))
    many = [torch.stack([leaf, 0.875 * leaf, 1.25 * leaf]) for leaf in leaves]
    every = range(len(leaves))
    for mapped in ([i] for i in every), [every]:
        for chosen in mapped:
            given = [many[i] if i in chosen else leaves[i] for i in every]
            dims = tuple(0 if i in chosen else None for i in every)
            expected = [op.call(*(g[k] if i in chosen else g for i, g in enumerate(given))) for k in range(3)]
            assert_equal_up_to_rounding(torch.vmap(op.call, dims)(*given), expected, dtype)


@every_operator
@both_dtypes
def test_jacobians_and_products_with_them(op, dtype):
    leaves = leaves_of(op, dtype)
    expected, given = jacobians(op, leaves), constants(leaves)
    every = tuple(range(len(leaves)))
    assert_equal_up_to_rounding(torch.func.jacrev(op.call, every)(*given), expected, dtype)
    assert_equal_up_to_rounding(torch.func.jacfwd(op.call, every)(*given), expected, dtype)
    tangents = [torch.randn_like(leaf) for leaf in given]
    output, pushed = torch.func.jvp(op.call, given, tuple(tangents))
    product = sum((j.flatten(output.dim()) * t.flatten()).sum(-1) for j, t in zip(expected, tangents, strict=True))
    assert_equal_up_to_rounding([output, pushed], [op.call(*given), product], dtype)
    cotangent = torch.randn_like(output)
    pulled = torch.func.vjp(op.call, *given)[1](cotangent)
    assert_equal_up_to_rounding(pulled, torch.autograd.grad(op.call(*leaves), leaves, cotangent), dtype)


@every_operator
@both_dtypes
def test_hessian(op, dtype):
    """Of the first and the last argument, by two backward passes."""
    leaves = leaves_of(op, dtype)
    ends = (0, len(leaves) - 1)

    def loss(*args):
        return op.call(*args).square().sum()

    wanted = [leaves[i] for i in ends]
    rows = torch.autograd.grad(loss(*leaves), wanted, create_graph=True)
    actual = torch.func.hessian(loss, ends)(*constants(leaves))
    for of, row in zip(actual, rows, strict=True):
        found = [torch.autograd.grad(g, wanted, retain_graph=True) for g in row.flatten()]
        expected = [torch.stack(column).unflatten(0, row.shape) for column in zip(*found, strict=True)]
        assert_equal_up_to_rounding(of, expected, dtype)


@every_operator
@both_dtypes
def test_gradients_per_sample(op, dtype):
    leaves = leaves_of(op, dtype, batch=3)
    every = range(len(leaves))

    def loss(*args):
        return op.call(*(arg[None] if i in op.batched else arg for i, arg in enumerate(args))).square().sum()

    dims = tuple(0 if i in op.batched else None for i in every)
    actual = torch.vmap(torch.func.grad(loss, tuple(every)), dims)(*constants(leaves))
    for sample in range(3):
        given = [leaf[sample] if i in op.batched else leaf for i, leaf in enumerate(constants(leaves))]
        given = [leaf.clone().requires_grad_() for leaf in given]
        expected = torch.autograd.grad(loss(*given), given)
        assert_equal_up_to_rounding([g[sample] for g in actual], expected, dtype)


@every_operator
@both_dtypes
def test_a_batch_of_backward_passes(op, dtype):
    """vmap of the kernels' backward, whose forward it does not see."""
    leaves = leaves_of(op, dtype)
    output = op.call(*leaves)
    weights = torch.randn(3, *output.shape, dtype=dtype)
    actual = torch.vmap(lambda w: torch.autograd.grad(output, leaves, w, retain_graph=True))(weights)
    for sample in range(3):
        expected = torch.autograd.grad(output, leaves, weights[sample], retain_graph=True)
        assert_equal_up_to_rounding([g[sample] for g in actual], expected, dtype)


@every_operator
@both_dtypes
def test_forward_mode_over_a_backward_pass(op, dtype):
    """H t, against two backward passes. PyTorch itself has no such derivative of some activations, and says so."""
    leaves = leaves_of(op, dtype)
    tangents = [torch.randn_like(leaf) for leaf in leaves]

    def forward_over_reverse(**options):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(leaf, t) for leaf, t in zip(leaves, tangents, strict=True)]
            grads = torch.autograd.grad(op.call(*duals, **options).square().sum(), duals)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    try:
        forward_over_reverse(backend="reference")
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            forward_over_reverse()
        return
    grads = torch.autograd.grad(op.call(*leaves).square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(grads, leaves, tangents)
    assert_equal_up_to_rounding(forward_over_reverse(), expected, dtype)


@every_operator
def test_vmap_compiles(op):
    leaves = constants(leaves_of(op, torch.float32))
    many = [torch.stack([leaf, 0.875 * leaf]) for leaf in leaves]
    compiled = torch.compile(torch.vmap(op.call), fullgraph=True, backend="eager")
    assert_equal_up_to_rounding(compiled(*many), torch.vmap(op.call)(*many), torch.float32)


@every_operator
def test_a_backend_without_rules_for_transforms_is_refused_with_its_name(op):
    leaves = constants(leaves_of(op))
    with pytest.raises(ValueError, match=f"{op.name}: backend='cpu' has no rule for torch.func"):
        torch.vmap(lambda *args: op.call(*args, backend="cpu"))(*(leaf[None] for leaf in leaves))


@every_operator
@both_dtypes
def test_of_a_few_numbers_the_result_is_the_kernels(op, dtype, monkeypatch):
    leaves = leaves_of(op, dtype)
    kernels = op.call(*leaves)
    weights = torch.randn_like(kernels)
    expected = [kernels, *torch.autograd.grad(kernels, leaves, weights)]
    with torch.no_grad():
        expected.append(op.call(*leaves))
    monkeypatch.setattr(_backend, "FEW", 1 << 12)
    output = op.call(*leaves)
    found = [output, *torch.autograd.grad(output, leaves, weights)]
    with torch.no_grad():
        found.append(op.call(*leaves))
    assert_equal_up_to_rounding(found, expected, dtype)
