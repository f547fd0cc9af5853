"""What compute-sanitizer is shown on a GPU: a call of every CUDA kernel of the library, run here in the emulator."""

import pytest
import torch

from bench.gpu_day import sanitize
from dnl_kernels import _backend
from dnl_kernels.testing.cuda_gate import BUDGETS


def test_every_kernel_is_called(emulated, monkeypatch):
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    monkeypatch.setattr(sanitize, "BACKEND", "cuda_emulated")
    emulated.launched()
    for _, call in sanitize.calls(torch.float16):
        call()
    assert {f"{name}_kernel" for name in emulated.launched()} == set(BUDGETS)


@pytest.mark.parametrize("dtype", _backend.CUDA_DTYPES, ids=str)
def test_every_call_has_a_name_of_its_own(dtype):
    names = [name for name, _ in sanitize.calls(dtype)]
    assert len(set(names)) == len(names) > 10
