"""Runs the kernels of self_test.cu, in this process or, under a sanitizer, as a program without torch:
`python self_test.py LIBRARY KERNEL BUG`. Every run answers None, what the emulator said, or "wrong result"."""

from __future__ import annotations

import array
import ctypes
import pathlib
import random
import struct
import sys

SOURCE = pathlib.Path(__file__).with_suffix(".cu")
BUGS = (
    "none out_of_bounds missing_barrier divergent_shuffle unwritten_output unreached_barrier wrong_wait "
    "missing_loop_barrier small_shared misaligned_row unwritten_shared misaligned_vector"
).split()  # in the order of the enumeration in self_test.cu


def load(library: str | pathlib.Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(library))
    names = "row_sum matmul fragments copies mma mma_tf32 strided static_and_dynamic"
    for name in names.split():
        getattr(kernels, f"run_{name}").restype = ctypes.c_char_p
    return kernels


def pointer(data: array.array) -> ctypes.c_void_p:
    return ctypes.c_void_p(data.buffer_info()[0])


def half(value: float, bfloat16: bool) -> int:
    """The 16 bits of the value, which has few enough digits to be exact."""
    if bfloat16:
        return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    return struct.unpack("<H", struct.pack("<e", value))[0]


def coarse(generator: random.Random) -> float:
    return generator.randrange(-64, 65) / 32  # exact in bfloat16 and float16, as are sums of products in float32


def row_sum(kernels, bug: str = "none", rows: int = 3, n: int = 1000) -> str | None:
    generator = random.Random(0)
    x = array.array("f", (coarse(generator) for _ in range(rows * n)))
    out, total = array.array("f", [float("nan")] * rows), array.array("f", [0.0])
    said = kernels.run_row_sum(pointer(x), pointer(out), pointer(total), rows, n, BUGS.index(bug))
    if said:
        return said.decode()
    exact = [sum(x[r * n : (r + 1) * n]) for r in range(rows)]
    return None if out.tolist() == exact and total[0] == sum(exact) else "wrong result"


def matmul(kernels, bug: str = "none", bfloat16: bool = True, m: int = 64, n: int = 128, k: int = 96) -> str | None:
    generator = random.Random(1)
    a = [[coarse(generator) for _ in range(k)] for _ in range(m)]
    b = [[coarse(generator) for _ in range(n)] for _ in range(k)]
    bits_a, bits_b = (array.array("H", (half(v, bfloat16) for row in x for v in row)) for x in (a, b))
    out = array.array("f", [float("nan")] * (m * n))
    said = kernels.run_matmul(pointer(bits_a), pointer(bits_b), pointer(out), m, n, k, int(bfloat16), BUGS.index(bug))
    if said:
        return said.decode()
    columns = list(zip(*b, strict=True))
    exact = [sum(p * q for p, q in zip(row, column, strict=True)) for row in a for column in columns]
    return None if out.tolist() == exact else "wrong result"


def run(kernels, kernel: str, bug: str) -> str | None:
    return {"row_sum": row_sum, "matmul": matmul}[kernel](kernels, bug)


if __name__ == "__main__":
    outcome = run(load(sys.argv[1]), sys.argv[2], sys.argv[3])
    print(outcome or "clean")
    sys.exit(outcome is not None)
