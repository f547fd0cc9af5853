"""The non-local block of dnl_block/non_local.py, one autograd node on the CPU, against the reference in float64: every
order, norm, kernel, affine map and connectivity; values, every gradient, statistics; what it keeps and allocates."""

import pytest
import torch
from test_dnl_block_cpu import (
    HOLES,
    NOTHING_READ,
    TRIANGLE,
    WINDOW,
    block,
    cast,
    named_leaves,
    parameters_of,
    step,
)  # fmt: skip

from bench.harness import peak_allocated
from dnl_kernels import _backend, dnl_block
from dnl_kernels.nn import DNLBlock
from dnl_kernels.ops.dnl_block import composition, non_local, reference
from dnl_kernels.ops.dnl_block.api import dnl_block_with_statistics
from dnl_kernels.ops.dnl_block.config import LayerParameters
from dnl_kernels.testing import assert_within_budget, exactly


def nonlocal_block(connectivity=TRIANGLE, kernel="softmax", affine="conv1x1", **options):
    return block(connectivity, kernel=kernel, affine=affine, **{"head_dim": 3, **options})


CASES = {
    "softmax": nonlocal_block(training=True),
    "softmax-3x3-heads": nonlocal_block(affine="conv3x3", heads=2, training=True),
    "softmax-tokens": nonlocal_block(affine="linear", heads=2, training=True, tau=0.5),
    "softmax-eval-window": nonlocal_block(WINDOW, activation="silu"),
    "softmax-no-norm-skip": nonlocal_block(HOLES, norm=None, input_skip=True, activation="tanh"),
    "softmax-skip-residual": nonlocal_block(NOTHING_READ, input_skip=True, residual=True, training=True),
    "gaussian": nonlocal_block(kernel="gaussian", training=True, activation="leaky_relu"),
    "gaussian-tokens-residual": nonlocal_block(HOLES, kernel="gaussian", affine="linear", residual=True, training=True),
    "gaussian-paper": nonlocal_block(WINDOW, kernel="gaussian", preactivation=False, residual=True, training=True),
    "paper": nonlocal_block(preactivation=False, training=True, tau=1 / 3, affine="conv3x3"),
    "paper-eval-tokens": nonlocal_block(affine="linear", preactivation=False, activation="gelu"),
    "paper-skip-no-norm": nonlocal_block(NOTHING_READ, preactivation=False, input_skip=True, norm=None, tau=0.5),
    "paper-tokens": nonlocal_block(affine="linear", preactivation=False, input_skip=True, training=True),
    "dot": nonlocal_block(kernel="dot", heads=2, training=True),
    "dot-tokens-residual": nonlocal_block(kernel="dot", affine="linear", residual=True, heads=2, training=True),
    "wide": nonlocal_block(((True,),), growth=70, training=True, residual=True),
    "wide-paper-tokens": nonlocal_block(((True,),), growth=70, affine="linear", preactivation=False, heads=2),
    "one-layer": nonlocal_block(((True,),), growth=5, training=True),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def tensors_of(config, batch=3, dtype=torch.float64, height=5, width=7):
    shape = (batch, height * width, 5) if config.affine == "linear" else (batch, 5, height, width)
    return torch.randn(shape, dtype=torch.float64).to(dtype), parameters_of(config, dtype)


def compare(config, x, layers, other=reference.dnl_block, rtol=1e-9, atol=1e-10):
    assert non_local.limit(x, layers, config, None) is None
    states, statistics, grads = step(dnl_block_with_statistics, x, layers, config)
    exact, exact_statistics, exact_grads = step(other, x, layers, config)
    assert "ForwardModeOperator" in type(states.grad_fn).__name__
    torch.testing.assert_close(states, exact, rtol=rtol, atol=atol)
    assert states.is_contiguous()
    largest = max(float(grad.abs().max()) for grad in exact_grads.values() if grad is not None)
    for name, grad in exact_grads.items():
        if grad is None:
            assert grads[name] is None or not grads[name].any(), name
            continue
        torch.testing.assert_close(
            grads[name], grad, rtol=rtol, atol=atol * max(1, largest), msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (statistics is None) == (exact_statistics is None)
    if statistics is None:
        return
    assert statistics.elements == exact_statistics.elements
    if config.preactivation:
        for ours, theirs in zip(statistics[:2], exact_statistics[:2], strict=True):
            for layer in range(config.num_layers):
                for start, end in config.spans(layer):
                    torch.testing.assert_close(ours[start:end], theirs[start:end])
    for ours, theirs in zip(statistics[2:6], exact_statistics[2:6], strict=True):
        torch.testing.assert_close(ours, theirs)


@every_case
def test_every_number_against_the_reference_in_float64(config):
    compare(config, *tensors_of(config))


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "gaussian", "paper", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_within_the_budget(levels, name, dtype):
    config = CASES[name]
    x, layers = tensors_of(config, dtype=dtype)
    wide = x.double(), cast(layers, torch.float64)
    exact, _, exact_grads = exactly(lambda: step(reference.dnl_block, *wide, config), dtype, dtype)
    for _ in levels():
        states, _, grads = step(non_local.dnl_block, x, layers, config)
        assert_within_budget("states", states, exact)
        for name, exact_grad in exact_grads.items():
            if exact_grad is not None:
                assert_within_budget("d" + name, grads[name], exact_grad)


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "gaussian-paper", "dot"])
@pytest.mark.parametrize("batch, height, width", [(1, 1, 3), (2, 23, 31), (9, 6, 4)])
def test_every_shape(name, batch, height, width):
    compare(CASES[name], *tensors_of(CASES[name], batch, torch.float64, height, width), rtol=1e-8, atol=1e-9)


