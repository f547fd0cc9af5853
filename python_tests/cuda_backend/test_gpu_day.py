"""What compute-sanitizer is shown on a GPU: a call of every CUDA kernel of the library, run here in the emulator."""

import os
import subprocess
import sys

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


@pytest.mark.usefixtures("emulated")
def test_the_tests_of_a_gpu_run_in_the_emulator():
    """All of them are collected; those run that reach what no other test calls. `make gpu-day GPU_DAY=--rehearse` runs
    them all."""
    chosen = (
        "(beyond and dense_sum-cuda) or (moments and seven) or every_operator or (opcheck and dnl_block and float16)"
    )
    environment = {**os.environ, "DNL_GPU_TESTS": "emulated", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "python_tests/gpu", "-p", "no:cacheprovider", "-rA"]
    run = subprocess.run([*command, "-k", chosen], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    assert run.stdout.count("PASSED") >= 7 and "deselected" in run.stdout, run.stdout[-4000:]
