"""The layer's non-local operator on the CPU, sample by sample (csrc/dnl_layer/cpu.cpp), against the reference in
float64: both passes over odd sizes, strided tensors, every map with and without a bias, and what it refuses."""

from typing import NamedTuple

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels._ops import SCHEMAS, attends_in_groups
from dnl_kernels.ops.dnl_layer import projected
from dnl_kernels.ops.dnl_layer.config import NonLocalParameters
from dnl_kernels.ops.dnl_layer.reference import non_local
from dnl_kernels.testing import assert_within_budget, exactly

pytestmark = pytest.mark.skipif(_backend.absence("cpu") is not None, reason="needs the C++ extension")


class Case(NamedTuple):
    batch: int = 2
    channels: int = 5
    height: int = 5
    width: int = 7
    heads: int = 1
    query: int = 4  # of a head
    value: int = 3
    outputs: int = 6
    kernel: str = "softmax"
    biases: str = ""  # which maps have one, by their first letters
    residual: bool = False
    magnitude: float = 1.0

    def tensors(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        def bias(name, size):
            return random(size) if name in self.biases else None

        q, v, C = self.heads * self.query, self.heads * self.value, self.channels
        shared = self.kernel == "gaussian"
        theta = NonLocalParameters(
            self.magnitude * random(q, C) / C**0.5, bias("q", q), None if shared else random(q, C) / C**0.5,
            None if shared else bias("k", q), random(v, C), bias("v", v), random(self.outputs, v),
            bias("o", self.outputs), 0.3 * random(self.heads) if shared else None,
        )  # fmt: skip
        y = random(self.batch, C, self.height, self.width)
        return y, random(self.batch, self.outputs, self.height, self.width), theta


CASES = {
    "softmax": Case(),
    "whole-vectors": Case(channels=16, height=8, width=8, query=16, value=16, outputs=16, residual=True),
    "biases": Case(biases="qkvo"),
    "some-biases-heads": Case(heads=3, biases="vo"),
    "residual": Case(outputs=5, residual=True, biases="o"),
    "gaussian": Case(kernel="gaussian", heads=2, biases="qv"),
    "gaussian-residual": Case(kernel="gaussian", outputs=5, residual=True),
    "wide-heads": Case(channels=13, query=20, value=31, outputs=2),
    "many-channels": Case(channels=66, heads=2),  # torch's products
    "one-pixel": Case(height=1, width=1),
    "one-sample-in-parts": Case(batch=1, height=25, width=22, query=3, biases="q"),
    "more-samples-than-chunks": Case(batch=37, height=3, width=4),
    "peaked": Case(magnitude=300.0, height=4),  # rows are anchored, see nonlocal_attention/tiles.h
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def eager(case, y, dx, theta):
    """N(y), and the gradients of y and of what theta has."""
    leaves = {name: t.detach().requires_grad_() for name, t in theta._asdict().items() if t is not None}
    y = y.detach().requires_grad_()
    x = non_local(y, theta._replace(**leaves), case.kernel, case.heads)
    x = x + y if case.residual else x
    gradients = torch.autograd.grad(x, [y, *leaves.values()], dx)
    return x.detach(), dict(zip(["y", *leaves], gradients, strict=True))


def ours(case, y, dx, theta, out=None):
    config = projected.Config(case.kernel, case.heads, y.dim() == 4, "cpu")
    x, kept = projected.forward(config, y, theta, out, case.residual)
    assert out is None or x is out
    dy, found = projected.backward(config, dx, y, theta, kept, case.residual)
    return x, {"y": dy, **{name: found[name] for name, t in theta._asdict().items() if t is not None}}


def check(case, y, dx, theta, out=None, levels=lambda: [None]):
    """Every result within the budget; what is kept between the products of a half type is of that type."""
    double = NonLocalParameters(*(None if t is None else t.double() for t in theta))
    exact, exact_gradients = exactly(lambda: eager(case, y.double(), dx.double(), double), y.dtype, y.dtype)
    for _ in levels():
        x, gradients = ours(case, y, dx, theta, out)
        assert x.dtype == y.dtype
        assert_within_budget("x", x, exact)
        for name, gradient in gradients.items():
            assert_within_budget("d" + name, gradient.to(y.dtype), exact_gradients[name])


# In half types the rounding of scores of hundreds decides which key wins: there is nothing to compare.
@pytest.mark.parametrize(
    "name, dtype", [(n, d) for n, c in CASES.items() for d in _backend.ALL_DTYPES if c.magnitude == 1 or d.itemsize > 2]
)
def test_against_float64(levels, name, dtype):
    for seed in range(2 if dtype == torch.float32 else 1):
        check(CASES[name], *CASES[name].tensors(dtype, seed), levels=levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_tensors(dtype):
    case = CASES["residual"]
    y, dx, theta = case.tensors(dtype)
    wide = torch.randn(4, 12, 5, 7).to(dtype)
    expected, _ = ours(case, y, dx, theta)
    for out in (wide[::2, 3:8], torch.empty_like(y, memory_format=torch.channels_last), wide[:2, :10:2]):
        before, taken = wide.clone(), out.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
        check(case, y.to(memory_format=torch.channels_last), dx.expand(*dx.shape), theta, out)
        assert torch.equal(out, expected)
        if taken:  # and nothing beside it
            out.copy_(before.as_strided(out.shape, out.stride(), out.storage_offset()))
            assert torch.equal(wide, before)
    check(case, wide[2:, 5:10], wide[:2, 6:11], theta)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tokens_are_the_same_numbers_in_another_order(case, dtype):
    y, dx, theta = case.tensors(dtype)
    if not attends_in_groups(case.kernel, theta.value_weight):
        pytest.skip("torch's products add in another order")
    expected, gradients = ours(case, y, dx, theta)
    y, dx = (t.flatten(2).mT.contiguous() for t in (y, dx))
    wide = torch.zeros(*dx.shape[:2], 2 * case.outputs + 1, dtype=dtype)
    for out in (None, wide[..., 1 : 1 + case.outputs], wide[..., ::2][..., : case.outputs]):
        x, found = ours(case, y, dx, theta, out)
        assert torch.equal(x, expected.flatten(2).mT)
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient.flatten(2).mT if name == "y" else gradient), name


def test_no_samples_and_no_pixels():
    for case in (Case(batch=0, biases="qo"), Case(height=0, biases="qo"), Case(batch=0, kernel="gaussian")):
        y, dx, theta = case.tensors(torch.float32)
        x, gradients = ours(case, y, dx, theta)
        assert x.shape == dx.shape and gradients["y"].shape == y.shape
        for name, gradient in gradients.items():
            assert name == "y" or (gradient.shape == getattr(theta, name).shape and not gradient.any()), name


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_results_do_not_depend_on_the_thread_count(batch):
    case = Case(batch=batch, height=24, width=23, heads=2, kernel="gaussian")
    tensors, threads, results = case.tensors(torch.float32), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, gradients = ours(case, *tensors)
        results.append([x, *gradients.values()])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_case
def test_the_shape_functions_are_those_of_the_operators(case):
    y, dx, theta = case.tensors(torch.bfloat16)
    y, dx = y.flatten(2), dx.flatten(2)
    maps = projected._fused_arguments(projected.Config(case.kernel, case.heads, True, "cpu"), theta, case.residual)
    kept = torch.ops.dnl.dnl_layer_attend(y, *maps, dx.clone())
    given = (dx, y, *kept, *maps, torch.empty_like(y, dtype=torch.float32))
    found = torch.ops.dnl.dnl_layer_attend_pull(*given)
    fakes = SCHEMAS["dnl_layer_attend"].fake(y, *maps, dx), SCHEMAS["dnl_layer_attend_pull"].fake(*given)
    for real, fake in zip((kept, found), fakes, strict=True):
        pairs = zip(torch.utils._pytree.tree_leaves(real), torch.utils._pytree.tree_leaves(fake), strict=True)
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def test_what_does_not_fit_together_is_refused():
    case = CASES["biases"]
    y, dx, theta = case.tensors(torch.float32)
    y, dx, dy = y.flatten(2), dx.flatten(2), torch.empty(2, 5, 35)
    arguments = projected._fused_arguments(projected.Config("softmax", 1, True, "cpu"), theta, False)
    attend, pull = torch.ops.dnl.dnl_layer_attend, torch.ops.dnl.dnl_layer_attend_pull
    kept = attend(y, *arguments, torch.empty_like(dx))
    pull(dx, y, *kept, *arguments, dy)
    weights, biases, output_weight, output_bias, _, _, _ = arguments
    wrong = [
        ("y has the wrong shape", (y[0], *arguments, dx)),
        ("map of query, key or value", (y[:, :4], *arguments, dx)),
        ("map of query, key or value", (y, [*weights[:2], weights[2][:, 1:]], *arguments[1:], dx)),
        ("map of query, key or value", (y, weights, [biases[0][1:], *biases[1:]], *arguments[2:], dx)),
        ("maps of query, key and value", (y, weights[:1], biases[:1], *arguments[2:], dx)),
        ("sizes do not match", (y, [weights[0], *weights[2:], weights[2]], [None] * 3, *arguments[2:], dx)),
        ("sizes do not match", (y, weights, biases, output_weight[:, 1:], *arguments[3:], dx)),
        ("sizes do not match", (y, weights, biases, output_weight, output_bias[1:], *arguments[4:], dx)),
        ("sizes do not match", (y, weights, biases, output_weight, output_bias, torch.ones(2), 1, False, dx)),
        ("map of query, key or value", (y, *arguments[:5], 3, False, dx)),
        ("y is added to something", (y, *arguments[:6], True, dx)),
        ("element types differ", (y.double(), *arguments, dx.double())),
        ("element types differ", (y, [*weights[:2], weights[2].double()], *arguments[1:], dx)),
        ("element types differ", (y, weights, biases, output_weight, output_bias.double(), *arguments[4:], dx)),
        ("out has the wrong shape or type", (y, *arguments, dx[:, 1:])),
        ("out has the wrong shape or type", (y, *arguments, dx.double())),
    ]
    for message, given in wrong:
        with pytest.raises(RuntimeError, match=message):
            attend(*given)
    attended, shift, total = kept
    for message, given in [
        ("dx has the wrong shape", (dx[:, 1:], y, *kept)),
        ("element types differ", (dx.double(), y, *kept)),
        ("attention's output has the wrong shape", (dx, y, attended[:, 1:], shift, total)),
        ("shift or sum", (dx, y, attended, shift[1:], total)),
        ("shift or sum", (dx, y, attended, shift, total.double())),
    ]:
        with pytest.raises(RuntimeError, match=message):
            pull(*given, *arguments, dy)
    for wrong_dy in (dy[1:], dy.double()):
        with pytest.raises(RuntimeError, match="dy has the wrong shape or type"):
            pull(dx, y, *kept, *arguments, wrong_dy)
