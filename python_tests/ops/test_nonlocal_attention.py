"""nonlocal_attention against float64: kernels, cases, dtypes, gradients, ISA levels, numerics, and every error."""

import threading
from statistics import median

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.ops.nonlocal_attention import tiled
from dnl_kernels.testing import Exact, assert_within_budget, cotangent, exactly, relative_error
from dnl_kernels.testing.nonlocal_attention import (
    CASES,
    KERNELS,
    Case,
    errors_of_rows_that_see_themselves,
    inputs,
    keywords,
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", _backend.ALL_DTYPES, ids=str)
NAMES = ("dquery", "dkey", "dvalue", "dbandwidth")
EXPONENTIAL = ("softmax", "gaussian", "gaussian-unnormalised")


def run(tensors, backend, **keywords):
    """The output, and the gradients of query, key, value and bandwidth (where given)."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    q, k, v, bandwidth = leaves
    out = dnl.nonlocal_attention(q, k, v, bandwidth=bandwidth, backend=backend, **keywords)
    return out, torch.autograd.grad(out, [t for t in leaves if t is not None], cotangent(out))


def exact_results(tensors, roundoff=None, **keywords):
    wide = [None if t is None else t.double() for t in tensors]
    return exactly(lambda: run(wide, "reference", **keywords), tensors[0].dtype, roundoff)


def check(tensors, levels=lambda: [None], **keywords):
    """Output and gradients within the budget. Sums are of float32 in half types, but the gradients of the scores of a
    normalised row contain the output as it was stored."""
    exact, exact_grads = exact_results(tensors, **keywords)
    if tensors[0].dtype.itemsize == 2 and keywords.get("normalize", True) and keywords.get("kernel") != "dot":
        _, stored = exact_results(tensors, tensors[0].dtype, **keywords)
        exact_grads = [e if name == "dvalue" else s for name, e, s in zip(NAMES, exact_grads, stored, strict=False)]
    for _ in levels():
        out, grads = run(tensors, "cpu", **keywords)
        assert out.is_contiguous()
        assert_within_budget("output", out, exact)
        for name, a, e in zip(NAMES, grads, exact_grads, strict=False):
            assert_within_budget(name, a, e)


@every_case
@pytest.mark.parametrize("kernel", [k for k in KERNELS if "dot" not in k])
def test_against_float64(levels, case, kernel):
    tensors, mask = inputs(case, kernel, torch.float32)
    check(tensors, levels, key_mask=mask, **keywords(case, kernel))


@pytest.mark.parametrize("name", ["odd", "causal-key-mask", "several-parts", "large-scores"])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if "dot" not in k])
def test_float64(levels, name, kernel):
    tensors, mask = inputs(CASES[name], kernel, torch.float64)
    check(tensors, levels, key_mask=mask, **keywords(CASES[name], kernel))


def large(width=128, queries=70, keys=50, dtype=torch.float32):
    shapes = ((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, width))
    return [*(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes), None]


every_large_width = pytest.mark.parametrize("width", [127, 128, 192])


@every_large_width
@pytest.mark.parametrize("queries, keys", [(70, 50), (1, 1), (33, 300)])
def test_large_widths(width, queries, keys):
    """Where torch's backward takes over, by the kernels' own normalisers, and just below."""
    check(large(width, queries, keys))


# A scale of 0.3 makes normalisers that are too large to hand over.
@every_large_width
@pytest.mark.parametrize(
    "words",
    [{}, {"scale": 0.3}, {"layout": "channels_first"}, {"causal": True}, {"normalize": False, "scale": 0.01}],
    ids=str,
)
def test_large_widths_of_all_kinds(width, words):
    tensors = large(width, 20, 30)[:3]
    if "layout" in words:
        tensors = [t.mT.contiguous() for t in tensors]
    if not words:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    check([*tensors, None], **words)


@pytest.mark.parametrize("factor, handed", [(1.0, True), (3.0, False), (float("nan"), False)])
def test_flat_rows_only_are_handed_over(factor, handed):
    q, k, v, _ = large()
    q = q.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dnl.nonlocal_attention(q * factor, k, v).square().sum().backward()
    names = {event.name for event in profile.events()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names) == handed


def test_large_widths_of_one_hot_rows_and_not_finite_numbers_keep_our_backward():
    q, k, v, _ = large()
    check([q * 100, k * 100, v, None])  # exponents of thousands: dquery is anchored
    _, exact = exact_results([q, k, v, None])
    v[0, 0, 3] = float("nan")
    k[1, 2, 5] = float("inf")
    _, grads = run([q, k, v, None], "cpu")
    untouched = torch.ones(2, 3, dtype=torch.bool)
    untouched[0, 0] = untouched[1, 2] = False
    for name, grad, (value, bound, _) in zip(NAMES, grads, exact, strict=False):
        assert_within_budget(name, grad[untouched], Exact(value[untouched], bound[untouched]))


def test_key_counts_around_a_group():
    """The last group of keys is padded, for every vector length; padding must not be seen, nor spoil what is."""
    for keys in range(1, 27):
        shapes = ((1, 2, 19, 5), (1, 2, keys, 5), (1, 2, keys, 7))
        for bandwidth in (None, torch.tensor([0.5, 2.0], dtype=torch.float64)):
            tensors = [*(torch.randn(shape, dtype=torch.float64) for shape in shapes), bandwidth]
            words = {"kernel": "softmax" if bandwidth is None else "gaussian"}
            for options in ({}, {"causal": True}):
                out, grads = run(tensors, "cpu", **words, **options)
                exact, exact_grads = run(tensors, "reference", **words, **options)
                torch.testing.assert_close([out, *grads], [exact, *exact_grads], rtol=1e-9, atol=1e-10)


def test_a_later_key_that_is_not_finite_reaches_no_earlier_query():
    q, k, v = (torch.randn(1, 1, 20, 4) for _ in range(3))
    clean, _ = run([q, k, v, None], "cpu", causal=True)
    for position in (1, 3, 7, 19):
        spoiled = v.clone()
        spoiled[..., position, :] = float("nan")
        out, _ = run([q, k, spoiled, None], "cpu", causal=True)
        torch.testing.assert_close(out[..., :position, :], clean[..., :position, :])
        assert out[..., position:, :].isnan().all()
    one, _ = run([q[..., :1, :], k, spoiled, None], "cpu", causal=True)  # all queries of the tile see one key
    torch.testing.assert_close(one, clean[..., :1, :])


@every_case
@pytest.mark.parametrize("kernel", ["dot", "dot-unnormalised"])
@every_dtype
def test_dot_against_float64(case, kernel, dtype):
    tensors, mask = inputs(case, kernel, dtype)
    check(tensors, key_mask=mask, **keywords(case, kernel))


@pytest.mark.parametrize("name", ["channels-first", "causal-key-mask"])
@pytest.mark.parametrize("kernel", EXPONENTIAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_accumulate_in_float32(levels, name, kernel, dtype):
    tensors, mask = inputs(CASES[name], kernel, dtype)
    check(tensors, levels, key_mask=mask, **keywords(CASES[name], kernel))


@st.composite
def calls(draw):
    sizes = [draw(st.integers(1, n)) for n in (2, 2, 70, 70)]
    widths = st.integers(1, 40) | st.sampled_from([8, 16, 32])  # whole vectors take a path of their own
    sizes += [draw(widths), draw(widths)]
    kernel = draw(st.sampled_from(EXPONENTIAL))
    words = {"causal": draw(st.booleans()), "layout": draw(st.sampled_from(["tokens", "channels_first"]))}
    case = Case(*sizes, words, draw(st.sampled_from([None, 0.0, 0.5])), draw(st.sampled_from([0.1, 1.0])))
    order = draw(st.permutations(range(4)))
    return case, kernel, order, draw(st.sampled_from([1, 2])), draw(st.booleans())


@hypothesis.given(calls())
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])  # fmt: skip
def test_any_shapes_and_strides(call):
    """Dimensions laid out in any order in memory, gaps between them, reversed batch."""
    case, kernel, order, step, expanded = call
    tensors, mask = inputs(case, kernel, torch.float32)

    def strided(t):
        wide = torch.full([n * step for n in (t.shape[d] for d in order)], float("nan"))
        view = wide[tuple(slice(None, None, step) for _ in order)]
        view = view.permute([order.index(d) for d in range(4)])
        view.copy_(t)
        return view[:1].expand_as(view) if expanded else view

    check([*(strided(t) for t in tensors[:3]), tensors[3]], key_mask=mask, **keywords(case, kernel))


# ---- Meaning -------------------------------------------------------------------------------------------------------


def test_softmax_is_scaled_dot_product_attention():
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 20) < 0.7
    mask[:, 0] = True
    for words, expected in (
        ({}, F.scaled_dot_product_attention(q, k, v)),
        ({"causal": True, "scale": 0.3}, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)),
        ({"key_mask": mask}, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])),
    ):
        torch.testing.assert_close(dnl.nonlocal_attention(q, k, v, **words), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gaussian_weights_are_those_of_the_distances(backend, normalize):
    q, k, v = torch.randn(2, 3, 9, 4).double(), torch.randn(2, 3, 11, 4).double(), torch.randn(2, 3, 11, 5).double()
    w = torch.exp(-(torch.cdist(q, k) ** 2) / (2 * 0.8**2))
    if normalize:
        w = w / w.sum(-1, keepdim=True)
    actual = dnl.nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=0.8, normalize=normalize, backend=backend)
    torch.testing.assert_close(actual, w @ v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(200, 150, 4, 5), (7, 150, 20, 30), (150, 200, 6, 6)])
def test_dot_divides_by_the_number_of_keys_seen(causal, sizes):
    N, M, D, E = sizes
    q, k, v = (torch.randn(2, 2, n, c, dtype=torch.float64) for n, c in ((N, D), (M, D), (M, E)))
    mask = torch.rand(2, M) < 0.8
    seen = mask[:, None, None, :].expand(2, 1, N, M)
    seen = seen.tril() if causal else seen
    expected = (q @ k.mT * seen) @ v / seen.sum(-1, keepdim=True).clamp(min=1)
    actual = dnl.nonlocal_attention(q, k, v, kernel="dot", causal=causal, key_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_local_returns_the_values_that_are_seen():
    q, v = torch.randn(2, 1, 3, 5), torch.randn(2, 1, 4, 5)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    words = {"kernel": "local", "layout": "channels_first"}
    assert torch.equal(dnl.nonlocal_attention(q, q, v, **words), v)
    assert torch.equal(dnl.nonlocal_attention(q, q, v, key_mask=mask, **words), v * mask[:, None, None, :])
    assert torch.equal(
        dnl.nonlocal_attention(q.mT, q.mT, v.mT, kernel="local", key_mask=mask), (v * mask[:, None, None]).mT
    )


def test_a_number_and_tensors_of_both_shapes_mean_the_same_bandwidth():
    q, k, v = (torch.randn(1, 2, 6, 3) for _ in range(3))
    results = [
        dnl.nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=b)
        for b in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.tensor(0.5, dtype=torch.float64))
    ]
    assert all(torch.equal(results[0], r) for r in results[1:])
    torch.testing.assert_close(
        dnl.nonlocal_attention(q, k, v, kernel="gaussian"),
        dnl.nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=1),
    )


# ---- Numerics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [30.0, 100.0])
def test_logits_of_ten_thousand(levels, dtype, size):
    q, k = (size * torch.randn(1, 1, 40, 1, dtype=dtype) for _ in range(2))
    v = torch.randn(1, 1, 40, 6, dtype=dtype)
    check([q, k, v, None], levels, scale=1.0)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_one_hot_rows_are_as_accurate_as_eager(isa, kernel, layout):
    """dquery is a small difference of keys there. The errors of one draw are luck: many, in two parts each."""
    errors = torch.zeros(2, dtype=torch.float64)
    words = {"softmax": {"scale": 1.0}, "gaussian": {"kernel": "gaussian", "bandwidth": 0.5}}[kernel]
    for _ in range(12):
        q, k = (30 * torch.randn(1, 1, 1, n) for n in (40, 300))
        v = torch.randn(1, 1, 6, 300)
        q, k, v = (t if layout == "channels_first" else t.mT for t in (q, k, v))
        dquery = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu"), (torch.float32, "reference")):
            query, key, value = (t.to(dtype, copy=True) for t in (q, k, v))
            query.requires_grad_()
            out = dnl.nonlocal_attention(query, key, value, layout=layout, backend=backend, **words)
            weight = torch.linspace(-1, 1, 240, dtype=torch.float64).to(dtype).view(40, 6)
            weight = weight.mT if layout == "channels_first" else weight
            dquery.append(torch.autograd.grad(out, query, weight[None, None])[0])
        errors += torch.stack([(d - dquery[0]).square().mean().sqrt() for d in dquery[1:]])
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_gaussian_rows_that_see_mostly_themselves_are_more_accurate_than_eager(isa, spread, layout):
    """At a spread of half a bandwidth rows see all keys alike: tokens were seen at 3.0 times eager's error there."""
    limits = {"token": 0.8 if spread > 1 else 4.0, "value": 1.5, "bandwidth": 0.7}
    for name, ratio in errors_of_rows_that_see_themselves("cpu", spread, layout, draws=9).items():
        assert ratio <= limits[name], name


@pytest.mark.parametrize("outlier", [False, True])
def test_what_keys_and_values_have_in_common_costs_no_accuracy(isa, outlier):
    """Biased projections: each row's deltas sum to the rounding of doutput . output, which must not meet their offset.
    One key far away must not be taken for an offset."""
    ours, eager = [], []
    for _ in range(9):
        query, key, value = (torch.randn(2, 1, 256, 16) for _ in range(3))
        if outlier:
            key[:, :, 7] = 1e4 * torch.randn(16)
        else:
            key, value = key + 3 * torch.randn(16), value + 3 * torch.randn(16)
        tensors = [query, key, value, None]
        exact = run([*(t.double() for t in tensors[:3]), None], "reference", kernel="softmax")[1][0]
        for errors, backend in ((ours, "cpu"), (eager, "reference")):
            errors.append(relative_error(run(tensors, backend, kernel="softmax")[1][0], exact))
    assert median(ours) <= 2 * median(eager), (ours, eager)


@every_dtype
def test_masked_rows_give_zeros_and_zero_gradients(dtype):
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=dtype) for _ in range(3))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4:] = True
    for kernel in KERNELS:
        bandwidth = torch.ones(2, dtype=torch.float64) if "gaussian" in kernel else None
        out, grads = run([q, k, v, bandwidth], "cpu", key_mask=mask, causal=True, **KERNELS[kernel])
        assert (out[0] == 0).all() and (out[1, :, :4] == 0).all() and (out[1, :, 4:] != 0).all()
        for grad in grads[:3]:
            assert (grad[0] == 0).all() and grad.isfinite().all()
        assert (grads[0][1, :, :4] == 0).all() and (grads[1][1, :, :4] == 0).all() and grads[2][1].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_an_offset_of_1000_costs_no_accuracy(isa, normalize):
    x = torch.randn(1, 1, 64, 3, dtype=torch.float64)
    shifted = (x + 1000).float()
    exact = shifted.double()  # what float32 holds of the points
    weights = [
        dnl.nonlocal_attention(t, t, torch.eye(64, dtype=t.dtype)[None, None], kernel="gaussian", normalize=normalize,
                               backend=backend)
        for t, backend in ((shifted, "cpu"), (shifted, "reference"), (exact, "reference"))
    ]  # fmt: skip
    assert (weights[0] - weights[2]).abs().max() < 1e-5 and (weights[1] - weights[2]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_and_huge_bandwidths(isa, dtype):
    x, v = torch.randn(1, 2, 50, 3, dtype=dtype), torch.randn(1, 2, 50, 4, dtype=dtype)
    for normalize in (True, False):  # tiny: a point sees itself alone
        out, grads = run(
            [x, x.clone(), v, torch.full((2,), 1e-6, dtype=dtype)], "cpu", kernel="gaussian", normalize=normalize
        )
        torch.testing.assert_close(out, v)
        assert all(g.isfinite().all() for g in grads)
    mean, grads = run([x, x.clone(), v, torch.full((2,), 1e6, dtype=dtype)], "cpu", kernel="gaussian")
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(v))
    assert all(g.isfinite().all() for g in grads)


