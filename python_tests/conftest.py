"""What every test runs under: a seed from its own name, and freshly allocated memory full of NaN."""

import os
import zlib

import pytest
import torch

from dnl_kernels import _backend, _extension

# Compiled graphs of an earlier version of the package would be taken for today's: what an operator's fake returns is
# not part of their key.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}


# Files of minutes that few tests make. Processes that share the suite by files take them first, and end together.
LONG = (
    "test_examples", "test_resume", "test_data_parallel", "test_training", "test_learning", "test_gate", "test_docs",
    "test_widths", "test_gpu_day", "test_onnx", "test_tools", "test_dnl_block", "test_budget", "test_structured",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def seed(request):
    """From the test's name; DNL_TEST_SEED (default 0) is added, for other draws of every test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("DNL_TEST_SEED", "0")))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty, in Python and in the kernels, returns NaN: a result that was never written cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_shortcuts(monkeypatch):
    """The kernels run, however few numbers there are. test_contracts.py is about the shortcuts."""
    monkeypatch.setattr(_backend, "FEW", -1)


@pytest.fixture(params=_extension._C.isa_levels() if _extension._C else [])
def isa(request):
    """Runs the test once per instruction-set level of this processor."""
    before = _extension._C.isa()
    _extension._C.set_isa(request.param)
    yield request.param
    _extension._C.set_isa(before)


@pytest.fixture
def levels():
    """A function that goes through the instruction-set levels of this processor, for tests whose bounds, or whose
    expected numbers, are the same on all of them: `for level in levels()`."""
    before = _extension._C.isa()

    def each():
        for level in _extension._C.isa_levels():
            _extension._C.set_isa(level)
            yield level

    yield each
    _extension._C.set_isa(before)
