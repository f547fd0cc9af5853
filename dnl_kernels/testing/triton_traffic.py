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

from . import roofline
from .triton_gate import DTYPES, write

HEADER = "Computed by interpretation, not measured on a GPU."
ABOUT = (
    "Requested: bytes that the instructions ask for. MFLOP: of the matrix products, with the padding of tiles. Floor: "
    f"{roofline.SOURCE}, of these operations and of the sectors touched, each once."
)


class Row(NamedTuple):
    """One call: bytes requested by its kernels, bytes of the formula that it is held to (`least`, named by `formula`),
    and the greatest ratio of the two that is allowed. once: bytes of the sectors touched, each once per direction;
    flops: of the kernels' matrix products."""

    operator: str
    case: str
    dtype: str
    direction: str
    formula: str
    launches: int
    requested: int
    least: int
    bar: float
    once: int
    flops: int

    def floors(self) -> dict[str, float]:
        """Microseconds by device below which no kernel of these sizes can stay."""
        return roofline.floors(self.once, self.flops, self.dtype == "fp32")

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
    requested, once = count.requested + outside, count.unique_sector_bytes + outside
    return Row(operator, case, name, direction, formula, count.launches, requested, least, bar, once, count.flops)


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


class Dense(NamedTuple):
    """The bytes that the tiles of a dense accumulation need: states once per tap of the filter and tile of outputs, the
    weight, bias, and norm once per tile of pixels. size: bytes of an element; wide: of a gradient that is added to."""

    pixels: int
    states: tuple[int, ...]  # their channels
    outputs: int
    taps: int
    size: int
    norm_size: int

    def tiles(self, kernel: str) -> tuple[int, int, int]:
        from .. import _triton_conv as conv

        t = conv.TILES[kernel][self.size]
        columns = conv.power_of_two(max(self.states), 16, t.columns)
        return -(-self.pixels // t.rows), -(-self.outputs // t.columns), sum(-(-c // columns) for c in self.states)

    @property
    def channels(self) -> int:
        return sum(self.states)

    @property
    def weight(self) -> int:
        return self.channels * self.outputs * self.taps

    def forward(self, bias_size: int, moments: bool = False) -> int:
        tiles, columns, _ = self.tiles("accumulate")
        read = columns * self.taps * self.channels * (self.pixels * self.size + tiles * 2 * self.norm_size)
        read += tiles * (self.weight * self.size + self.outputs * bias_size)
        return read + self.pixels * self.outputs * self.size + moments * tiles * 2 * self.outputs * 4

    def pull(self, wide: int = 0) -> int:
        tiles, _, chunks = self.tiles("pull")
        read = chunks * self.taps * self.pixels * self.outputs * self.size + tiles * self.weight * self.size
        read += self.pixels * self.channels * (self.size + wide) + tiles * self.channels * 3 * self.norm_size
        return read + self.pixels * self.channels * (wide or self.size) + tiles * 2 * self.channels * 4

    def weight_gradient(self) -> int:
        from .. import _triton_conv as conv

        step, (_, columns, chunks) = conv.TILES["weight"][self.size].step, self.tiles("weight")
        steps = -(-self.pixels // step)
        splits = min(steps, max(conv.SPLITS // (chunks * columns * self.taps), 1))
        splits = -(-steps // -(-steps // splits))
        read = columns * self.taps * self.channels * (self.pixels * self.size + steps * 2 * self.norm_size)
        return read + chunks * self.taps * self.pixels * self.outputs * self.size + splits * self.weight * 4


TILED = "tensors once per tap, weights once per tile"


def _dense_rows(
    operator: str, case: str, dtype: torch.dtype, shape, channels, outputs: int, size: int
) -> Iterator[Row]:
    from .. import _triton_conv as conv

    last = operator == "dense_linear"
    states = [torch.zeros((*shape, c) if last else (shape[0], c, *shape[1:]), dtype=dtype) for c in channels]
    total = sum(channels)
    weight = torch.ones((outputs, total) if last else (outputs, total, size, size), dtype=dtype)
    vector, bias = torch.ones(total, dtype=dtype), torch.ones(outputs, dtype=dtype)
    static: Any = (vector, vector.clone(), "relu", 1.0)
    pixels = states[0].numel() // channels[0]
    dense = Dense(pixels, channels, outputs, size * size, dtype.itemsize, dtype.itemsize)

    def forward():
        return conv.dense_fwd(states, weight, bias, *static, last=last)

    def backward():
        arguments: Any = (y, states, weight, *static, True, True, False, True)
        conv.dense_bwd(*arguments, last=last)

    y = forward()
    yield measure(operator, case, "forward", dtype, forward, dense.forward(dtype.itemsize), 1.05, TILED)
    yield measure(operator, case, "backward", dtype, backward, dense.pull() + dense.weight_gradient(), 1.05, TILED)


def dense_linear_rows() -> Iterator[Row]:
    for dtype in DTYPES.values():
        yield from _dense_rows("dense_linear", "64 + 64 -> 64", dtype, (2, 128), (64, 64), 64, 1)


def dense_conv2d_rows() -> Iterator[Row]:
    yield from _dense_rows("dense_conv2d", "1x1 64 + 32 -> 128", torch.bfloat16, (2, 8, 8), (64, 32), 128, 1)
    for dtype in DTYPES.values():
        yield from _dense_rows("dense_conv2d", "3x3 32 + 16 -> 16", dtype, (1, 8, 16), (32, 16), 16, 3)


def dnl_layer_rows() -> Iterator[Row]:
    """The fused layer against the sequence of operators that equation (1) names, each with its result in memory:
    accumulate, project to query, key and value, attend, project, normalise and activate, copy into the slot. A
    pre-activation layer also normalises and activates its states first. torch's part is counted by its tensors."""
    from .._triton_conv import dense_fwd
    from ..ops.dnl_layer import triton as layer
    from ..ops.dnl_layer.config import LayerConfig
    from ..ops.nonlocal_attention import triton as attention

    B, N = 2, 128
    for case, kernel, states_count, G, preactivation, dtype in (
        ("softmax 1 state of 64", "softmax", 1, 64, False, torch.bfloat16),
        ("softmax 4 states of 32", "softmax", 4, 32, True, torch.bfloat16),
        ("gaussian 4 states of 32", "gaussian", 4, 32, True, torch.bfloat16),
        ("softmax 4 states of 32", "softmax", 4, 32, True, torch.float32),
    ):
        C = states_count * G
        buffer = torch.zeros(B, N, C + G, dtype=dtype)
        states, slot = list(buffer[..., :C].split(G, -1)), buffer[..., C:]
        square, vector = torch.ones(G, G, dtype=dtype), torch.ones(G, dtype=dtype)
        gain = torch.ones(C, dtype=dtype) if preactivation else None
        given = dict.fromkeys(layer.PARAMETERS) | {
            "affine_weight": torch.ones(G, C, dtype=dtype), "affine_bias": vector, "norm_scale": gain,
            "norm_shift": gain, "query_weight": square, "value_weight": square, "output_weight": square,
            "output_scale": vector, "output_shift": vector,
            **({"rho": vector[:1]} if kernel == "gaussian" else {"key_weight": square}),
        }  # fmt: skip
        p = layer.Parameters(**given)
        config = LayerConfig(kernel, "relu", 1.0, "relu" if preactivation else "identity", 1, False)
        bandwidth = None if kernel == "softmax" else torch.ones(1)

        def fused(states=states, slot=slot, p=p, config=config):
            layer.layer_into(layer._Call(states, None, p, config), slot)

        def unfused(states=states, p=p, config=config, bandwidth=bandwidth):
            plain: Any = (None, None, "identity", 1.0)
            y = dense_fwd(states, p.affine_weight, p.affine_bias, *plain, last=True)
            weights = [p.query_weight, p.key_weight, p.value_weight]
            parts = [dense_fwd([y], w, None, *plain, last=True)[:, None] for w in weights if w is not None]
            static: Any = (1.0, True, False, False)
            out, *_ = attention.nonlocal_attention_fwd(parts[0], parts[-2], parts[-1], bandwidth, None, *static)
            dense_fwd([out[:, 0]], p.output_weight, None, *plain, last=True)

        pointwise = 4 * nbytes(slot) + (2 * B * N * C * dtype.itemsize if preactivation else 0)
        sequence = measure("dnl_layer", case, "forward", dtype, unfused, 1, 0.5, outside=pointwise)
        yield measure(
            "dnl_layer", case, "forward", dtype, fused, sequence.requested, 0.5,
            f"the unfused sequence, {sequence.launches} launches",
        )  # fmt: skip


def dnl_block_rows() -> Iterator[Row]:
    """Forward: every layer as dense_conv2d with its statistics. Backward: with a float32 gradient that is added to."""
    from ..ops.dnl_block import triton as block

    in_channels, growth, layers, shape = 16, 16, 2, (1, 8, 16)
    connectivity = [1] * (layers * (layers + 1) // 2)
    for dtype in DTYPES.values():
        x0 = torch.randn(shape[0], in_channels, *shape[1:]).to(dtype)
        dense = [
            Dense(x0.numel() // in_channels, (in_channels + i * growth,), growth, 9, dtype.itemsize, 4)
            for i in range(layers)
        ]
        weight = torch.ones(sum(d.weight for d in dense))
        gamma, bias = torch.ones(sum(d.channels for d in dense)), torch.ones(growth * layers)
        static: Any = (connectivity, growth, 3, True, True, True, "relu", 1.0, 1e-5)

        def forward(x0=x0, weight=weight, bias=bias, gamma=gamma, static: Any = static):
            return block.dnl_block_fwd(x0, weight, bias, gamma, gamma, None, None, *static)

        states, mean, var, outputs = forward()

        def backward(states=states, weight=weight, bias=bias, gamma=gamma, rest=(mean, var), static: Any = static):
            block.dnl_block_bwd(states, states, states[:, :0], weight, bias, gamma, gamma, *rest, *static)

        least = sum(d.forward(4, True) for d in dense)
        yield measure("dnl_block", "2 layers 3x3", "forward", dtype, forward, least, 1.05, TILED)
        least = sum(d.pull(4) + d.weight_gradient() for d in dense)
        yield measure("dnl_block", "2 layers 3x3", "backward", dtype, backward, least, 1.05, TILED)


CASES: dict[str, Callable[[], Iterator[Row]]] = {
    "dense_sum": dense_sum_rows,
    "nonlocal_attention": nonlocal_attention_rows,
    "dense_linear": dense_linear_rows,
    "dense_conv2d": dense_conv2d_rows,
    "dnl_layer": dnl_layer_rows,
    "dnl_block": dnl_block_rows,
}
COLUMNS = (
    *("operator", "case", "dtype", "direction", "launches", "requested", "least", "ratio", "bar", "least is", "MFLOP"),
    *(f"floor on {device}, us" for device in roofline.DEVICES),
)


def rows(operators: list[str] | None = None) -> list[Row]:
    return [row for operator in operators or CASES for row in CASES[operator]()]


def table(found: list[Row]) -> str:
    """The report as a Markdown table."""
    cells = [
        (
            *(r.operator, r.case, r.dtype, r.direction, r.launches, r.requested, r.least, f"{r.ratio:.3f}", r.bar),
            *(r.formula, f"{r.flops / 1e6:.3g}", *(f"{floor:.2f}" for floor in r.floors().values())),
        )
        for r in found
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operators", nargs="*", choices=[[], *CASES])
    parser.add_argument("--markdown", help="also write the table to this file")
    arguments = parser.parse_args()
    found = rows(arguments.operators or None)
    text = f"# Triton kernels: memory traffic\n\n{HEADER}\n\n{ABOUT}\n\n{table(found)}\n"
    print(text)
    if arguments.markdown:
        write(arguments.markdown, text)
    faults = [fault for row in found if (fault := row.fault())]
    print("\n".join(faults) or "every kernel is within its bar")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