def test_unnormalised_gaussian_is_exactly_zero_far_away(isa):
    q, k = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 9, 2), 1e18)
    v = torch.ones(1, 1, 9, 2)
    for bandwidth in (1.0, 1e-6):
        far = torch.tensor([bandwidth])
        out, grads = run([q, k, v, far], "cpu", kernel="gaussian", normalize=False)
        assert (out == 0).all() and all((g == 0).all() for g in grads)
    near = dnl.nonlocal_attention(q, q, v[:, :, :3], kernel="gaussian", normalize=False)
    assert (near == 3).all()


@pytest.mark.parametrize("kernel", EXPONENTIAL)
def test_nan_reaches_those_who_see_it_and_no_others(isa, kernel):
    base = [torch.randn(2, 1, 40, 3), torch.randn(2, 1, 40, 3), torch.randn(2, 1, 40, 4)]
    bandwidth = torch.ones(1) if "gaussian" in kernel else None
    clean, clean_grads = run([*base, bandwidth], "cpu", causal=True, **KERNELS[kernel])
    for which in (1, 2):  # a key, a value: at position 20 of the first sample
        spoiled = [t.clone() for t in base]
        spoiled[which][0, 0, 20] = float("nan")
        out, grads = run([*spoiled, bandwidth], "cpu", causal=True, **KERNELS[kernel])
        assert out[0, 0, 20:].isnan().all()
        torch.testing.assert_close(out[0, :, :20], clean[0, :, :20])
        torch.testing.assert_close(grads[0][0, :, :20], clean_grads[0][0, :, :20])
        for a, b in zip([out, *grads[:3]], [clean, *clean_grads[:3]], strict=True):
            assert torch.equal(a[1], b[1])
        mask = torch.ones(2, 40, dtype=torch.bool)
        mask[0, 20] = False
        masked, masked_grads = run([*spoiled, bandwidth], "cpu", key_mask=mask, **KERNELS[kernel])
        assert masked.isfinite().all() and all(g.isfinite().all() for g in masked_grads)