@every_case
def test_every_derivative(config):
    config = config._replace(activation="tanh")
    x, layers = tensors_of(config, 2, torch.float64, 2, 3)
    leaves = list(named_leaves(x, layers).values())[1:]

    def function(x, *values):
        found = iter(values)
        given = [LayerParameters(*(next(found) if t is not None and t.requires_grad else t for t in p)) for p in layers]
        return non_local.dnl_block(x, given, config)[0]

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *leaves), fast_mode=True)


@pytest.mark.parametrize("name", ["softmax", "gaussian-paper"])
def test_derivatives_of_derivatives(name):
    config = CASES[name]._replace(activation="tanh", connectivity=TRIANGLE[:2], num_layers=2)
    x, layers = tensors_of(config, 2, torch.float64, 1, 3)
    weight = layers[1].affine_weight

    def function(x, w):
        return non_local.dnl_block(x, [layers[0], layers[1]._replace(affine_weight=w)], config)[0]

    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), weight), fast_mode=True)
    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "paper"])
def test_strided_input_and_expanded_gradient(name):
    config = CASES[name]
    _, layers = tensors_of(config)
    wide = torch.randn(3, 14, 8, 6, dtype=torch.float64)
    given = [wide[:, 2:7], wide[:, :5].contiguous(memory_format=torch.channels_last), wide[:, ::3, 1:7].mT]
    if config.affine == "linear":
        given = [wide[..., 1:], wide.mT[..., :5], wide[:, ::2, :, :5]]
        given = [given[0].flatten(1, 2), given[1][:, 1], given[2][:, 0]]
    for x in given:
        results = []
        for function in (non_local.dnl_block, reference.dnl_block):
            leaf = x.detach().requires_grad_()
            results.append(torch.autograd.grad(function(leaf, layers, config)[0].square().sum(), leaf)[0])
            results.append(torch.autograd.grad(function(leaf, layers, config)[0].sum(), leaf)[0])
        torch.testing.assert_close(results[:2], results[2:], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "gaussian-paper", "dot"])
