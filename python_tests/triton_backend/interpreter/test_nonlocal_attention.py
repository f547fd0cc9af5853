"""nonlocal_attention's Triton kernels against float64: the named cases of every backend, and their own corners."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels import _backend, _triton
from dnl_kernels.ops.nonlocal_attention import triton as kernels
from dnl_kernels.ops.nonlocal_attention import triton_tiles
from dnl_kernels.testing import named
from dnl_kernels.testing.nonlocal_attention import CASES, KERNELS, Case, errors_of_rows_that_see_themselves, inputs
from dnl_kernels.testing.triton_interpreter import traffic

EXPONENTIAL = [kernel for kernel in KERNELS if "dot" not in kernel]
every_kernel = pytest.mark.parametrize("kernel", EXPONENTIAL)
every_dtype = pytest.mark.parametrize("dtype", _backend.TRITON.dtypes, ids=str)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 or 32 positions, so that small cases take several, of queries and of keys, in every kernel."""
    sizes = {"forward": (32, 16), "query": (16, 32), "key": (16, 32)}
    small = {k: {256: triton_tiles.Config(*sizes[k[0]], 1, 1)} for k in triton_tiles.TILES}
    monkeypatch.setattr(triton_tiles, "TILES", small)
    monkeypatch.setattr(triton_tiles, "TILES_GENERAL", small)
    monkeypatch.setattr(triton_tiles, "TILES_OF", {})


def check(case, kernel, dtype):
    named.check(named._nonlocal_attention(kernel)(case, dtype), "triton")


def run(tensors, backend="triton", **words):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = dnl.nonlocal_attention(*leaves[:3], bandwidth=leaves[3], backend=backend, **words)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)
    return out, torch.autograd.grad(out, [t for t in leaves if t is not None], dout)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_kernel
def test_against_float64(case, kernel):
    check(case, kernel, torch.float32)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("several-parts", "large-scores")])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_against_float64(name, dtype):
    check(CASES[name], EXPONENTIAL[list(CASES).index(name) % 4], dtype)


SEVERAL_TILES = {
    "odd": Case(1, 2, 37, 45, 5, 11, {"causal": True}),
    "even": Case(1, 1, 64, 32, 16, 16, {"layout": "channels_first"}),
    "masked": Case(2, 1, 33, 50, 20, 6, {"causal": True, "layout": "channels_first"}, mask=0.5),
    "more-keys-than-queries-see": Case(1, 1, 17, 70, 4, 4, {"causal": True}),
}