def test_half_types_round_to_nearest(isa):
    """Every float32 sum is rounded as torch rounds it."""
    v = torch.randn(1, 1, 300, 1)
    for dtype in (torch.bfloat16, torch.float16):
        values = v.to(dtype)
        zero = torch.zeros_like(values)
        for scale in (1.0, 1e-3, 1e4):
            scaled = (values * scale).to(dtype)
            out = dnl.nonlocal_attention(zero[:, :, :1], zero[:, :, :1], scaled[:, :, :1], backend="cpu")
            assert torch.equal(out, scaled[:, :, :1])
        out = dnl.nonlocal_attention(zero, zero, values, backend="cpu")
        exact = values.double().mean().to(dtype)
        assert (out == exact).all()


# ---- Derivatives, determinism, threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [{}, {"causal": True, "layout": "channels_first", "masked": True}], ids=str)
@every_kernel
def test_second_derivatives_tile_by_tile(monkeypatch, kernel, words):
    monkeypatch.setattr(tiled, "TILE_NUMBERS", 2 * 4)  # two tiles of three and two queries
    case = Case(1, 1, 4, 3, 2, 2, {k: v for k, v in words.items() if k != "masked"}, 0.7 if "masked" in words else None)
    tensors, mask = inputs(case, kernel, torch.float64)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def call(q, k, v, bandwidth=None):
        return dnl.nonlocal_attention(
            q, k, v, bandwidth=bandwidth, key_mask=mask, backend="cpu", **keywords(case, kernel)
        )

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("words", [{}, {"causal": True}, {"layout": "channels_first"}], ids=str)
@every_kernel
def test_first_derivatives_with_create_graph_are_the_same_over_several_tiles(monkeypatch, kernel, words):
    """gradgradcheck differentiates the tiles' own derivative and would agree with a wrong one."""
    monkeypatch.setattr(tiled, "TILE_NUMBERS", 2 * 2 * 5)
    tensors, mask = inputs(Case(1, 2, 9, 5, 3, 2, words, 0.7), kernel, torch.float64)
    found = []
    for backend, create_graph in (("cpu", True), ("cpu", False), ("reference", False)):
        leaves = [t.clone().requires_grad_() for t in tensors if t is not None]
        q, k, v, *bandwidth = leaves
        out = dnl.nonlocal_attention(
            q, k, v, bandwidth=bandwidth[0] if bandwidth else None, key_mask=mask, backend=backend,
            **{**KERNELS[kernel], **words},
        )  # fmt: skip
        found.append(torch.autograd.grad(out, leaves, cotangent(out), create_graph=create_graph))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


