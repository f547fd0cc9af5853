"""What holds for every operator, whatever it computes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from dnl_kernels import _backend
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.operators import operators

OPERATORS = operators()
every_operator = pytest.mark.parametrize("op", OPERATORS, ids=[op.name for op in OPERATORS])
HALF = [torch.bfloat16, torch.float16]


def leaves_of(op, dtype=torch.float64, batch=2):
    return [leaf.requires_grad_() for leaf in op.leaves(dtype, batch)]


def gradients(op, leaves, backend=None, function=None):
    output = (function or op.call)(*leaves, **({} if function else {"backend": backend}))
    return output, torch.autograd.grad(output, leaves, cotangent(output))


@every_operator
def test_opcheck(op):
    leaves = [leaf.detach() for leaf in leaves_of(op)]
    for name, arguments in op.registered(*leaves).items():
        opcheck(getattr(torch.ops.dnl, name).default, arguments)


@every_operator
def test_gradcheck(op):
    assert torch.autograd.gradcheck(op.call, leaves_of(op))


@every_operator
def test_forward_mode_and_double_backward(op):
    leaves = leaves_of(op)
    assert torch.autograd.gradcheck(op.call, leaves, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(op.call, leaves, fast_mode=True)  # along random directions: a tenth of the time


@every_operator
@pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)
def test_every_dtype_stays_within_the_budget(op, dtype):
    leaves = leaves_of(op, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact, exact_grads = exactly(lambda: gradients(op, wide, "reference"), dtype, dtype)
    actual, actual_grads = gradients(op, leaves)
    assert_within_budget("output", actual, exact)
    for name, a, e in zip(op.names, actual_grads, exact_grads, strict=True):
        assert_within_budget(f"d{name}", a, e)


@every_operator
def test_create_graph_changes_no_gradient(op):
    leaves = leaves_of(op)
    found = []
    for backend, create_graph in ((None, True), (None, False), ("reference", False)):
        output = op.call(*leaves, backend=backend)
        found.append(torch.autograd.grad(output, leaves, cotangent(output), create_graph=create_graph))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-11)


@every_operator
def test_torch_func_grad_equals_autograd(op):
    leaves = leaves_of(op)
    expected = torch.autograd.grad(op.call(*leaves).sum(), leaves)
    actual = torch.func.grad(lambda *args: op.call(*args).sum(), tuple(range(len(leaves))))(*leaves)
    torch.testing.assert_close(actual, expected)


@every_operator
def test_an_empty_batch_gives_empty_results_and_zero_parameter_gradients(op):
    leaves = leaves_of(op, torch.float32, batch=0)
    output, grads = gradients(op, leaves)
    assert output.numel() == 0
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        assert grad.shape == leaf.shape
        if i not in op.batched:
            assert torch.equal(grad, torch.zeros_like(grad)), op.names[i]


@every_operator
def test_compile_fullgraph_forward_and_backward(op):
    leaves = leaves_of(op, torch.float32)
    compiled = torch.compile(op.call, fullgraph=True)
    for actual, expected in zip(*(gradients(op, leaves, function=f) for f in (compiled, op.call)), strict=True):
        torch.testing.assert_close(actual, expected)


@every_operator
def test_dynamic_batch_compiles_once(op):
    counter = CompileCounter()
    compiled = torch.compile(op.call, fullgraph=True, dynamic=True, backend=counter)
    # No other size of these operators: Dynamo takes sizes that are equal at first for one and the same.
    for batch in (11, 13, 17):
        leaves = [leaf.detach() for leaf in leaves_of(op, torch.float32, batch)]
        torch.testing.assert_close(compiled(*leaves), op.call(*leaves))
    assert counter.frame_count == 1


@every_operator
def test_export_with_a_dynamic_batch(op):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return op.call(*args)

    leaves = [leaf.detach() for leaf in leaves_of(op, torch.float32, 3)]
    batch = torch.export.Dim("batch", min=2)
    shapes = (tuple({0: batch} if i in op.batched else None for i in range(len(leaves))),)
    exported = torch.export.export(Module(), tuple(leaves), dynamic_shapes=shapes).module()
    other = [leaf.detach() for leaf in leaves_of(op, torch.float32, 5)]
    torch.testing.assert_close(exported(*other), op.call(*other))


@every_operator
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_narrows_products_and_leaves_float64_alone(op, dtype):
    """Every operand is rounded to the dtype, and so may be what lies between operations."""
    leaves = leaves_of(op, torch.float32)
    with torch.autocast("cpu", dtype):
        output = op.call(*leaves)
        wide = op.call(*leaves_of(op, torch.float64))
    assert output.dtype == (dtype if op.narrows else torch.float32) and wide.dtype == torch.float64
    if op.narrows:
        exact = exactly(lambda: op.call(*[leaf.double() for leaf in leaves], backend="reference"), dtype, dtype)
        assert_within_budget("output", output, exact)
    else:
        assert torch.equal(output, op.call(*leaves))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(output.sum(), leaves))


@every_operator
def test_meta_tensors_give_shapes(op):
    leaves = leaves_of(op, torch.float32)
    output = op.call(*[leaf.detach().to("meta") for leaf in leaves])
    expected = op.call(*leaves)
    assert (output.device.type, output.shape, output.dtype) == ("meta", expected.shape, expected.dtype)


@every_operator
def test_results_do_not_depend_on_the_run(op):
    leaves = leaves_of(op, torch.float32)
    first, first_grads = gradients(op, leaves)
    second, second_grads = gradients(op, leaves)
    assert torch.equal(first, second) and all(map(torch.equal, first_grads, second_grads))


@every_operator
def test_an_unknown_backend_is_refused_with_the_list(op):
    with pytest.raises(ValueError, match="backend is 'fast'.*cuda, triton, cpu, reference"):
        op.call(*leaves_of(op), backend="fast")


@every_operator
def test_a_backend_that_cannot_run_says_every_reason(op):
    with pytest.raises(ValueError, match=f"{op.name}: backend='cuda' cannot run this call"):
        op.call(*leaves_of(op), backend="cuda")
