"""How torch multiplies float32 on a GPU, for tests and benchmarks that state it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, matrices and convolutions of float32 are multiplied as tf32, or as float32.

    cudnn's own switch is on by default: without this, eager convolutions, the baseline of every budget, are a thousand
    times as wrong as float32's. Set by the older of torch's two interfaces, which sets the newer one too; the other way
    round, torch refuses to tell the older one, which its own compiler reads."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn  # whose stubs lack the newer interface
    before = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