def test_second_derivatives_form_no_matrix_of_weights(monkeypatch):
    monkeypatch.setattr(tiled, "TILE_NUMBERS", 8 * 200)
    q, k, v = (torch.randn(1, 1, 200, 2, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        out = dnl.nonlocal_attention(q, k, v, kernel="gaussian", backend="cpu")
        gradients = torch.autograd.grad(out.sin().sum(), [q, k, v], create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), [q, k, v])
    assert 200 < largest.numel <= 8 * 200


def test_third_derivative():
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)

    def f(k, backend):
        out = dnl.nonlocal_attention(k.view(1, 1, 3, 1), k.view(1, 1, 3, 1), x.view(1, 1, 3, 1), backend=backend)
        return out.sin().sum()

    derivatives = []
    for backend in ("cpu", "reference"):
        k = x.clone().requires_grad_()
        value = f(k, backend)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, k, create_graph=True)
            value = gradient.square().sum()
        derivatives.append(gradient)
    torch.testing.assert_close(*derivatives, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", EXPONENTIAL)
def test_results_do_not_depend_on_threads(kernel):
    results = []
    tensors, mask = inputs(CASES["several-parts"], kernel, torch.float32)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(tensors, "cpu", key_mask=mask, **KERNELS[kernel]))
    torch.set_num_threads(threads)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0]) and all(map(torch.equal, grads, results[0][1]))


