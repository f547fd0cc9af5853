"""The tests and benchmarks for a GPU, as far as a machine without one can tell: their modules are imported, every case
is made, and every call is legal, on fake tensors, which have shapes and no numbers. What nobody runs breaks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu_day import groups
from dnl_kernels import _backend
from dnl_kernels.ops.dnl_block import resident
from dnl_kernels.testing import named
from dnl_kernels.testing.dnl_block import LayerParameters, inputs
from python_tests.gpu import large
from python_tests.gpu.refusals import refused

H100 = 227 << 10  # bytes of shared memory of a block
LARGE = [pytest.param(op, make, id=f"{op}-{name}") for op, cases in large.CALLS.items() for name, make in cases.items()]


@pytest.mark.parametrize("op, make", LARGE)
def test_large_cases_are_legal_calls(op, make):
    for dtype in _backend.CUDA_DTYPES:
        with FakeTensorMode():
            call = make(dtype)
            output = call.run({name: t.to("cuda") for name, t in call.leaves.items()}, "reference")
        assert output.dtype == call.dtype == dtype and output.numel() > 2**13


def test_every_operator_has_large_cases():
    assert set(large.CALLS) == set(_backend.SUPPORTS) == set(named.CASES)
    assert all(large.CALLS.values())


@pytest.mark.parametrize("name", large.RESIDENT)
def test_the_resident_block_takes_its_cases_on_an_h100(name, monkeypatch):
    monkeypatch.setattr(_backend, "shared_memory", lambda _: H100)
    monkeypatch.setattr(_backend, "absence", lambda _: None)
    case = large.RESIDENT[name]
    for dtype in _backend.CUDA_DTYPES:
        with FakeTensorMode():
            x0, layers = inputs(case, dtype)
            parameters = [LayerParameters(**layer) for layer in layers]
            assert resident.limit(x0, parameters, case.config, "cuda") is None


def test_a_check_with_one_run_sees_a_wrong_result():
    """`check_once`, which large cases are held to: the kernels of the processor pass, and not with a filter changed."""
    call = large.CALLS["dense_conv2d"]["above-48-KiB-with-the-tables"](torch.float32)
    named.check_once(call, "cpu")

    def run(leaves, backend):
        return call.run({**leaves, "weight": leaves["weight"] * (1 + 1e-3 * (backend == "cpu"))}, backend)

    with pytest.raises(AssertionError, match="output"):
        named.check_once(call._replace(run=run), "cpu")


@pytest.mark.parametrize("group", ["attention", "dense_sum", "dense_conv2d", "dnl_layer", "dense_linear"])
def test_benchmarks_of_a_gpu_are_legal_calls(group, monkeypatch):
    """At the sizes of a GPU, on fake CUDA tensors: each way's forward pass. A backend may refuse a size, which becomes
    a line of the page, but not all."""
    monkeypatch.setattr(groups, "GPU", True)
    monkeypatch.setattr(groups, "DEVICE", "cuda")
    monkeypatch.setattr(groups, "OWN", ("cuda", "triton"))
    monkeypatch.setattr(groups, "compiled", lambda function: function)
    triangle = groups._triangle  # of 64 layers it has thousands of sums
    monkeypatch.setattr(groups, "_triangle", lambda layers, *rest: triangle(8, *rest))
    monkeypatch.setattr(_backend, "shared_memory", lambda _: H100)
    monkeypatch.setattr(_backend, "absence", lambda _: None)
    seen = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case, _ in groups.GROUPS[group]():
            for name, way in case.ways.items():
                # torch's own attention kernels ask a real device.
                if not isinstance(way, str) and not name.startswith(("sdpa ", "flex")) and refused(way.call) is None:
                    seen.add(name)
    own = {"ours"} if group == "attention" else {b for b in ("cuda", "triton") if b in _backend.SUPPORTS[group]}
    assert own < seen
