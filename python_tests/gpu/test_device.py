"""The device that `make test-gpu` runs on; the reason when there is none."""

import pytest
import torch

from dnl_kernels.testing.sass import MULTIPROCESSORS


def test_there_is_a_gpu_that_the_kernels_were_compiled_and_checked_for():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: nothing in this folder was run")
    major, minor = torch.cuda.get_device_capability()
    assert 10 * major + minor in MULTIPROCESSORS, torch.cuda.get_device_name()