def test_many_python_threads_at_once():
    jobs = [
        inputs(CASES[name], "gaussian", torch.float32)[0] for name in ("odd", "several-parts", "wide", "large-scores")
    ]
    expected = [run(tensors, "cpu", kernel="gaussian") for tensors in jobs]
    failures = []

    def work(i):
        for _ in range(5):
            out, grads = run(jobs[i], "cpu", kernel="gaussian")
            if not (torch.equal(out, expected[i][0]) and all(map(torch.equal, grads, expected[i][1]))):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i % len(jobs),)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_no_matrix_of_weights_is_stored():
    saved = []
    q, k, v = (torch.randn(1, 2, 300, 4, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dnl.nonlocal_attention(q, k, v, kernel="gaussian", backend="cpu")
    assert sum(t.numel() for t in saved) <= 4 * q.numel() + 2 * 2 * 300 + 2


# ---- Errors --------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 5, 4)
ERRORS = [
    ((X, X, X), {"kernel": "rbf"}, ValueError, "kernel is 'rbf'; expected one of local, softmax, gaussian, dot"),
    ((X, X, X), {"layout": "nhwc"}, ValueError, "layout is 'nhwc'; expected one of tokens, channels_first"),
    ((X, [1], X), {}, TypeError, "key is of type list"),
    ((X.long(), X, X), {}, TypeError, "query is of torch.int64"),
    ((X, X.double(), X), {}, TypeError, "key is of torch.float64; expected torch.float32, as query"),
    ((X, X, X.to("meta")), {}, ValueError, "value is on meta; expected cpu"),
    ((X[0], X, X), {}, ValueError, r"query is of shape \[3, 5, 4\]; expected 4 dimensions \(B, h, N, D\)"),
    ((X, X[..., :3], X), {}, ValueError, r"key is of shape \[2, 3, 5, 3\]; expected \[2, 3, 5, 4\] \(B, h, M, D\)"),
    ((X, X, X[:, :, :4]), {}, ValueError, r"value is of shape \[2, 3, 4, 4\]; expected \[2, 3, 5, 4\] \(B, h, M, E\)"),
    ((X, X[:, :2], X), {}, ValueError, r"key is of shape \[2, 2, 5, 4\]; expected \[2, 3, 5, 4\]"),
    ((X[..., :0], X[..., :0], X), {}, ValueError, "query is of shape .*; expected a width D of at least 1"),
    ((X, X[:, :, :4], X[:, :, :4]), {"kernel": "local"}, ValueError, "as many positions as query, 5"),
    ((X, X, X), {"scale": "1"}, TypeError, "scale is of type str; expected a number"),
    ((X, X, X), {"scale": 1.0, "kernel": "gaussian"}, ValueError, "scale is 1.0; expected None for kernel='gaussian'"),
    ((X, X, X), {"bandwidth": 1.0}, ValueError, "bandwidth is given; expected None for kernel='softmax'"),
    ((X, X, X), {"bandwidth": 0.0, "kernel": "gaussian"}, ValueError, "bandwidth is 0.0; expected a number > 0"),
    ((X, X, X), {"bandwidth": "1", "kernel": "gaussian"}, TypeError, "bandwidth is of type str"),
    ((X, X, X), {"bandwidth": torch.ones(2), "kernel": "gaussian"}, ValueError, r"bandwidth is of shape \[2\]"),
    ((X, X, X), {"bandwidth": X[0, :, 0, 0] - 1, "kernel": "gaussian"}, ValueError, r"bandwidth is \[-1.0, -1.0"),
    ((X, X, X), {"bandwidth": X.long(), "kernel": "gaussian"}, TypeError, "bandwidth is of torch.int64"),
    ((X, X, X), {"bandwidth": torch.ones(3, device="meta"), "kernel": "gaussian"}, ValueError, "bandwidth is on meta"),
    ((X, X, X), {"key_mask": [True]}, TypeError, "key_mask is of type list"),
    ((X, X, X), {"key_mask": torch.ones(2, 5)}, TypeError, "key_mask is of torch.float32; expected torch.bool"),
    ((X, X, X), {"key_mask": torch.ones(2, 4) > 0}, ValueError, r"key_mask is of shape \[2, 4\]; expected \[2, 5\]"),
    ((X, X, X), {"key_mask": torch.ones(2, 5, device="meta") > 0}, ValueError, "key_mask is on meta; expected cpu"),
]  # fmt: skip


@pytest.mark.parametrize("tensors, words, error, message", ERRORS, ids=[e[-1][:50] for e in ERRORS])
def test_bad_input_is_named(tensors, words, error, message):
    with pytest.raises(error, match=message):
        dnl.nonlocal_attention(*tensors, **words)


def test_good_input_next_to_each_error_passes():
    for words in (
        {"kernel": "local"},
        {"layout": "channels_first", "key_mask": torch.ones(2, 4) > 0},
        {"scale": 2},
        {"kernel": "gaussian", "bandwidth": torch.ones(3)},
        {"kernel": "gaussian", "bandwidth": torch.ones((), dtype=torch.float64)},
        {"key_mask": torch.ones(2, 5) > 0},
    ):
        assert dnl.nonlocal_attention(X, X, X, **words).shape == X.shape
    assert dnl.nonlocal_attention(X, X[:, :, :4], X[:, :, :4, :3]).shape == (2, 3, 5, 3)