TILED = [(n, k) for i, n in enumerate(SEVERAL_TILES) for j, k in enumerate(EXPONENTIAL) if (i // 2 + j) % 2 == 0]


@pytest.mark.parametrize("name, kernel", TILED)
def test_several_tiles_of_queries_and_keys(small_tiles, name, kernel):
    dtype = _backend.TRITON.dtypes[(list(SEVERAL_TILES).index(name) + EXPONENTIAL.index(kernel)) % 3]
    check(SEVERAL_TILES[name], kernel, dtype)


@pytest.mark.parametrize("kernel, D, E", [("softmax", 150, 20), ("gaussian", 20, 200), ("gaussian", 200, 130)])
@pytest.mark.parametrize("words", [{"causal": True}, {"layout": "channels_first"}], ids=str)
def test_wide_features_in_parts(kernel, D, E, words):
    """Where something is masked, the query's gradient reads the features of wide tensors part by part."""
    mask = None if "causal" in words else 0.6
    check(Case(1, 1, 21, 37, D, E, words, mask=mask), kernel, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_tf32_only_where_torch_allows_it(kernel):
    tensors, _ = inputs(Case(1, 1, 20, 20, 16, 8), kernel, torch.float32)
    exact, _ = run([None if t is None else t.double() for t in tensors], "reference", **KERNELS[kernel])
    errors = {}
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        out, _ = run(tensors, **KERNELS[kernel])
        errors[precision] = (out - exact).abs().max().item()
    assert errors["highest"] < 2e-6 < 1e-4 < errors["high"] < 1e-2


def strided(t, order, step):
    """t with its dimensions laid out in another order, NaN between its elements."""
    wide = torch.full([t.shape[d] * step for d in order], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, step) for _ in order)].permute([order.index(d) for d in range(4)])
    return view.copy_(t)


@pytest.mark.parametrize("spread, layout", [(0.5, "tokens"), (6.0, "channels_first")])
def test_gaussian_rows_that_see_mostly_themselves_are_more_accurate_than_eager(spread, layout):
    limits = {"token": 0.8 if spread > 1 else 4.0, "value": 1.5, "bandwidth": 0.7}
    for name, ratio in errors_of_rows_that_see_themselves("triton", spread, layout, draws=3).items():
        assert ratio <= limits[name], name


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("order, step", [((3, 1, 2, 0), 1), ((2, 0, 3, 1), 2)], ids=str)
def test_strided_and_expanded_tensors(layout, order, step):
    case = Case(2, 2, 19, 23, 6, 5, {"layout": layout})
    call = named._nonlocal_attention("softmax")(case, torch.float32)
    names = ("query", "key", "value")
    leaves = call.leaves | {name: strided(call.leaves[name], order, step) for name in names}
    results = [named.gradients(call, given, "triton") for given in (call.leaves, leaves)]
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
    whole = call.leaves | {"key": call.leaves["key"][:1].expand_as(call.leaves["key"])}
    named.check(call._replace(leaves=whole), "triton")


@pytest.mark.parametrize("kernel, dtype", list(zip(EXPONENTIAL, 2 * _backend.TRITON.dtypes, strict=False)), ids=str)
def test_masked_rows_give_zeros_and_zero_gradients(small_tiles, kernel, dtype):
    q, k, v = (torch.randn(2, 1, 21, 4, dtype=dtype) for _ in range(3))
    mask = torch.zeros(2, 21, dtype=torch.bool)
    mask[1, 18:] = True
    bandwidth = torch.ones(1, dtype=dtype) if "gaussian" in kernel else None
    out, grads = run([q, k, v, bandwidth], key_mask=mask, causal=True, **KERNELS[kernel])
    assert (out[0] == 0).all() and (out[1, :, :18] == 0).all() and (out[1, :, 18:] != 0).all()
    for grad in grads[:3]:
        assert (grad[0] == 0).all() and grad.isfinite().all()
    assert (grads[0][1, :, :18] == 0).all() and (grads[1][1, :, :18] == 0).all() and grads[2][1].any()


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_nan_reaches_those_who_see_it_and_no_others(small_tiles, kernel):
    base = [torch.randn(2, 1, 20, 3), torch.randn(2, 1, 20, 3), torch.randn(2, 1, 20, 4)]
    bandwidth = torch.ones(1) if "gaussian" in kernel else None
    clean, clean_grads = run([*base, bandwidth], causal=True, **KERNELS[kernel])
    for which in (1, 2):  # a key, a value: at position 9 of the first sample
        spoiled = [t.clone() for t in base]
        spoiled[which][0, 0, 9] = float("nan")
        out, grads = run([*spoiled, bandwidth], causal=True, **KERNELS[kernel])
        assert out[0, 0, 9:].isnan().all()
        torch.testing.assert_close(out[0, :, :9], clean[0, :, :9])
        torch.testing.assert_close(grads[0][0, :, :9], clean_grads[0][0, :, :9])
        for a, b in zip([out, *grads[:3]], [clean, *clean_grads[:3]], strict=True):
            assert torch.equal(a[1], b[1])
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[0, 9] = False
        masked, masked_grads = run([*spoiled, bandwidth], key_mask=mask, **KERNELS[kernel])
        assert masked.isfinite().all() and all(g.isfinite().all() for g in masked_grads)


@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
def test_an_offset_costs_no_accuracy(dtype, normalize):
    """Points near 1000 (their rounding is large enough in half types): distances are those of what the dtype holds."""
    spread = {torch.float32: 1.0, torch.float16: 4.0, torch.bfloat16: 30.0}[dtype]
    x = (1000 + spread * torch.randn(1, 1, 40, 3)).to(dtype)
    words = {"kernel": "gaussian", "normalize": normalize, "bandwidth": spread}
    weights = [
        dnl.nonlocal_attention(t, t, torch.eye(40, dtype=t.dtype)[None, None], backend=backend, **words)
        for t, backend in ((x, "triton"), (x.double(), "reference"))
    ]
    assert (weights[0] - weights[1]).abs().max() < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_unnormalised_gaussian_at_extreme_distances_and_bandwidths():
    q, k, v = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 9, 2), 1e18), torch.ones(1, 1, 9, 2)
    for bandwidth in (1.0, 1e-6):
        out, grads = run([q, k, v, torch.tensor([bandwidth])], kernel="gaussian", normalize=False)
        assert (out == 0).all() and all((g == 0).all() for g in grads)
    x, v = torch.randn(1, 1, 20, 3), torch.randn(1, 1, 20, 4)
    out, _ = run([x, x.clone(), v, torch.full((1,), 1e-6)], kernel="gaussian", normalize=False)
    torch.testing.assert_close(out, v)  # a point sees itself alone


