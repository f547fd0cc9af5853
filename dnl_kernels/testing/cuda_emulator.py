"""Runs the CUDA sources on a machine without a GPU: builds csrc/*/cuda.cu against csrc/emulator with a C++ compiler.

`install()` makes the result a backend of its own, "cuda_emulated", for tests only: it takes CPU tensors, and is never
chosen unless it is asked for by name. Flavours: "plain"; "address" (AddressSanitizer and UndefinedBehaviorSanitizer);
"thread" (ThreadSanitizer); "banks" (bank conflicts of ordinary accesses). The sanitizers need their libraries loaded
before Python: see `sanitizer_environment`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend, _builder, _ops

ROOT = _builder.source_dir().parent
NAMESPACE = "dnl_emulated"
BACKEND = "cuda_emulated"
FLAGS = (
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas -DDNL_EMULATOR"
)
# Flags of the kernels, of the runtime. ThreadSanitizer must not see the bookkeeping of the runtime. In "banks" the
# functions of csrc/emulator/banks.cpp stand in for the sanitizer's library.
FLAVOURS = {
    "plain": ("-O2", "-O2"),
    "address": ("-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",) * 2,
    "thread": ("-O1 -fsanitize=thread", "-O2 -DEMULATOR_TSAN"),
    "banks": ("-O1 -fsanitize=thread", "-O2 -DEMULATOR_BANKS"),
}
ORDERS = ("in_order", "reversed", "random", "warp_priority")
ASYNC_COPIES = ("at_issue", "at_wait", "random")


class Schedule(NamedTuple):
    """In which order warps run, and when cp.async data arrives."""

    order: str = "in_order"
    seed: int = 1
    async_copy: str = "random"


SCHEDULES = [Schedule(order, seed, copy) for (order, seed), copy in itertools.product(
    [("in_order", 1), ("reversed", 2), ("random", 3), ("random", 4), ("warp_priority", 5)], ASYNC_COPIES
)]  # fmt: skip


class Traffic(NamedTuple):
    """Bytes of one tensor. requested: by all accesses; by_blocks: of the 32-byte sectors that each block touched, each
    once (what reaches the second-level cache); distinct: of the sectors touched at all."""

    requested: int
    by_blocks: int
    distinct: int


class Emulator:
    """A loaded emulator library: its schedule and its counters."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.dnl_emulator_traffic.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
        self.library.dnl_emulator_launched.restype = ctypes.c_char_p
        self.library.dnl_emulator_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]

    def configure(self, schedule: Schedule = Schedule(), trace: bool = False) -> None:  # noqa: B008
        order, copy = ORDERS.index(schedule.order), ASYNC_COPIES.index(schedule.async_copy)
        self.library.dnl_emulator_configure(order, schedule.seed, copy, int(trace))

    def counts(self) -> dict[str, int]:
        """Counters since the last call."""
        names = "switches barriers collectives mma ldmatrix ldmatrix_conflicts blocks threads launches".split()
        names += ["shared", "shared_conflicts"]  # in the flavour "banks"
        values = (ctypes.c_uint64 * len(names))()
        self.library.dnl_emulator_counts(values)
        return dict(zip(names, values, strict=True))

    def launched(self) -> set[str]:
        """The names of the kernels launched since the last call."""
        return set(self.library.dnl_emulator_launched().decode().split())

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Counts the global traffic inside, from nothing; read it with `traffic` before the next one."""
        self.library.dnl_emulator_forget_traffic()
        self.configure(trace=True)
        try:
            yield
        finally:
            self.configure()

    def traffic_of(self, address: int, size: int) -> tuple[Traffic, Traffic]:
        """Loads and stores of the bytes [address, address + size)."""
        values = (ctypes.c_uint64 * 6)()
        self.library.dnl_emulator_traffic(address, size, values)
        return Traffic(*values[:3]), Traffic(*values[3:])

    def traffic(self, tensor: Tensor) -> tuple[Traffic, Traffic]:
        """Loads and stores of a contiguous tensor."""
        return self.traffic_of(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def cuda_include() -> pathlib.Path | None:
    """The folder of cuda_fp16.h: of the toolkit, or of the nvidia-cuda-runtime and nvidia-cuda-crt packages."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    site = pathlib.Path(sysconfig.get_path("purelib"), "nvidia")
    folders = [pathlib.Path(home, "include") for home in homes if home] + sorted(site.glob("*/include"))
    return next((f for f in folders if (f / "cuda_fp16.h").exists() and (f / "vector_types.h").exists()), None)


