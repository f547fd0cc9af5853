"""Compiles the Triton kernels without a GPU: the launchers run on meta tensors, what they launch is compiled.

So the kernels, specialisations, tile sizes and warps that are compiled are the ones that the launchers would ship to a
GPU of that architecture, and nothing is launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from .sass import Report, report

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class _NoDevice(DriverBase):
    """A driver for a GPU that is not there. Its device number is the architecture, so that caches stay apart."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed without a device")

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("nothing can be timed without a device")


class Compiled(NamedTuple):
    name: str
    warps: int
    stages: int
    report: Report


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list[Compiled]]:
    """Collects every kernel that is launched inside, compiled for `architecture` and not run."""
    found: list[Compiled] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self, *args, grid, warmup, **keywords):
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        m = kernel.metadata
        facts = report(kernel.asm["cubin"], architecture, m.num_warps, m.shared)
        found.append(Compiled(m.name, m.num_warps, m.num_stages, facts))
        return kernel

    triton.runtime.driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def compile_calls(architecture: int, *calls: Callable[[], Any]) -> list[Compiled]:
    """The kernels that `calls` launch."""
    with compiling(architecture) as found:
        for call in calls:
            call()
    return found