def test_unnormalised_weights_beyond_the_range_of_float16():
    q = torch.full((1, 1, 16, 16), 1.0).half()
    v = torch.full((1, 1, 16, 8), 2.0**-14).half()
    out, grads = run([q, q.clone(), v, None], kernel="softmax", normalize=False, scale=1.0)  # weights e^16 > 65504
    torch.testing.assert_close(out.float(), torch.full(out.shape, 16 * 8886110.52 * 2.0**-14), rtol=2e-3, atol=0)
    assert not out.isnan().any()


def test_offsets_beyond_32_bits(sparse_memory):
    stride = 2**30 + 64
    wide = sparse_memory(3 * stride + 16, torch.float16).as_strided((1, 1, 4, 16), (0, 0, stride, 1))
    wide.copy_(torch.randn(4, 16))
    for order in ((wide, wide.contiguous()), (wide.contiguous(), wide)):
        out, grads = run([order[0], order[1], order[1], None])
        expected, expected_grads = run([wide.contiguous()] * 3 + [None])
        assert torch.equal(out, expected) and all(map(torch.equal, grads, expected_grads))


def test_small_sizes_keep_32_bit_offsets():
    x = torch.zeros(64, 8, 1000, 256, device="meta")  # more than 2^31 bytes, less within a head
    assert not kernels._wide((x,), False)
    assert kernels._wide((x.as_strided((1, 1, 2, 2), (0, 0, 1, 2**31)),), True)


def test_widths_beyond_the_limit_are_refused_with_the_reason():
    x = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match="backend='triton' cannot run this call: .*up to 256, not 257 and 3"):
        dnl.nonlocal_attention(x, x, x[..., :3], backend="triton")
    with pytest.raises(ValueError, match="up to 256, not 3 and 257"):
        dnl.nonlocal_attention(x[..., :3], x[..., :3], x, backend="triton")
    with pytest.raises(ValueError, match="supports float32, bfloat16, float16, not torch.float64"):
        dnl.nonlocal_attention(x[..., :3].double(), x[..., :3].double(), x[..., :3].double(), backend="triton")
    assert dnl.nonlocal_attention(x[..., :256], x[..., :256], x[..., :256], backend="triton").shape == (1, 1, 2, 256)


def test_autotuned_launches_give_the_same(monkeypatch):
    """The interpreter takes the first configuration; that the constants of a call reach the kernel is what is shown."""
    tensors, _ = inputs(CASES["odd"], "gaussian", torch.float32)
    results = []
    for on in (False, True):
        monkeypatch.setattr(_triton, "AUTOTUNE", on)
        results.append(run(tensors, **KERNELS["gaussian"]))
    assert torch.equal(results[0][0], results[1][0]) and all(map(torch.equal, results[0][1], results[1][1]))


def test_kernels_without_weights_take_no_kernel_of_ours():
    with traffic() as count:
        for kernel in ("dot", "local"):
            x = torch.randn(1, 1, 4, 3)
            actual, expected = (
                dnl.nonlocal_attention(x, x, x, kernel=kernel, backend=b) for b in ("triton", "reference")
            )
            torch.testing.assert_close(actual, expected)
    assert count.launches == 0


def test_the_bandwidths_gradient_is_computed_only_where_wanted():
    tensors, _ = inputs(CASES["odd"], "gaussian", torch.float32)
    q, k, v, bandwidth = tensors
    with traffic() as count:
        out = dnl.nonlocal_attention(q.requires_grad_(), k, v, kernel="gaussian", bandwidth=bandwidth, backend="triton")
        torch.autograd.grad(out.sum(), q)
    assert count.launches == 3 and "MOMENTS" not in count.by_tensor
