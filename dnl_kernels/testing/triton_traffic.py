"""Memory traffic of the Triton kernels, counted by the interpreter, against the least that the work needs.

`TRITON_INTERPRET=1 python -m dnl_kernels.testing.triton_traffic` (part of make cuda-check) prints the table and fails
if a kernel requests more than its bar allows. Bytes are those that the kernels' instructions ask for: what a cache
would serve counts as well. Another operator adds one function to CASES.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_gate import DTYPES, write

HEADER = "Computed by interpretation, not measured on a GPU."


class Row(NamedTuple):
    """One call: bytes requested by its kernels, bytes of the formula that it is held to (`least`, named by `formula`),
    and the greatest ratio of the two that is allowed."""

    operator: str
    case: str
    dtype: str
    direction: str
    formula: str
    launches: int
    requested: int
    least: int
    bar: float

    @property
    def ratio(self) -> float:
        return self.requested / self.least

    def fault(self) -> str | None:
        if self.ratio <= self.bar:
            return None
        return f"{self.operator} {self.case} {self.dtype} {self.direction}: {self.ratio:.3f} exceeds {self.bar}"


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    operator: str,
    case: str,
    direction: str,
    dtype: torch.dtype,
    call: Callable[[], object],
    least: int,
    bar: float,
    formula: str = "every tensor once",
    outside: int = 0,
) -> Row:
    """Runs `call` and counts. outside: bytes that torch's own kernels move within the call, unseen by the counter."""
    from .triton_interpreter import install, traffic

    install()
    with traffic() as count:
        call()
    name = next(n for n, d in DTYPES.items() if d == dtype)
    return Row(operator, case, name, direction, formula, count.launches, count.requested + outside, least, bar)


def dense_sum_rows() -> Iterator[Row]:
    from ..ops.dense_sum import triton as kernels

    for case, weight_shape, dim in (("one weight", (6,), 0), ("tokens", (6, 64), 2), ("images", (6, 128), 1)):
        for dtype in DTYPES.values():
            states = [torch.zeros(2, 128, 64, dtype=dtype) for _ in range(6)]
            weight = torch.ones(weight_shape, dtype=dtype)
            size = nbytes(states[0])

            def forward(states=states, weight=weight, dim=dim):
                kernels.dense_sum_fwd(states, weight, dim)

            def backward(states=states, weight=weight, dim=dim):
                kernels.dense_sum_bwd(states[0], states, weight, dim, True, True)

            yield measure("dense_sum", case, "forward", dtype, forward, 7 * size + nbytes(weight), 1.02)
            yield measure("dense_sum", case, "backward", dtype, backward, 13 * size + 2 * nbytes(weight), 1.10)


def nonlocal_attention_rows() -> Iterator[Row]:
    """Forward: queries and the output once, the rows' shift and sum, keys and values once per tile of queries."""
    from ..ops.nonlocal_attention import triton as kernels

    B, N = 1, 256
    for case, D, dtype, channels_first in (
        ("softmax D64", 64, torch.bfloat16, False),
        ("softmax D64", 64, torch.float32, False),
        ("channels-first D128", 128, torch.bfloat16, True),
        ("softmax D256", 256, torch.bfloat16, False),
    ):
        x = torch.zeros((B, 1, D, N) if channels_first else (B, 1, N, D), dtype=dtype)
        static: Any = (1.0, True, False, channels_first)
        rows = torch.zeros(B, 1, N)
        size, row = nbytes(x), nbytes(rows)
        tiles = [kernels.config(name, dtype.itemsize, D) for name in ("forward", "query", "key")]
        passes = [-(-N // n) for n in (tiles[0].queries, tiles[1].queries, tiles[2].keys)]

        def forward(x=x, static: Any = static):
            kernels.nonlocal_attention_fwd(x, x.clone(), x.clone(), None, None, *static)

        def backward(x=x, rows=rows, static: Any = static):
            arguments: Any = (x, x, x, x, None, None, x, rows, rows + 1, *static, False)
            kernels.nonlocal_attention_bwd(*arguments)

        flash = 2 * size + 2 * row + passes[0] * 2 * size
        yield measure("nonlocal_attention", case, "forward", dtype, forward, flash, 1.05, "flash formula of the tiles")
        # By query: q, dout, out, dq, shift, sum, drift once, k and v per tile; by key: k, v, dk, dv once, q, dout, and
        # three numbers per row for each tile.
        flash = 4 * size + 3 * row + passes[1] * 2 * size + 4 * size + passes[2] * (2 * size + 3 * row)
        yield measure(
            "nonlocal_attention", case, "backward", dtype, backward, flash, 1.05, "flash formula of the tiles"
        )


CASES: dict[str, Callable[[], Iterator[Row]]] = {
    "dense_sum": dense_sum_rows,
    "nonlocal_attention": nonlocal_attention_rows,
}
COLUMNS = ("operator", "case", "dtype", "direction", "launches", "requested", "least", "ratio", "bar", "least is")


def rows(operators: list[str] | None = None) -> list[Row]:
    return [row for operator in operators or CASES for row in CASES[operator]()]


def table(found: list[Row]) -> str:
    """The report as a Markdown table."""
    cells = [
        (r.operator, r.case, r.dtype, r.direction, r.launches, r.requested, r.least, f"{r.ratio:.3f}", r.bar, r.formula)
        for r in found
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operators", nargs="*", choices=[[], *CASES])
    parser.add_argument("--markdown", help="also write the table to this file")
    arguments = parser.parse_args()
    found = rows(arguments.operators or None)
    text = f"# Triton kernels: memory traffic\n\n{HEADER}\n\n{table(found)}\n"
    print(text)
    if arguments.markdown:
        write(arguments.markdown, text)
    faults = [fault for row in found if (fault := row.fault())]
    print("\n".join(faults) or "every kernel is within its bar")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
