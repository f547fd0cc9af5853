"""What the Triton kernels of all operators share: the target, precision, and views of states as rows.

Imported by ops/<op>/triton.py only, that is, when that backend is first used.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._backend import allows_tf32

VECTOR = 16  # bytes of the widest access of a thread
TABLE_LENGTHS = (8, 64)  # how many tensors one launch writes into a pointer table


def architecture() -> int:
    """The compute capability of the current device, as 10 * major + minor."""
    if triton.knobs.runtime.interpret:
        return 80
    return triton.runtime.driver.active.get_current_target().arch


def dot_precision() -> str:
    """How float32 matrices are multiplied: in tf32 only where the user allowed it."""
    return "tf32" if allows_tf32(torch.float32) else "ieee"


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


def _row_stride(x: Tensor, split: int) -> int | None:
    """The distance between rows of x seen as [sizes before split, sizes from split on], rows contiguous; or None."""
    expected = 1
    for size, stride in zip(reversed(x.shape[split:]), reversed(x.stride()[split:]), strict=True):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    rows = [(size, stride) for size, stride in zip(x.shape[:split], x.stride()[:split], strict=True) if size != 1]
    if not rows:
        return expected
    if any(outer[1] != inner[0] * inner[1] for outer, inner in zip(rows, rows[1:], strict=False)):
        return None
    return rows[-1][1]


def as_rows(states: Sequence[Tensor], splits: Sequence[int]) -> tuple[int, list[Tensor], list[int]]:
    """The first of `splits` at which every state is a matrix of contiguous rows, the states, their row strides.

    A slice of a prefix buffer is one; what is not is copied, at the first split."""
    for split in splits:
        strides = [_row_stride(x, split) for x in states]
        if None not in strides:
            return split, list(states), strides  # type: ignore[return-value]
    split = splits[0]
    copies = [x if _row_stride(x, split) is not None else x.contiguous() for x in states]
    return split, copies, [_row_stride(x, split) for x in copies]  # type: ignore[misc]


def aligned(tensors: Sequence[Tensor], strides: Sequence[int]) -> bool:
    """Whether every row starts at a multiple of 16 bytes, so that 128-bit accesses are possible."""
    return all(
        x.data_ptr() % VECTOR == 0 and stride * x.element_size() % VECTOR == 0
        for x, stride in zip(tensors, strides, strict=True)
    )


AUTOTUNE = os.environ.get("DNL_TRITON_AUTOTUNE") == "1"


@functools.cache
def _tuned(kernel: Any) -> Any:
    """The kernel with warps and stages measured at the first call of every specialisation, kept in Triton's cache."""
    configurations = [triton.Config({}, num_warps=w, num_stages=s) for w in (4, 8) for s in (1, 2, 3)]
    facts = inspect.signature(kernel.fn).parameters
    key = [name for name, fact in facts.items() if "constexpr" in str(fact.annotation)]
    return triton.autotune(configurations, key, cache_results=True)(kernel)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def launch(kernel: Any, programs: int, *arguments, num_warps: int, num_stages: int, **constants) -> None:
    """kernel[programs](..): with the given warps and stages of the tables of tiles, or with measured ones (AUTOTUNE).

    The kernel must give the same when it runs again: it reads nothing that it writes. While a CUDA graph is captured
    nothing can be measured, as that waits for the device: the tables decide."""
    if AUTOTUNE and not _capturing():
        _tuned(kernel)[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def rows_and_columns(x: Tensor, split: int) -> tuple[int, int]:
    return math.prod(x.shape[:split]), math.prod(x.shape[split:])


@triton.jit(do_not_specialize=["TENSORS", "numbers", "count"])
def pointer_table_kernel(TENSORS, numbers, TABLE, first, count, COLUMNS: tl.constexpr):
    length: tl.constexpr = len(TENSORS)
    for j in tl.static_range(length):
        row = TABLE + (1 + COLUMNS) * (first + j)
        tl.store(row, TENSORS[j].to(tl.int64, bitcast=True), mask=j < count)
        for k in tl.static_range(COLUMNS):
            tl.store(row + 1 + k, numbers[k * length + j], mask=j < count)


def pointer_table(tensors: Sequence[Tensor], *columns: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[J, 1 + columns]: address of each tensor and its numbers (row stride, ..), for kernels that loop over J tensors.

    Written by a kernel that gets the addresses as its parameters: no copy from the host, so nothing waits and a CUDA
    graph can hold it; and the kernels that read the table compile once for every J."""
    table = torch.empty((len(tensors), 1 + len(columns)), dtype=torch.int64, device=device or tensors[0].device)
    for first in range(0, len(tensors), TABLE_LENGTHS[-1]):
        group = tensors[first : first + TABLE_LENGTHS[-1]]
        length = next(n for n in TABLE_LENGTHS if n >= len(group))
        more = length - len(group)
        addresses = (*group, *[group[-1]] * more)
        numbers = tuple(n for column in columns for n in (*column[first : first + length], *[0] * more))
        pointer_table_kernel[(1,)](addresses, numbers, table, first, len(group), len(columns), num_warps=1)
    return table


@triton.jit
def table_entry(TABLE, j, count, like):
    """The j-th tensor's address as a pointer like `like`, and its row stride."""
    address = tl.load(TABLE + 2 * j, mask=j < count, other=0)
    stride = tl.load(TABLE + 2 * j + 1, mask=j < count, other=0)
    return address.to(like.dtype, bitcast=True), stride