@pytest.mark.parametrize("batch, height", [(0, 4), (2, 0)])
def test_an_empty_batch_and_no_positions(name, batch, height):
    config = CASES[name]._replace(training=False)
    x, layers = tensors_of(config, batch, torch.float32, height, 4)
    states, _, grads = step(non_local.dnl_block, x, layers, config)
    assert states.numel() == 0 and states.shape[-1 if config.affine == "linear" else 1] == 17
    assert grads.pop("x0").shape == x.shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


@pytest.mark.parametrize("name", ["softmax", "softmax-3x3-heads", "gaussian-tokens-residual", "paper", "dot"])
def test_determinism_and_nothing_kept_without_gradients(name):
    config = CASES[name]
    x, layers = tensors_of(config, 4, torch.float32, 23, 17)
    (first, _, grads), (again, _, more) = (step(non_local.dnl_block, x, layers, config) for _ in range(2))
    assert torch.equal(first, again) and all(torch.equal(grads[n], more[n]) for n in grads)
    with torch.no_grad():
        assert torch.equal(non_local.dnl_block(x, layers, config)[0], first)


def kept_storages(config, x, layers):
    own = {t.untyped_storage().data_ptr() for p in layers for t in p if t is not None} | {
        x.untyped_storage().data_ptr()
    }
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = non_local.dnl_block(x, layers, config)[0]
    return states, {pointer: t for pointer, t in kept.items() if pointer not in own}


@pytest.mark.parametrize("affine", ["conv1x1", "linear"])
def test_the_states_are_kept_once_and_everything_grows_linearly(affine):
    """Kept: the result itself, y and the attention's output of every layer, and two numbers per position."""
    sizes = {}
    for depth in (4, 8):
        config = nonlocal_block(tuple((True,) * (i + 1) for i in range(depth)), affine=affine, training=True)
        x, layers = tensors_of(config, 2, torch.float32, 8, 8)
        states, kept = kept_storages(config, x.requires_grad_(), layers)
        assert torch._C._is_cow_tensor(states)  # the result shares its memory with one of those
        sizes[depth] = sum(t.untyped_storage().nbytes() // 4 for t in kept.values())
        positions = 2 * 64
        assert sizes[depth] == states.numel() + depth * positions * (4 + 3 + 2) + 2 * states.numel() // positions


@pytest.mark.parametrize("affine", ["conv1x1", "linear"])
def test_no_second_copy_of_the_states_and_one_buffer_of_gradients(affine):
    """The peak of a step, with what is kept: the states, their gradients, and a number of maps of one layer."""
    peaks, forward, depths = {}, {}, (4, 12)
    for depth in depths:
        config = nonlocal_block(
            tuple((True,) * (i + 1) for i in range(depth)), affine=affine, training=True, growth=8, head_dim=8
        )
        x, layers = tensors_of(config, 2, torch.float32, 32, 32)
        x.requires_grad_()
        dstates = torch.ones(2, *((1024, 5 + 8 * depth) if affine == "linear" else (5 + 8 * depth, 32, 32)))

        def training_step(x=x, layers=layers, config=config, dstates=dstates):
            torch.autograd.backward(non_local.dnl_block(x, layers, config)[0], dstates)

        training_step()  # gradients of the leaves are there
        peaks[depth] = peak_allocated(training_step)
        with torch.no_grad():
            forward[depth] = peak_allocated(lambda x=x, p=layers, c=config: non_local.dnl_block(x, p, c))
    maps = (peaks[12] - peaks[4]) / (2 * 1024 * 8 * 4) / 8  # in maps of a layer, for each more layer
    # state, its gradient, y, the attention's output, and 2 / 8 for the rows' numbers
    assert maps <= 4.25 + 0.3, peaks
    assert (forward[12] - forward[4]) / (2 * 1024 * 8 * 4) / 8 <= 1 + 0.3, forward


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "gaussian"])
def test_compile_and_functional_gradients(name):
    config = CASES[name]
    x, layers = tensors_of(config)
    leaves = list(named_leaves(x, layers).values())[1:]

    def loss(x):
        return non_local.dnl_block(x, layers, config)[0].square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), [x, *leaves])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), [x, *leaves]), expected)
    transformed = torch.func.grad(lambda x: dnl_block(x, layers, config).square().sum())  # api.py sends it elsewhere
    torch.testing.assert_close(transformed(x.detach()), expected[0])


