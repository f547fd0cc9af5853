"""The compile gate: every Triton kernel in its shipped configurations, for every architecture, against a budget.

`python -m dnl_kernels.testing.triton_gate` (make cuda-check) prints the table; fails if a kernel leaves its budget.
Everything here is computed from the compiled code; nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sass import MULTIPROCESSORS
from .triton_compile import ARCHITECTURES, Compiled, compile_calls

HEADER = "Computed from the compiled code, not measured on a GPU."
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Budget(NamedTuple):
    """What a kernel must reach: no spills, at least this occupancy, tensor cores where it multiplies matrices, and
    global accesses of at least this width in bits."""

    occupancy: float
    tensor_core: bool = False
    width: int = 128


BUDGETS = {
    "pointer_table_kernel": Budget(0.3, width=64),  # one warp that writes a few hundred bytes
    "dense_sum_fwd_kernel": Budget(0.5),
    "dense_sum_bwd_kernel": Budget(0.37),
    # Two warps per scheduler, whose products keep tiles in registers.
    "nonlocal_fwd_kernel": Budget(0.12, tensor_core=True),
    "nonlocal_bwd_query_kernel": Budget(0.12, tensor_core=True),
    "nonlocal_bwd_key_kernel": Budget(0.12, tensor_core=True),
    "accumulate_kernel": Budget(0.12, tensor_core=True),
    "pull_kernel": Budget(0.12, tensor_core=True),
    "weight_gradient_kernel": Budget(0.12, tensor_core=True),
    "project_kernel": Budget(0.12, tensor_core=True),
    "attend_kernel": Budget(0.12, tensor_core=True),
}


class Row(NamedTuple):
    operator: str
    case: str
    dtype: str
    architecture: int
    compiled: Compiled

    def faults(self) -> list[str]:
        """Every way in which the kernel leaves its budget."""
        r, budget = self.compiled.report, BUDGETS[self.compiled.name]
        limit = MULTIPROCESSORS[self.architecture].shared_per_block * 1024
        found = []
        if r.spills:
            found.append(f"{r.spills} spill instructions")
        if r.shared > limit:
            found.append(f"{r.shared} bytes of shared memory, the limit is {limit}")
        if r.occupancy < budget.occupancy:
            found.append(f"occupancy {r.occupancy:.2f} ({r.limit}), budget {budget.occupancy}")
        if budget.tensor_core and not r.tensor_core and self.dtype != "fp32":
            found.append("no tensor-core instruction in the hot loop")
        if r.width < budget.width:
            found.append(f"global accesses of {r.width} bits, budget {budget.width}")
        return found


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dense_sum_calls(dtype: torch.dtype) -> dict[str, Callable]:
    from ..ops.dense_sum import triton as kernels

    states = [meta(8, 1024, 512, dtype=dtype) for _ in range(6)]

    def both(weight, channel_dim):
        kernels.dense_sum_fwd(states, weight, channel_dim)
        kernels.dense_sum_bwd(states[0], states, weight, channel_dim, True, True)

    return {
        "one weight": lambda: both(meta(6, dtype=dtype), 0),
        "tokens": lambda: both(meta(6, 512, dtype=dtype), 2),
        "images": lambda: both(meta(6, 1024, dtype=dtype), 1),
    }


def nonlocal_attention_calls(dtype: torch.dtype) -> dict[str, Callable]:
    from ..ops.nonlocal_attention import triton as kernels

    def both(width, kernel="softmax", causal=False, masked=False, channels_first=False):
        shape = (8, 4, width, 1024) if channels_first else (8, 4, 1024, width)
        x, rows = meta(*shape, dtype=dtype), meta(8, 4, 1024, dtype=torch.float32)
        bandwidth = meta(4, dtype=torch.float32) if "gaussian" in kernel else None
        mask = meta(8, 1024, dtype=torch.bool) if masked else None
        static = (width**-0.5, "unnormalised" not in kernel, causal, channels_first)

        def call():
            kernels.nonlocal_attention_fwd(x, x, x, bandwidth, mask, *static)
            kernels.nonlocal_attention_bwd(x, x, x, x, bandwidth, mask, x, rows, rows, *static, bandwidth is not None)

        return call

    hardest = ("gaussian", True, True, True)
    return {
        **{f"softmax D{width}": both(width) for width in (64, 128, 256)},
        "unnormalised gaussian D64": both(64, "gaussian-unnormalised"),
        **{f"causal masked channels-first gaussian D{width}": both(width, *hardest) for width in (64, 128, 256)},
    }


def dense_linear_calls(dtype: torch.dtype) -> dict[str, Callable]:
    from ..ops.dense_linear import triton as kernels

    def both(width, channels, outputs, activation, norm):
        states, weight = [meta(8, width, c, dtype=dtype) for c in channels], meta(outputs, sum(channels), dtype=dtype)
        scale = shift = meta(sum(channels), dtype=dtype) if norm else None
        bias = meta(outputs, dtype=dtype)
        kernels.dense_linear_fwd(states, weight, bias, scale, shift, activation, 0.5)
        dy = meta(8, width, outputs, dtype=dtype)
        kernels.dense_linear_bwd(dy, states, weight, scale, shift, activation, 0.5, True, True, True, True)

    wide = {"gelu": lambda: both(1024, (64, 128, 64), 64, "gelu", True)}
    return wide if dtype == torch.float32 else {**wide, "small": lambda: both(1024, (16, 8), 8, "identity", False)}


def dense_conv2d_calls(dtype: torch.dtype) -> dict[str, Callable]:
    from ..ops.dense_conv2d import triton as kernels

    def both(channels, outputs, size, activation, memory_format=torch.contiguous_format):
        states = [meta(8, c, 32, 32, dtype=dtype).contiguous(memory_format=memory_format) for c in channels]
        weight, bias = meta(outputs, sum(channels), size, size, dtype=dtype), meta(outputs, dtype=dtype)
        scale = shift = meta(sum(channels), dtype=dtype)
        kernels.dense_conv2d_fwd(states, weight, bias, scale, shift, activation, 0.5)
        dy = meta(8, outputs, 32, 32, dtype=dtype)
        kernels.dense_conv2d_bwd(dy, states, weight, scale, shift, activation, 0.5, True, True, True, True)

    wide = {"3x3 channels-last": lambda: both((64, 64), 64, 3, "relu", torch.channels_last)}
    if dtype == torch.float32:
        return wide
    return {
        **wide,
        "3x3": lambda: both((12, 6, 6), 6, 3, "relu"),
        "1x1": lambda: both((64, 32, 32), 128, 1, "relu"),
    }


def dnl_layer_calls(dtype: torch.dtype) -> dict[str, Callable]:
    """Forward only: backward is made of the kernels of other operators."""
    from ..ops.dnl_layer import triton as kernels
    from ..ops.dnl_layer.config import LayerConfig

    def forward(width, kernel, heads, size=None, count=1, residual=False):
        states = [meta(*((8, 64, 32, 32) if size else (8, 1024, 64)), dtype=dtype) for _ in range(count)]
        window = (size, size) if size else ()
        vector, gain = meta(width, dtype=dtype), meta(64 * count, dtype=dtype)
        given = dict.fromkeys(kernels.PARAMETERS) | {
            "affine_weight": meta(width, 64 * count, *window, dtype=dtype), "affine_bias": vector, "norm_scale": gain,
            "norm_shift": gain, "output_bias": vector, "output_scale": vector, "output_shift": vector,
        }  # fmt: skip
        for name in ("query", "value") if kernel == "gaussian" else ("query", "key", "value"):
            given |= {f"{name}_weight": meta(heads * width, width, dtype=dtype)}
            given |= {f"{name}_bias": meta(heads * width, dtype=dtype)}
        given["output_weight"] = meta(width, heads * width, dtype=dtype)
        given["rho"] = meta(heads, dtype=dtype) if kernel == "gaussian" else None
        skip = states[0] if residual else None
        given["skip_weight"] = meta(width, 64, *window, dtype=dtype) if residual else None
        layer = LayerConfig(kernel, "relu", 0.5, "relu", heads, residual)
        out = torch.empty_like(
            states[0][:, :1].expand(-1, width, -1, -1) if size else states[0][..., :1].expand(-1, -1, width)
        )
        kernels.layer_into(kernels._Call(states, skip, kernels.Parameters(**given), layer), out)

    most = 64 if dtype == torch.float32 else 128
    return {
        "softmax 64 tokens": lambda: forward(64, "softmax", 4),
        "widest softmax images 3x3 residual": lambda: forward(most, "softmax", 2, 3, 4, True),
        "widest gaussian tokens residual": lambda: forward(most, "gaussian", 2, None, 12, True),
        "gaussian 32 images 1x1": lambda: forward(32, "gaussian", 2, 1),
    }


def dnl_block_calls(dtype: torch.dtype) -> dict[str, Callable]:
    from ..ops.dnl_block import triton as kernels

    def both():
        """One layer of training: what it adds to dense_conv2d is the statistics, and a gradient that is added to."""
        x0 = meta(8, 16, 32, 32, dtype=dtype)
        weight, bias, gamma, beta = (meta(n, dtype=torch.float32) for n in (12 * 16 * 9, 12, 16, 16))
        states, mean, var, outputs = kernels.dnl_block_fwd(
            x0, weight, bias, gamma, beta, None, None, [1], 12, 3, True, True, True, "relu", 1.0, 1e-5
        )
        kernels.dnl_block_bwd(
            states, states, outputs, weight, bias, gamma, beta, mean, var, [1], 12, 3, True, True, True, "relu", 1.0,
            1e-5,
        )  # fmt: skip

    return {"training": both} if dtype != torch.float32 else {}


CALLS = {
    "dense_sum": dense_sum_calls,
    "nonlocal_attention": nonlocal_attention_calls,
    "dense_linear": dense_linear_calls,
    "dense_conv2d": dense_conv2d_calls,
    "dnl_layer": dnl_layer_calls,
    "dnl_block": dnl_block_calls,
}


QUICK = {
    "dense_sum": ("one weight", "tokens"),
    "nonlocal_attention": ("softmax D64",),
    "dense_linear": ("gelu",),
    "dense_conv2d": ("3x3 channels-last",),
    "dnl_layer": ("softmax 64 tokens",),
}  # the cases for every run of the tests, where all would take minutes


def rows(architecture: int, operators: list[str] | None = None, quick: bool = False) -> list[Row]:
    """Every kernel that the calls launch on this architecture."""
    found = []
    for operator in operators or CALLS:
        for dtype_name, dtype in DTYPES.items():
            if quick and dtype == torch.float32 and architecture >= 90:  # which differs by its tensor cores
                continue
            for case, call in CALLS[operator](dtype).items():
                if quick and case not in QUICK.get(operator, (case,)):
                    continue
                for compiled in dict.fromkeys(compile_calls(architecture, call)):
                    found.append(Row(operator, case, dtype_name, architecture, compiled))
    return found


def gather(
    architectures=ARCHITECTURES, operators: list[str] | None = None, processes: int = 2, quick: bool = False
) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        lists = list(pool.map(rows, architectures, *([x] * len(architectures) for x in (operators, quick))))
    return [row for part in lists for row in part]


COLUMNS = "kernel case dtype sm warps regs spills smem occupancy limit mma bits hot".split()


def cells(row: Row) -> tuple[str, ...]:
    c, r = row.compiled, row.compiled.report
    hot = " ".join(f"{kind}:{n}" for kind, n in r.hot_loop if kind != "OTHER")
    facts = (c.warps, r.registers, r.spills, r.shared, f"{r.occupancy:.2f}", r.limit, r.tensor_core or "-", r.width)
    return (c.name.removesuffix("_kernel"), row.case, row.dtype, str(row.architecture), *map(str, facts), hot)


def table(found: list[Row]) -> str:
    """The report as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *dict.fromkeys(cells(row) for row in found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: str, text: str) -> None:
    """A report on disk, complete or not there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w") as file:
        file.write(text)
    os.replace(path + ".part", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", choices=[[], *CALLS])
    parser.add_argument("--architectures", nargs="*", type=int, default=ARCHITECTURES)
    parser.add_argument("--markdown", help="also write the table to this file")
    arguments = parser.parse_args()
    found = gather(arguments.architectures, arguments.operators or None)
    text = f"# Triton kernels: compile report\n\n{HEADER}\n\n{table(found)}\n"
    print(text)
    if arguments.markdown:
        write(arguments.markdown, text)
    faults = [f"{' '.join(cells(row)[:4])}: {fault}" for row in found for fault in row.faults()]
    print("\n".join(faults) or "every kernel is within its budget")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
