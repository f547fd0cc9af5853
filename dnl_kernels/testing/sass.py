"""What a cubin says without a GPU: registers, spills, occupancy, and the instructions of its hottest loop."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Limits of one streaming multiprocessor (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # KiB
    shared_per_block: int  # KiB


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164, 163),
    86: Multiprocessor(48, 16, 100, 99),
    89: Multiprocessor(48, 24, 100, 99),
    90: Multiprocessor(64, 32, 228, 227),
    100: Multiprocessor(64, 32, 228, 227),
    120: Multiprocessor(48, 24, 100, 99),
}
REGISTERS = 65536
RESERVED_SHARED = 1024  # bytes of shared memory that the system keeps per block

_GLOBAL = r"LDG(?!DEP)|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP"
# (kind, pattern of the opcode): the first match counts.
_KINDS = (
    ("MMA", r"HGMMA|UTC[A-Z]*MMA|HMMA|DMMA|IMMA|QMMA|OMMA"),
    ("FP32", r"FADD|FMUL|FFMA|FSEL|FMNMX|FSET"),
    ("MUFU", r"MUFU"),
    ("LOCAL", r"LDL|STL"),
    ("GLOBAL", _GLOBAL),
    ("SHARED", r"LDS|STS|LDSM|STSM"),
    ("SHFL", r"SHFL"),
    ("BARRIER", r"BAR|SYNCS|WARPSYNC|DEPBAR"),
)
TENSOR_CORE = ("HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "HMMA")


class Report(NamedTuple):
    """registers per thread; spills: local-memory instructions; shared: bytes per block; occupancy: the fraction of the
    multiprocessor's warps; limit: what bounds it; tensor_core: the instruction found in the hot loop, or '';
    hot_loop: its instructions by kind; width: the widest global access in bits."""

    registers: int
    spills: int
    shared: int
    occupancy: float
    limit: str
    tensor_core: str
    hot_loop: tuple[tuple[str, int], ...]
    width: int


def occupancy(architecture: int, registers: int, warps: int, shared: int) -> tuple[float, str]:
    """Resident warps / possible warps, and what limits them."""
    sm = MULTIPROCESSORS[architecture]
    registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256  # handed out in units of 256
    shared_per_block = -(-(shared + RESERVED_SHARED) // 128) * 128
    blocks = {
        "registers": REGISTERS // registers_per_warp // 4 * 4 // warps,  # a warp lives in one of four partitions
        "shared": sm.shared * 1024 // shared_per_block,
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
    }
    limit = min(blocks, key=lambda k: blocks[k])
    return blocks[limit] * warps / sm.warps, limit


def _tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _dump(path: str, option: str) -> str:
    return subprocess.run([_tool("cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """(address, opcode) of every instruction that can execute, and (first, last) of every loop."""
    sass = re.sub(r"/\*[0-9a-f]{4,}\*/\s+@!U?PT [^\n]*", "", sass)  # dummies that the assembler puts beside LDGSTS
    found, loops = [], []
    for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)([^;]*);", sass):
        address = int(m[1], 16)
        found.append((address, m[3]))
        target = re.search(r"0x([0-9a-f]+)", m[4]) if m[3].startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return found, loops


def _hot_loop(instructions: list[tuple[int, str]], loops: list[tuple[int, int]]) -> list[str]:
    """The smallest loop with (nearly) the most matrix instructions; without any, the longest innermost loop."""

    def body(loop):
        return [op for address, op in instructions if loop[0] <= address <= loop[1]]

    def products(loop):
        return sum("MMA" in op for op in body(loop))

    if not loops:
        return [op for _, op in instructions]
    most = max(map(products, loops))
    if most:
        return body(min((x for x in loops if products(x) >= 0.4 * most), key=lambda x: x[1] - x[0]))
    inner = [x for x in loops if not any(o != x and x[0] <= o[0] and o[1] <= x[1] for o in loops)]
    return max(map(body, inner), key=len)


def report(cubin: bytes, architecture: int, warps: int, dynamic_shared: int) -> Report:
    """The facts of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = kernels(file.name).values()
    return kernel.report(architecture, warps, dynamic_shared)


class Kernel(NamedTuple):
    """A kernel of a cubin: registers, static shared memory, its instructions and loops."""

    usage: dict[str, int]
    instructions: list[tuple[int, str]]
    loops: list[tuple[int, int]]

    def report(self, architecture: int, warps: int, dynamic_shared: int) -> Report:
        """The facts of a launch with so many warps and so much dynamic shared memory."""
        hot = _hot_loop(self.instructions, self.loops)
        kinds: collections.Counter[str] = collections.Counter()
        for op in hot:
            kinds[next((kind for kind, pattern in _KINDS if re.match(pattern, op)), "OTHER")] += 1
        shared = self.usage.get("SHARED", 0) + dynamic_shared
        share, limit = occupancy(architecture, self.usage["REG"], warps, shared)
        accesses = [op for _, op in self.instructions if re.match(r"LDG(?!DEP)|STG|LDGSTS|UTM|UBLKCP", op)]
        return Report(
            registers=self.usage["REG"],
            spills=sum(op.startswith(("LDL", "STL")) for _, op in self.instructions),
            shared=shared,
            occupancy=share,
            limit=limit,
            tensor_core=next((t for t in TENSOR_CORE if any(op.startswith(t) for op in hot)), ""),
            hot_loop=tuple(sorted(kinds.items())),
            width=max(map(_width, accesses), default=0),
        )


def kernels(cubin: str) -> dict[str, Kernel]:
    """The kernels of a cubin file by their mangled names."""
    usage = re.findall(r"Function (\S+):\s+(REG:[^\n]*)", _dump(cubin, "-res-usage"))
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _dump(cubin, "-sass"), re.DOTALL))
    return {
        name: Kernel({k: int(v) for k, v in re.findall(r"(\w+):(\d+)", facts)}, *_instructions(sass[name]))
        for name, facts in usage
    }


def architectures(library: str, folder: str) -> dict[int, list[str]]:
    """Extracts the cubins of a library into `folder`: by architecture."""
    subprocess.run([_tool("cuobjdump"), "-xelf", "all", os.path.abspath(library)], cwd=folder, check=True,
                   capture_output=True)  # fmt: skip
    found: dict[int, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if match := re.search(r"\.sm_(\d+)\w*\.cubin$", name):
            found.setdefault(int(match[1]), []).append(os.path.join(folder, name))
    return found


def _width(op: str) -> int:
    if op.startswith(("UTM", "UBLKCP")):  # bulk copies
        return 128
    size = re.search(r"\.(256|128|64|U16|U8|S16|S8)(?![0-9])", op)
    return int(size[1].lstrip("US")) if size else 32
