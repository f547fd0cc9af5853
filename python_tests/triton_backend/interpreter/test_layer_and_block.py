"""dnl_layer and dnl_block through their Triton operators against float64: every named case, every gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import fused as fused_block
from dnl_kernels.ops.dnl_block.api import dnl_block_with_statistics
from dnl_kernels.ops.dnl_layer import triton as fused_kernels
from dnl_kernels.ops.dnl_layer.config import LayerConfig
from dnl_kernels.testing import Exact, assert_within_budget, cotangent, dnl_block, dnl_layer, exactly
from dnl_kernels.testing.triton_interpreter import traffic

# Every case in float32, and in the half types those that differ in more than the kernels of their parts.
LAYERS = [(name, torch.float32) for name in dnl_layer.CASES]
HALF = (torch.bfloat16, torch.float16)
LAYERS += [(name, dtype) for name in ("preactivation", "dot-tokens", "softmax", "gaussian-tokens") for dtype in HALF]
BLOCKS = [(name, torch.float32) for name in dnl_block.CASES]
BLOCKS += [("densenet-eval", torch.bfloat16), ("densenet-eval", torch.float16)]


def run_layer(case, states, tensors, backend):
    states = [s.detach().requires_grad_() for s in states]
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = dnl_layer.call(case, states, tensors, backend)
    dy = cotangent(y)
    names = [*tensors, *(f"states[{j}]" for j in range(len(states)))]
    return y, dict(zip(names, torch.autograd.grad(y, [*tensors.values(), *states], dy), strict=True))


@pytest.mark.parametrize("name, dtype", LAYERS, ids=str)
def test_layer_against_float64(name, dtype):
    case = dnl_layer.CASES[name] if isinstance(name, str) else name
    states, tensors = dnl_layer.inputs(case, dtype)
    y, grads = run_layer(case, states, tensors, "triton")
    wide = [s.double() for s in states], {n: t.double() for n, t in tensors.items()}
    exact, exact_grads = exactly(lambda: run_layer(case, *wide, "reference"), dtype, dtype)
    assert_within_budget("y", y, exact)
    for name, grad in grads.items():
        assert_within_budget(f"d{name}", grad, exact_grads[name])


SEVERAL_TILES = {
    "softmax": dnl_layer.Case((4, 6), (3, 18), 20, kernel="softmax", heads=6, preactivation=True, output_norm=True),
    "gaussian": dnl_layer.Case((37,), (5, 17), 33, kernel="gaussian", heads=2, skip=True, residual=True, tau=0.5),
}


@pytest.mark.parametrize(
    "name, dtype", [("softmax", torch.float32), ("gaussian", torch.float32), ("gaussian", HALF[0])]
)
def test_fused_layer_over_several_tiles(name, dtype, monkeypatch):
    """Of positions, of the channels of a state, of the rows of a projection."""
    small = {kernel: {128: fused_kernels.Tile((16,) * 3, 1, 1)} for kernel in fused_kernels.TILES}
    monkeypatch.setattr(fused_kernels, "TILES", small)
    monkeypatch.setattr(fused_kernels, "TILES_OF", {})
    test_layer_against_float64(SEVERAL_TILES[name], dtype)


@pytest.mark.parametrize("name", ["softmax", "gaussian-tokens"])
def test_fused_layer_reads_a_prefix_and_writes_its_slot_in_two_launches(name):
    """The states are slices of one buffer whose next slot gets the result; around it nothing changes, and between the
    launches there is nothing but the projections (y waits in the slot under `residual`)."""
    case = dnl_layer.CASES[name]._replace(size=1)
    states, tensors = dnl_layer.inputs(case, torch.float32)
    expected = dnl_layer.call(case, states, tensors, "reference")
    axis, widths = 1 if len(case.positions) == 2 else 2, [s.shape[1 if len(case.positions) == 2 else 2] for s in states]
    shape = list(states[0].shape)
    shape[axis] = sum(widths) + 2 * case.width
    buffer = torch.full(shape, 7.0)
    *parts, slot, after = buffer.split([*widths, case.width, case.width], axis)
    for part, state in zip(parts, states, strict=True):
        part.copy_(state)
    theta = {n: tensors.get(n, tensors.get("theta." + n)) for n in fused_kernels.PARAMETERS}
    layer = LayerConfig(case.kernel, case.activation, case.tau, "identity", case.heads, case.residual)
    with traffic() as count:
        fused_kernels.layer_into(fused_kernels._Call(parts, None, fused_kernels.Parameters(**theta), layer), slot)
    torch.testing.assert_close(slot, expected)
    assert (after == 7).all() and all(map(torch.equal, parts, states))
    assert count.launches == 2
    size = slot[0].numel() // case.width * case.batch * 4
    stored = {name: moved["store"] for name, moved in count.by_tensor.items() if moved["store"]}
    projections = (2 if case.kernel == "gaussian" else 3) * 3 * case.heads * size
    assert sum(stored.values()) == projections + 2 * case.width * size, stored  # y and the result, both in the slot
    assert count.by_tensor["TENSORS[0]"]["load"] == sum(widths) * size  # one state: they lie side by side


def bound_of(case, states, tensors):
    wide = [s.double() for s in states], {n: t.double() for n, t in tensors.items()}
    return exactly(lambda: dnl_layer.call(case, *wide, "reference"), states[0].dtype)


def test_many_states_and_wide_layers():
    """More states than a parameter list of 8 holds; more than any list holds, and wider layers: composed of others."""
    small = dnl_layer.Case((5,), (2,) * 9, 3, kernel="softmax")
    for case, launches in ((small, 2), (small._replace(channels=(1,) * 65), None), (small._replace(width=130), None)):
        states, tensors = dnl_layer.inputs(case, torch.float32)
        tensors["affine_weight"] /= len(states)
        with traffic() as count, torch.no_grad():
            y = dnl_layer.call(case, states, tensors, "triton")
        assert_within_budget("y", y, bound_of(case, states, tensors))
        assert launches in (None, count.launches)


@pytest.mark.parametrize("images", [True, False])
def test_fused_layer_of_a_distant_gaussian(images):
    """Queries and keys 1000 from the origin, where products would cancel; and a NaN that stays in its sample."""
    case = dnl_layer.Case((3, 5) if images else (15,), (4,), 4, size=1, kernel="gaussian", biases=True)
    states, tensors = dnl_layer.inputs(case, torch.float32)
    tensors["theta.query_bias"] += 1000
    tensors["affine_bias"] += 300
    actual = dnl_layer.call(case, states, tensors, "triton")
    assert_within_budget("y", actual, bound_of(case, states, tensors))
    states[0][0].flatten()[0] = float("nan")
    spoiled = dnl_layer.call(case, states, tensors, "triton")
    assert spoiled[0].isnan().all() and torch.equal(spoiled[1], actual[1])


def test_the_accumulated_y_is_in_no_memory():
    """A composed layer with 1x1 filters stores the projections of y, its output, and nothing of the size of y."""
    case = dnl_layer.Case((5, 4), size=1, kernel="dot", width=8, biases=True)
    states, tensors = dnl_layer.inputs(case, torch.float32)
    with traffic() as count, torch.no_grad():
        y = dnl_layer.call(case, states, tensors, "triton")
    projections = 9 * y[:, 0].numel() * 4
    assert count.by_tensor["Y"]["store"] == projections + y.nbytes
    torch.testing.assert_close(y, dnl_layer.call(case, states, tensors, "reference"))


def run_block(case, x0, layers, backend):
    x0 = x0.detach().requires_grad_()
    names = dnl_block.trainable(layers)
    layers = [{n: t.detach() for n, t in layer.items()} for layer in layers]
    leaves = [layers[i][name].requires_grad_() for i, name in names]
    parameters = [dnl.LayerParameters(**layer) for layer in layers]
    y, statistics = dnl_block_with_statistics(x0, parameters, case.config, backend=backend)
    dy = cotangent(y)
    grads = torch.autograd.grad(y, [x0, *leaves], dy, allow_unused=True)
    named = zip(["dx0", *(f"layer {i} d{name}" for i, name in names)], grads, strict=True)
    return y, {name: grad for name, grad in named if grad is not None}, statistics


@pytest.mark.parametrize("name, dtype", BLOCKS, ids=str)
def test_block_against_the_plain_network_in_float64(name, dtype):
    case = dnl_block.CASES[name]
    x0, layers = dnl_block.inputs(case, dtype)
    y, grads, statistics = run_block(case, x0, layers, "triton")
    wide = x0.double(), [{n: t.double() for n, t in layer.items()} for layer in layers]
    exact, exact_grads, exact_statistics = exactly(lambda: run_block(case, *wide, "reference"), dtype, dtype)
    assert grads.keys() == exact_grads.keys()
    assert_within_budget("y", y, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, exact_grads[name])
    if statistics is not None and case.batch and statistics.states_mean is not None:
        for layer in range(case.config.num_layers):
            for start, end in case.config.spans(layer):
                for found, (value, bound, _) in zip(statistics[:2], exact_statistics[:2], strict=True):
                    assert_within_budget("statistics", found[start:end], Exact(value[start:end], bound[start:end]))


def _registered_calls():
    """(operator, arguments) of both directions: a fused layer, and a block in either order."""
    case = dnl_layer.CASES["gaussian-tokens"]
    states, tensors = dnl_layer.inputs(case, torch.float32)
    given = [tensors.get(n, tensors.get("theta." + n)) for n in fused_kernels.PARAMETERS]
    call = (states, None, *given, case.kernel, case.activation, case.tau, "identity", case.heads, case.residual)
    output = torch.ops.dnl_triton.dnl_layer_fwd.default(*call)
    yield "dnl_layer_fwd", call
    yield "dnl_layer_bwd", (torch.ones_like(output), *call, True, True)
    for name in ("one-layer", "equation-1-batch-norm"):
        case = dnl_block.CASES[name]
        x0, layers = dnl_block.inputs(case, torch.float32)
        packed = fused_block.pack(case.config, x0, [dnl.LayerParameters(**p) for p in layers], torch.float32)
        static = fused_block.static_arguments(case.config)
        yield "dnl_block_fwd", (x0, *packed, *static)
        states, mean, var, outputs = torch.ops.dnl_triton.dnl_block_fwd.default(x0, *packed, *static)
        packed = packed._replace(mean=mean, var=var)
        yield "dnl_block_bwd", (torch.ones_like(states), states, outputs, *packed, *static)


def test_fakes_of_layer_and_block_have_the_real_shapes():
    """What torch.compile and export believe of the registered operators; the others' are in test_tracing.py."""
    seen = set()
    for name, arguments in _registered_calls():
        operator = getattr(torch.ops.dnl_triton, name).default
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            there = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            fake = operator(*there)
        flat = [torch.utils._pytree.tree_leaves(x) for x in (real, fake)]
        for r, f in zip(*flat, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), name
        seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize("operator", ["dnl_layer", "dnl_block"])
def test_the_parts_run_in_triton(operator, monkeypatch):
    """backend="triton" reaches every part: none is left to another backend."""
    chosen = []
    original = _backend.select

    def select(op, backend, example, **facts):
        chosen.append((op, found := original(op, backend, example, **facts)))
        return found

    monkeypatch.setattr(_backend, "select", select)
    if operator == "dnl_layer":
        case = dnl_layer.CASES["equation-1"]
        dnl_layer.call(case, *dnl_layer.inputs(case, torch.float32), "triton")
    else:
        case = dnl_block.CASES["densenet-bc"]
        run_block(case, *dnl_block.inputs(case, torch.float32), "triton")
    assert len(chosen) > 2 and {backend for _, backend in chosen} == {"triton"}
