"""Tests of the Triton kernels by interpretation: a process of their own, started with TRITON_INTERPRET=1.

Triton decides at import whether to interpret, so the rest of the suite leaves this folder out; `make test` runs both.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from dnl_kernels.testing import triton_interpreter

    triton_interpreter.install()


@pytest.fixture
def sparse_memory(tmp_path):
    """A function (elements, dtype) -> tensor of zeros in a file of holes: only the pages that are touched exist."""

    def allocate(elements, dtype):
        path = tmp_path / "holes"
        with open(path, "wb") as file:
            file.truncate(elements * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)

    return allocate
