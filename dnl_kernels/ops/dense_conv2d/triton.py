"""dense_conv2d in Triton: the implicit GEMM of _triton_conv.py on images."""

from __future__ import annotations

from ..._triton_conv import dense_bwd, dense_fwd


def dense_conv2d_fwd(*arguments):
    return dense_fwd(*arguments, last=False)


def dense_conv2d_bwd(*arguments):
    return dense_bwd(*arguments, last=False)
