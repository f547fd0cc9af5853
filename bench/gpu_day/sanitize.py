"""A small call of every CUDA kernel, forward and backward, for compute-sanitizer; on the emulator in a rehearsal.

`python_tests/cuda_backend/test_gpu_day.py` holds the list against the kernels of the library: none is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import torch

import dnl_kernels as dnl
from dnl_kernels import _backend
from dnl_kernels.testing import dense_conv2d, dense_sum, dnl_block, dnl_layer, named
from dnl_kernels.testing.precision import float32_products

EMULATED = os.environ.get("DNL_GPU_TESTS") == "emulated"
DEVICE, BACKEND = ("cpu", "cuda_emulated") if EMULATED else ("cuda", "cuda")
SUMS = [  # images, one weight, tokens in packs and one element at a time
    dense_sum.Case((2, 8, 4, 8), 3, 1), dense_sum.Case((3, 7, 13), 5), dense_sum.Case((4, 9, 64), 3, -1),
    dense_sum.Case((2, 9, 35), 4, -1),
]  # fmt: skip
CONVOLUTIONS = [  # each width of the outputs, 1x1, bands, several images in a tile, more tiles than one trip takes
    dense_conv2d.Case(2, (12, 6), 14, 14, 6), dense_conv2d.Case(3, (12, 6, 6), 8, 8, 12),
    dense_conv2d.Case(2, (3, 2), 41, 67, 7, activation="tanh"), dense_conv2d.Case(2, (16,), 8, 8, 24),
    dense_conv2d.Case(2, (7, 19), 6, 11, 9, size=1),
]  # fmt: skip
_ATTENDS = dnl_layer.Case((8, 8), (6, 8), 8, size=1, heads=2, preactivation=True, output_norm=True)
LAYERS = [*(_ATTENDS._replace(kernel=kernel) for kernel in ("softmax", "gaussian", "dot")),
          dnl_layer.Case((70,), (8, 8), 16, kernel="softmax", skip=True, activation="silu")]  # fmt: skip


def _resident(growth: int, size: int) -> dnl_block.Case:
    dense = tuple((True,) * (layer + 1) for layer in range(3))
    config = {"in_channels": 12, "num_layers": 3, "growth_rate": growth, "connectivity": dense}
    return dnl_block.Case(dnl_block._config(**config), (size, size), 3)


BLOCKS = [_resident(6, 8), _resident(12, 8), _resident(24, 4)]


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done, and how."""
    for case in SUMS:
        yield f"dense_sum {case}", lambda c=case: _both(named._dense_sum(c, dtype))
    for case in CONVOLUTIONS:
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            yield f"dense_conv2d tf32={tf32} {case}", lambda c=case, t=tf32: _convolve(c, dtype, t)
    yield "dense_conv2d moments", lambda: _moments(CONVOLUTIONS[0], dtype)
    for layer in LAYERS:
        yield f"dnl_layer {layer}", lambda c=layer: _both(named._dnl_layer(c, dtype))
    for block in BLOCKS:
        yield f"dnl_block {block.config.growth_rate}", lambda c=block: _block(c, dtype)


def _both(call: named.Call) -> object:
    return named.gradients(call, {n: t.to(DEVICE) for n, t in call.leaves.items()}, BACKEND)


def _convolve(case: dense_conv2d.Case, dtype: torch.dtype, tf32: bool) -> object:
    with float32_products(tf32):
        return _both(named._dense_conv2d(case, dtype))


def _moments(case: dense_conv2d.Case, dtype: torch.dtype) -> object:
    parameters, states = dense_conv2d.inputs(case, dtype, DEVICE)
    return _backend.kernel(BACKEND, "dense_conv2d_moments_fwd")(states, *parameters, case.activation, case.scale)


def _block(case: dnl_block.Case, dtype: torch.dtype) -> object:
    x0, layers = dnl_block.inputs(case, dtype)
    given = [dnl.LayerParameters(**{n: t.to(DEVICE) for n, t in layer.items()}) for layer in layers]
    with torch.no_grad():
        return dnl.dnl_block(x0.to(DEVICE), given, case.config, backend=BACKEND)


def main() -> int:
    if EMULATED:
        from dnl_kernels.testing import cuda_emulator

        cuda_emulator.install()
    failures = 0
    for dtype in _backend.CUDA_DTYPES:
        for name, call in calls(dtype):
            torch.manual_seed(0)
            try:
                call()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                print(f"ok {dtype} {name}", flush=True)
            except Exception as error:
                failures += 1
                print(f"FAILED {dtype} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
