"""torch.compile and export of backend="triton" with fake CUDA tensors: the operators are traced, never looked into."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton exists for Linux only")

from dnl_kernels import _backend
from dnl_kernels.testing.operators import operators

OPERATORS = [op for op in operators() if "triton" in _backend.SUPPORTS[op.name]]
every_operator = pytest.mark.parametrize("op", OPERATORS, ids=[op.name for op in OPERATORS])


def fake_leaves(op, mode, batch=2):
    with mode:
        return [torch.empty(t.shape, device="cuda") for t in op.leaves(torch.float32, batch)]


def targets(graph):
    return [str(node.target) for node in graph.nodes if "dnl" in str(node.target)]


@every_operator
def test_export_holds_the_triton_operator(op):
    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return op.call(*leaves, backend="triton")

    mode = FakeTensorMode()
    leaves = fake_leaves(op, mode, 3)
    batch = torch.export.Dim("batch", min=2)
    shapes = (tuple({0: batch} if i in op.batched else None for i in range(len(leaves))),)
    with mode:
        program = torch.export.export(Module(), tuple(leaves), dynamic_shapes=shapes)
    found = targets(program.graph)
    assert found and all(name.startswith("dnl_triton.") and "_fwd" in name for name in found)
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    assert output.args[0][0].meta["val"].device.type == "cuda"


@every_operator
def test_compile_without_a_graph_break(op):
    found = []

    def backend(module, examples):
        assert all(x.device.type == "cuda" for x in examples)
        found.append(module)
        return module.forward

    mode = FakeTensorMode()
    leaves = fake_leaves(op, mode)
    with mode:
        output = torch.compile(
            lambda *x: op.call(*x, backend="triton"), backend=backend, fullgraph=True, dynamic=False
        )(*leaves)
    assert len(found) == 1 and output.device.type == "cuda"


@every_operator
def test_both_directions_give_the_shapes_of_the_real_ones(op):
    """The engine of autograd wants a real device, so the backward is traced as the operator that it calls."""
    for name, arguments in op.registered(*op.leaves(torch.float32, 2)).items():
        real = getattr(torch.ops.dnl, name)(*arguments)
        with FakeTensorMode() as mode:
            convert = lambda t: mode.from_tensor(t).to("cuda")  # noqa: E731
            there = torch.utils._pytree.tree_map_only(torch.Tensor, convert, arguments)
            fake = _backend.kernel("triton", name)(*there)
        flat = [torch.utils._pytree.tree_leaves(x) for x in (real, fake)]
        for r, f in zip(*flat, strict=True):
            assert (f.shape, f.dtype, f.stride(), f.device.type) == (r.shape, r.dtype, r.stride(), "cuda"), name
