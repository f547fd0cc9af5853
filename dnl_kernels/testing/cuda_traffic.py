"""Global-memory traffic of the CUDA C++ kernels, counted by the emulator, against the compulsory bytes; paper floors.

`python -m dnl_kernels.testing.cuda_traffic` prints the table. Bytes are those of the 32-byte sectors that each block of
threads touches, each once: what reaches the second-level cache when a block's own reuse stays inside. Everything is
computed; nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dnl_block import fused
from ..ops.dnl_block.config import BlockConfig, LayerParameters
from ..ops.dnl_layer import fused as layer_fused
from . import cuda_emulator, roofline
from .dense_conv2d import Case, inputs
from .dense_sum import Case as SumCase
from .dense_sum import inputs as sum_inputs
from .dnl_block import Case as BlockCase
from .dnl_block import inputs as block_inputs
from .dnl_layer import Case as LayerCase
from .dnl_layer import inputs as layer_inputs

HEADER = "Computed from the kernels' addresses, not measured on a GPU."


class Row(NamedTuple):
    kernel: str
    case: str
    dtype: torch.dtype
    compulsory: int  # bytes, each tensor once
    moved: int
    bar: float
    flops: float
    conflicts: int  # of ldmatrix
    banks: float  # conflicts of ordinary accesses to shared memory for each that a warp makes; NaN: not counted

    @property
    def ratio(self) -> float:
        return self.moved / self.compulsory

    def floors(self) -> dict[str, float]:
        """The time in microseconds below which no kernel of these sizes can stay."""
        return roofline.floors(self.compulsory, self.flops, self.dtype == torch.float32)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def count(emulator: cuda_emulator.Emulator, call: Callable) -> tuple[int, int, float]:
    """Bytes that the call moves, the bank conflicts of ldmatrix, and those of other accesses for each of them."""
    emulator.counts()
    with emulator.tracing():
        call()
    moved = sum(traffic.by_blocks for traffic in emulator.traffic_of(0, 1 << 62))
    counts = emulator.counts()
    banks = counts["shared_conflicts"] / counts["shared"] if counts["shared"] else float("nan")
    return moved, counts["ldmatrix_conflicts"], banks


CONV_CASES = {
    "32x32, 12 + 6 x 6 channels, growth 6": Case(2, (12, *[6] * 6), 32, 32, 6),
    "64x48, 32 channels, growth 8": Case(1, (32,), 64, 48, 8),
    "1x1, 32x32, 64 channels to 24": Case(2, (64,), 32, 32, 24, size=1),
}
CONV_BARS = {"fwd": 1.15, "bwd": 1.2}


def conv_rows(emulator: cuda_emulator.Emulator, dtype: torch.dtype, tf32: bool = False) -> list[Row]:
    ops, rows, kind_of = torch.ops.dnl_emulated, [], "dense_conv2d" + "_tf32" * tf32
    forward, backward = getattr(ops, f"{kind_of}_fwd"), getattr(ops, f"{kind_of}_bwd")
    for name, case in CONV_CASES.items():
        given, states = inputs(case, dtype)
        weight, bias, scale, shift = (t for t in given if t is not None)
        y = forward(states, weight, bias, scale, shift, "relu", 1.0)
        flops = 2.0 * size(y) / y.element_size() * weight[0].numel()
        parameters = [weight, bias, scale, shift]
        calls = {
            "fwd": lambda: forward(states, weight, bias, scale, shift, "relu", 1.0),  # noqa: B023
            "bwd": lambda: backward(
                y, states, weight, scale, shift, "relu", 1.0, True, True, True, True  # noqa: B023
            ),
        }  # fmt: skip
        compulsory = {
            "fwd": size(*states, y, *parameters),
            "bwd": 2 * size(*states, weight, scale, shift) + size(bias, y),
        }
        for kind, call in calls.items():
            moved, conflicts, banks = count(emulator, call)
            bar, work = CONV_BARS[kind], flops * (1 if kind == "fwd" else 2)
            rows.append(Row(f"{kind_of}_{kind}", name, dtype, compulsory[kind], moved, bar, work, conflicts, banks))
    return rows


BLOCK_CASES = {  # the resident block, in evaluation
    "8x8, 12 channels, 16 layers of growth 6": (8, 16),
    "16x16, 12 channels, 4 layers of growth 6": (16, 4),
}
BLOCK_BAR = 1.05


def block_rows(emulator: cuda_emulator.Emulator, dtype: torch.dtype) -> list[Row]:
    rows = []
    for name, (side, layers) in BLOCK_CASES.items():
        connectivity = tuple((True,) * (layer + 1) for layer in range(layers))
        config = BlockConfig(12, layers, 6, connectivity, norm=None)
        x0, tensors = block_inputs(BlockCase(config, (side, side), 1), dtype)
        parameters = [LayerParameters(**layer) for layer in tensors]
        packed = fused.pack(config, x0, parameters, torch.float32)
        packed = packed._replace(weight=packed.weight.to(dtype))
        call = lambda: torch.ops.dnl_emulated.dnl_block_resident(x0, *packed, *fused.static_arguments(config))  # noqa: B023, E731
        states = call()
        compulsory = size(x0, states, *(t for t in packed if t is not None))
        moved, conflicts, banks = count(emulator, call)
        flops = 2.0 * side * side * packed.weight.numel()
        rows.append(Row("dnl_block_fwd", name, dtype, compulsory, moved, BLOCK_BAR, flops, conflicts, banks))
    return rows


SUM_CASES = {"5 x [4, 6, 16, 16], a weight for each state": None, "5 x [4, 6, 16, 16], for each channel": 1}
SUM_BARS = {"fwd": 1.02, "bwd": 1.1}


def sum_rows(emulator: cuda_emulator.Emulator, dtype: torch.dtype) -> list[Row]:
    ops, rows = torch.ops.dnl_emulated, []
    for name, channel_dim in SUM_CASES.items():
        weight, states = sum_inputs(SumCase((4, 6, 16, 16), 5, channel_dim), dtype)
        y = ops.dense_sum_fwd(states, weight, channel_dim or 0)
        calls = {
            "fwd": lambda: ops.dense_sum_fwd(states, weight, channel_dim or 0),  # noqa: B023
            "bwd": lambda: ops.dense_sum_bwd(y, states, weight, channel_dim or 0, True, True),  # noqa: B023
        }
        compulsory = {"fwd": size(*states, y, weight), "bwd": 2 * size(*states, weight) + size(y)}
        for kind, call in calls.items():
            moved, conflicts, banks = count(emulator, call)
            flops = 2.0 * len(states) * y.numel() * (1 if kind == "fwd" else 2)
            rows.append(
                Row(f"dense_sum_{kind}", name, dtype, compulsory[kind], moved, SUM_BARS[kind], flops, conflicts, banks)
            )
    return rows


LAYER_CASES = {  # a sample each; backward, the states are read twice and nothing else was kept
    "softmax, 8x8, 8 + 16 channels to 8, 2 heads of 3": LayerCase((8, 8), (8, 16), 8, 1, "softmax", 2, batch=1),
    "gaussian, 100 tokens, 8 + 16 channels to 8, 1 head of 3": LayerCase((100,), (8, 16), 8, 1, "gaussian", batch=1),
}
LAYER_BARS = {"fwd": 1.15, "bwd": 1.45}


def layer_rows(emulator: cuda_emulator.Emulator, dtype: torch.dtype) -> list[Row]:
    ops, rows = torch.ops.dnl_emulated, []
    for name, case in LAYER_CASES.items():
        states, tensors = layer_inputs(case, dtype)
        named = {n.removeprefix("theta."): t for n, t in tensors.items()}
        given = (states, None, *(named.get(n) for n in layer_fused.PARAMETERS))
        static = (case.kernel, case.activation, case.tau, "identity", case.heads, case.residual)
        y = ops.dnl_layer_fwd(*given, *static)
        calls = {
            "fwd": lambda: ops.dnl_layer_fwd(*given, *static),  # noqa: B023
            "bwd": lambda: ops.dnl_layer_bwd(y, *given, *static, True, True),  # noqa: B023
        }
        compulsory = {"fwd": size(*states, y, *named.values()), "bwd": 2 * size(*states, *named.values()) + size(y)}
        positions, inner = y.numel() / case.width, 3 * case.heads
        weights = sum(t.numel() for t in named.values() if t.dim() > 1)
        flops = 2 * positions * (weights + 2 * positions * inner)
        for kind, call in calls.items():
            moved, conflicts, banks = count(emulator, call)
            work = flops * (1 if kind == "fwd" else 3)
            rows.append(
                Row(f"dnl_layer_{kind}", name, dtype, compulsory[kind], moved, LAYER_BARS[kind], work, conflicts, banks)
            )
    return rows


def rows(emulator: cuda_emulator.Emulator) -> list[Row]:
    found = [row for dtype in (torch.bfloat16, torch.float32) for make in (sum_rows, conv_rows, layer_rows, block_rows)
             for row in make(emulator, dtype)]  # fmt: skip
    return found + conv_rows(emulator, torch.float32, tf32=True)


def text(found: list[Row]) -> str:
    header = ["kernel", "case", "dtype", "MFLOP", "compulsory KiB", "moved KiB", "ratio", "bar", "bank conflicts"]
    header += [f"floor on {device}, us" for device in roofline.DEVICES]
    lines = [header, ["---"] * len(header)]
    for row in found:
        facts = [f"{row.flops / 1e6:.3g}", f"{row.compulsory / 1024:.0f}", f"{row.moved / 1024:.0f}"]
        facts += [f"{row.ratio:.3f}", f"{row.bar:.2f}"]
        facts.append("-" if math.isnan(row.banks) else f"{row.banks:.2f}")
        floors = [f"{floor:.2f}" for floor in row.floors().values()]
        lines.append([row.kernel, row.case, str(row.dtype).removeprefix("torch."), *facts, *floors])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"# CUDA C++ kernels: global-memory traffic\n\n{HEADER}\n\nMoved: 32-byte sectors that a block of threads "
        "touches, each once per block, with halos, re-read filters and the partial sums that a second launch adds up. "
        "Bank conflicts: how often an ordinary access of a warp to shared memory is repeated; ldmatrix: none. "
        f"Floor: {roofline.SOURCE}, of the compulsory bytes and the sizes of the case.\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", help="also write the table to this file")
    arguments = parser.parse_args()
    found = rows(cuda_emulator.install())
    report = text(found)
    print(report)
    if arguments.markdown:
        with open(f"{arguments.markdown}.tmp", "w") as file:
            file.write(report)
        os.replace(f"{arguments.markdown}.tmp", arguments.markdown)
    if beyond := [row for row in found if row.ratio > row.bar]:
        raise SystemExit(f"beyond their bars: {beyond}")


if __name__ == "__main__":
    main()
