"""dense_conv2d against float64: every case, dtype, gradient and instruction set, and every error."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import ACTIVATIONS, assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dense_conv2d import CASES, NAMES, Case, inputs

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)


def run(parameters, states, backend, activation, scale):
    parameters = [p if p is None else p.detach().requires_grad_() for p in parameters]
    states = [s.detach().requires_grad_() for s in states]
    weight, bias, norm_scale, norm_shift = parameters
    y = dnl.dense_conv2d(
        states, weight, bias, norm_scale=norm_scale, norm_shift=norm_shift, activation=activation, scale=scale,
        backend=backend,
    )  # fmt: skip
    dy = cotangent(y)
    return y, torch.autograd.grad(y, [p for p in parameters if p is not None] + states, dy)


def check(parameters, states, activation="relu", scale=1.0, levels=lambda: [None]):
    double = [p if p is None else p.double() for p in parameters], [s.double() for s in states]
    exact, exact_grads = exactly(lambda: run(*double, "reference", activation, scale), states[0].dtype)
    names = [n for n, p in zip(NAMES, parameters, strict=True) if p is not None]
    names += [f"states[{j}]" for j in range(len(states))]
    for _ in levels():
        y, grads = run(parameters, states, "cpu", activation, scale)
        assert_within_budget("y", y, exact)
        for name, a, e in zip(names, grads, exact_grads, strict=True):
            assert_within_budget("d" + name, a, e)


@every_case
@every_dtype
def test_against_float64(levels, case, dtype):
    check(*inputs(case, dtype), case.activation, case.scale, levels)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 30.0])
def test_every_activation_near_zero_and_far_out(levels, activation, magnitude):
    for dtype in (torch.float64, torch.float32):
        parameters, states = inputs(Case(2, (5,), 6, 7, 3, norm=False), dtype)
        check(parameters, [magnitude * s for s in states], activation, levels=levels)


@pytest.mark.parametrize("shape", [(2, 2), (3, 37), (5, 64)], ids=str)
def test_activations_at_zero_have_torch_s_derivatives(isa, shape):
    """Narrower than a vector, wider, and of whole vectors."""
    for activation in ACTIVATIONS:
        x = torch.zeros(1, 1, *shape, requires_grad=True)
        grads = [
            torch.autograd.grad(
                dnl.dense_conv2d([x], torch.ones(1, 1, 1, 1), activation=activation, backend=b).sum(), x
            )[0]
            for b in ("cpu", "reference")
        ]
        assert torch.equal(*grads), activation


@pytest.mark.parametrize("slope", [0.2, -1.5, 0.0, 1e-3])
def test_a_slope_is_torch_s_leaky_relu(isa, slope):
    x = torch.tensor([[[[-2.0, -0.0, 0.0, 3.0, float("nan"), -float("inf")]]]])
    for dtype in (torch.float32, torch.float64):
        found = []
        for backend in ("cpu", None):
            leaf = x.to(dtype).requires_grad_()
            if backend:
                y = dnl.dense_conv2d(
                    [leaf], leaf.new_ones(1, 1, 1, 1), activation=f"leaky_relu({slope})", backend=backend
                )
            else:
                y = torch.nn.functional.leaky_relu(leaf, slope)
            found += [y, torch.autograd.grad(y[..., :4].sum(), leaf)[0][..., :4]]
        assert torch.equal(found[0].nan_to_num(7), found[2].nan_to_num(7)) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("bad", ["leaky_relu()", "leaky_relu(x)", "leaky_relu(nan)", "leaky_relu(1_0)", "relu(0.2)"])
def test_a_slope_that_is_no_number_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"activation is '.*'; expected one of identity, relu, leaky_relu, leaky_relu\(SLOPE\)"
    ):
        dnl.dense_conv2d([torch.zeros(1, 1, 2, 2)], torch.zeros(1, 1, 1, 1), activation=bad)
    with pytest.raises(TypeError, match="activation is of type LeakyReLU; expected a string"):
        dnl.dense_conv2d([torch.zeros(1, 1, 2, 2)], torch.zeros(1, 1, 1, 1), activation=torch.nn.LeakyReLU(0.2))


@every_dtype
def test_strided_states(dtype):
    parameters, _ = inputs(Case(2, (2, 3, 4, 2), 5, 6, 3), dtype)
    wide = torch.randn(4, 9, 10, 12, dtype=dtype)
    states = [
        wide[:2, 1:3, :5, :6],
        wide[::2, ::3, ::2, 6:],
        wide[:2, :4, :5, :6].contiguous(memory_format=torch.channels_last),
        wide[:2, 4:8:2, :6, :5].mT.flip(2),
    ]
    check(parameters, states)


def test_slices_of_one_buffer():
    buffer = torch.randn(3, 10, 6, 6, dtype=torch.float64)
    parameters, _ = inputs(Case(3, (4, 6), 6, 6, 2), torch.float64)
    check(parameters, [buffer[:, :4], buffer[:, 4:]])


def test_an_expanded_output_gradient():
    parameters, states = inputs(Case(2, (3,), 4, 4, 2), torch.float64)
    states = [s.requires_grad_() for s in states]
    grads = [
        torch.autograd.grad(dnl.dense_conv2d(states, parameters[0], backend=b).sum(), states)[0]
        for b in ("cpu", "reference")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_wanted_gradient_is_computed(wanted):
    parameters, states = inputs(Case(2, (3, 2), 4, 5, 3), torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t.detach() for t in (*parameters, *states)]
        leaves[wanted].requires_grad_()
        w, b, s, h, *x = leaves
        y = dnl.dense_conv2d(x, w, b, norm_scale=s, norm_shift=h, activation="silu", backend=backend)
        results.append(torch.autograd.grad(y.square().sum(), leaves[wanted])[0])
    torch.testing.assert_close(*results)


def test_only_one_half_of_the_normalisation():
    parameters, states = inputs(Case(2, (3, 2), 4, 5, 3), torch.float32)
    weight, bias, norm_scale, norm_shift = parameters
    check([weight, bias, norm_scale, None], states)
    check([weight, bias, None, norm_shift], states)


def test_the_padding_comes_after_the_activation():
    x = torch.zeros(1, 1, 3, 3)
    y = dnl.dense_conv2d([x], torch.ones(1, 1, 3, 3), norm_shift=torch.ones(1), backend="cpu")
    assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_nan_stays_in_its_neighbourhood():
    x = torch.zeros(1, 2, 6, 6)
    x[0, 1, 5, 5] = torch.nan
    y = dnl.dense_conv2d([x, x], torch.ones(1, 4, 3, 3), activation="relu", backend="cpu")
    assert y.isnan().nonzero()[:, 2:].tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]]


def test_results_do_not_depend_on_the_thread_count():
    case = CASES["many-small-images"]
    parameters, states = inputs(case, torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, grads = run(parameters, states, "cpu", "gelu", 1.0)
        results.append([y, *grads])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


X, W = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 3, 3)
ERRORS = [
    ([], W, {}, ValueError, "states is empty"),
    (X, W, {}, TypeError, "states is of type Tensor; expected a list or tuple"),
    ([X[0]], W, {}, ValueError, r"states\[0\] is of shape \[3, 4, 5\]; expected 4 dimensions \[B, C_j, H, W\]"),
    ([X, X[:1]], W, {}, ValueError, r"states\[1\] is of shape \[1, 3, 4, 5\]; expected \[2, C_j, 4, 5\], as states"),
    ([X, X.mT], W, {}, ValueError, r"states\[1\] is of shape \[2, 3, 5, 4\]; expected \[2, C_j, 4, 5\]"),
    ([X, X.double()], W, {}, TypeError, r"states\[1\] is of torch.float64; expected torch.float32"),
    ([X], W[0], {}, ValueError, r"weight is of shape \[3, 3, 3\]; expected 4 dimensions"),
    ([X], W[..., :2, :2], {}, ValueError, r"weight is of shape \[2, 3, 2, 2\]; expected \[D, 3, k, k\] with k odd"),
    ([X], W[..., :1], {}, ValueError, r"weight is of shape \[2, 3, 3, 1\]; expected \[2, 3, 3, 3\] \(D, sum C_j"),
    ([X, X], W, {}, ValueError, r"weight is of shape \[2, 3, 3, 3\]; expected \[2, 6, 3, 3\]"),
    ([X], W.double(), {}, TypeError, "weight is of torch.float64; expected torch.float32"),
    ([X], W, {"bias": torch.zeros(3)}, ValueError, r"bias is of shape \[3\]; expected \[2\] \(D\)"),
    ([X], W, {"bias": 1.0}, TypeError, "bias is of type float; expected a tensor"),
    ([X], W, {"norm_scale": torch.zeros(2)}, ValueError, r"norm_scale is of shape \[2\]; expected \[3\] \(sum C_j\)"),
    ([X], W, {"norm_shift": torch.zeros(3, 1)}, ValueError, r"norm_shift is of shape \[3, 1\]; expected \[3\]"),
    ([X], W, {"norm_shift": torch.zeros(3).half()}, TypeError, "norm_shift is of torch.float16; expected"),
    ([X], W, {"activation": "swish"}, ValueError, "activation is 'swish'; expected one of identity, relu"),
    ([X], W, {"scale": "1"}, TypeError, "scale is of type str; expected a number"),
]


@pytest.mark.parametrize("states, weight, keywords, error, message", ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_bad_input_is_named(states, weight, keywords, error, message):
    with pytest.raises(error, match=message):
        dnl.dense_conv2d(states, weight, **keywords)


def test_good_input_next_to_each_error_passes():
    y = dnl.dense_conv2d(
        (X, X), torch.zeros(2, 6, 1, 1), torch.zeros(2), norm_scale=torch.zeros(6), norm_shift=torch.zeros(6),
        activation="silu", scale=2,
    )  # fmt: skip
    assert y.shape == (2, 2, 4, 5) and y.is_contiguous()
