"""dense_linear in Triton: the implicit GEMM of _triton_conv.py on rows of tokens."""

from __future__ import annotations

from ..._triton_conv import dense_bwd, dense_fwd


def dense_linear_fwd(*arguments):
    return dense_fwd(*arguments, last=True)


def dense_linear_bwd(*arguments):
    return dense_bwd(*arguments, last=True)