def absence() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if not (ROOT / "csrc" / "emulator").is_dir():
        return "the sources are not here"
    if cuda_include() is None:
        return "no CUDA headers: install the extra 'cuda-check'"
    if _builder.compiler() is None or _builder._ninja() is None:
        return "no C++ compiler or no ninja"
    return None


def build(flavour: str = "plain", sources: Sequence[pathlib.Path] | None = None) -> pathlib.Path:
    """Compiles the emulator with the CUDA sources, or with `sources` and no torch, and returns the library."""
    csrc, kernel_flags, runtime_flags = ROOT / "csrc", *FLAVOURS[flavour]
    operators, sources = sources is None, sources or sorted(csrc.glob("*/cuda.cu"))
    name = "operators" if operators else sources[0].stem
    work = ROOT / "build" / "emulator" / f"{flavour}-{name}"
    work.mkdir(parents=True, exist_ok=True)
    torch_dir = _builder.torch_dir()
    base = f'{FLAGS} -I"{csrc}" -isystem "{cuda_include()}"'
    torch_flags = f'{_builder.TARGET} -isystem "{torch_dir}/include"' if operators else ""
    link = f'-L"{torch_dir}/lib" -ltorch_cpu' if operators else ""
    text = (
        f"rule cxx\n  command = {_builder.compiler()} -MD -MF $out.d {base} $flags -x c++ -c $in -o $out\n"
        f"  depfile = $out.d\n  deps = gcc\n"
        f"rule link\n  command = {_builder.compiler()} -shared $flags $in {link} -o $out\n"
    )
    objects = []
    jobs = [(s, kernel_flags + " " + torch_flags) for s in sources]
    jobs += [(s, runtime_flags) for s in sorted((csrc / "emulator").glob("*.cpp"))]
    for source, flags in jobs:
        objects.append(f"{source.parent.name}.{source.stem}.o")
        text += f"build {objects[-1]}: cxx {_builder._escape(source)}\n  flags = {flags}\n"
    text += f"build {name}.so: link {' '.join(objects)}\n  flags = {kernel_flags if flavour != 'banks' else ''}\n"
    (work / "build.ninja").write_text(text)
    command = [*(_builder._ninja() or []), "-C", str(work)]
    with open(work / "lock", "w") as lock:  # two ninjas in one folder spoil each other's log
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{run.stdout}{run.stderr}")
    return work / f"{name}.so"


def sanitizer_environment(flavour: str) -> dict[str, str]:
    """The environment in which Python can load a library of this flavour."""
    names = {"plain": [], "banks": [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[flavour]
    compiler = (_builder.compiler() or "").split()
    found = [
        subprocess.run([*compiler, f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip()
        for n in names
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "DNL_EMULATOR_FLAVOUR": flavour,
        "OMP_NUM_THREADS": "1",
    }


def sanitizer_prefix() -> list[str]:
    """A command prefix: ThreadSanitizer's memory map does not fit every randomised address space."""
    setarch = shutil.which("setarch")
    return [setarch, "-R"] if setarch else []


@functools.cache
def install() -> Emulator:
    """Builds and loads the emulated kernels, and registers the backend "cuda_emulated". Once per process."""
    library = build(os.environ.get("DNL_EMULATOR_FLAVOUR", "plain"))
    _ops.define((NAMESPACE,))
    torch.ops.load_library(str(library))
    _backend.NAMESPACE[BACKEND] = NAMESPACE
    for supports in _backend.SUPPORTS.values():
        if "cuda" in supports:
            supports[BACKEND] = supports["cuda"]._replace(devices=("cpu",))
    return Emulator(ctypes.CDLL(str(library)))
