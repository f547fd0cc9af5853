"""Where the tests of this folder run: on a CUDA device, or, as a rehearsal, on the processor.

DNL_GPU_TESTS=emulated rehearses: the CUDA sources in the emulator, and, in a process started with TRITON_INTERPRET=1,
the Triton kernels in the interpreter. What only a device has (streams, graphs, gigabytes) is skipped then, and says so.
"""

import os

import pytest
import torch

from dnl_kernels import _backend
from dnl_kernels.testing.operators import operators

EMULATED = os.environ.get("DNL_GPU_TESTS") == "emulated"
DEVICE = "cpu" if EMULATED else "cuda"
if EMULATED:
    from dnl_kernels.testing import cuda_emulator

    cuda_emulator.install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from dnl_kernels.testing import triton_interpreter

        triton_interpreter.install()
elif not torch.cuda.is_available():
    pytest.skip("no CUDA device here: nothing in this file was run", allow_module_level=True)


def _runs(backend: str, support: _backend.Support) -> bool:
    if not EMULATED:
        return "cuda" in support.devices
    return backend == "cuda_emulated" or (backend == "triton" and "cpu" in support.devices)


PAIRS = [(op, b) for op, supports in _backend.SUPPORTS.items() for b, s in supports.items() if _runs(b, s)]
CUDA = "cuda_emulated" if EMULATED else "cuda"
OPERATORS = {op.name: op for op in operators()}
every_pair = pytest.mark.parametrize("op, backend", PAIRS, ids=["-".join(pair) for pair in PAIRS])
every_cuda_dtype = pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
of_a_device = pytest.mark.skipif(EMULATED, reason="a rehearsal: the emulator has neither streams, graphs nor gigabytes")


def parameters(table):
    """One test for each pair of operator and backend, case of the table and dtype."""
    found = [
        pytest.param(make, backend, dtype, id=f"{op}-{backend}-{name}-{str(dtype).removeprefix('torch.')}")
        for op, backend in PAIRS
        for name, make in table.get(op, {}).items()
        for dtype in _backend.SUPPORTS[op][backend].dtypes
        if dtype != torch.float64
    ]
    return pytest.mark.parametrize("make, backend, dtype", found)


def on_device(op, dtype=torch.float32):
    return [leaf.to(DEVICE).requires_grad_() for leaf in OPERATORS[op].leaves(dtype, 2)]