@pytest.mark.parametrize("name", ["softmax", "softmax-tokens", "paper", "gaussian-tokens-residual", "dot"])
def test_registered_operators(name):
    config = CASES[name]
    x, layers = tensors_of(config)
    tensors = [
        None if t is None or n.endswith(("_mean", "_var")) and config.training else t.detach()
        for p in layers for n, t in zip(p._fields, p, strict=True) if n in non_local.NAMES
    ]  # fmt: skip
    arguments = (x, tensors, True, *non_local._static(config))
    torch.library.opcheck(torch.ops.dnl.dnl_nonlocal_block_fwd.default, arguments)
    states, mean, var, kept = _backend.kernel("cpu", "dnl_nonlocal_block_fwd")(*arguments)
    arguments = (torch.ones_like(states), states, mean, var, kept, tensors, *non_local._static(config))
    torch.library.opcheck(torch.ops.dnl.dnl_nonlocal_block_bwd.default, arguments)


def test_what_the_node_does_not_cover_has_a_reason_and_runs_anyway():
    limits = [
        (nonlocal_block(), "reference", "node on the CPU"),
        (nonlocal_block(affine="conv3x3", bottleneck=2), None, "no bottleneck"),
        (block(), None, "non-local kernel"),
    ]
    for config, backend, reason in limits:
        x, layers = tensors_of(config)
        assert reason in non_local.limit(x, layers, config, backend)
        states, _ = dnl_block_with_statistics(x, layers, config, backend=backend)
        torch.testing.assert_close(states, reference.dnl_block(x, layers, config)[0])
    config = nonlocal_block()
    x, layers = tensors_of(config)
    layers = [p._replace(norm_mean=p.norm_mean.requires_grad_()) for p in layers]
    assert "constants" in non_local.limit(x, layers, config, None)
    states, _ = dnl_block_with_statistics(x, layers, config)
    assert torch.autograd.grad(states.sum(), layers[0].norm_mean)[0].abs().sum() > 0


def test_it_equals_the_composition_that_it_replaces():
    for config in CASES.values():
        compare(config, *tensors_of(config), other=lambda x, p, c: composition.dnl_block(x, p, c, None))


@pytest.mark.parametrize("batch, height", [(4, 20), (7, 9)])
def test_results_depend_on_the_thread_count_by_rounding_only(batch, height):
    """torch's batch norms and products add up in an order that depends on the threads; by how much is a matter of
    rounding, whose bound is that of the inputs. More samples and tiles than twice the threads."""
    config = CASES["softmax"]
    x, layers = tensors_of(config, batch, torch.float32, height, 16)
    wide = x.double(), cast(layers, torch.float64)
    exact, _, exact_grads = exactly(lambda: step(reference.dnl_block, *wide, config), torch.float32)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        states, _, grads = step(non_local.dnl_block, x, layers, config)
        torch.set_num_threads(threads)
        assert_within_budget(f"states, {count} threads", states, exact)
        for name, exact_grad in exact_grads.items():
            if exact_grad is not None:
                assert_within_budget(f"d{name}, {count} threads", grads[name], exact_grad)


def test_a_module_trains_through_it():
    block_ = DNLBlock(3, 3, 4, affine="conv1x1", kernel="softmax")
    x = torch.randn(2, 3, 6, 6)
    assert block_(x).grad_fn.name().startswith("ForwardModeOperator")
    block_(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block_.parameters())
