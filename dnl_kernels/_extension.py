"""Loads the compiled library, building it first where that was not done at install time.

`REASONS` says for each library why it is absent; an absent library is never an import error.
Environment: DNL_JIT=0 forbids the build at first import; DNL_CPU_ISA chooses the instruction-set level;
DNL_LIBRARY_DIR names a folder to load the library from (a sanitizer build, say).
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import pathlib
import sys
import types

import torch

from . import _builder, _ops

log = logging.getLogger("dnl_kernels")
REASONS: dict[str, str] = {}
FACTS: dict[str, str] = {}  # what the loaded libraries say of themselves
CUDA_LIBRARY = "_cuda.so"


def _cache_dir() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base, "dnl_kernels", _builder.key())


def _library_file(folder: pathlib.Path) -> pathlib.Path:
    return folder / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])


def _find() -> pathlib.Path | None:
    """The folder with the compiled library: the package itself, else the user's cache (compiled now if need be)."""
    if chosen := os.environ.get("DNL_LIBRARY_DIR"):
        return pathlib.Path(chosen)
    for folder in (_builder.HERE, _cache_dir()):
        if _library_file(folder).exists():
            return folder
    if os.environ.get("DNL_JIT", "1") == "0":
        REASONS["cpu"] = "the C++ extension is not built and DNL_JIT=0 forbids building it now"
        return None
    folder = _cache_dir()
    # The CUDA kernels take minutes to compile: at an import, only for a GPU that is there.
    cuda = torch.cuda.is_available()
    outcome = next(iter(_builder.build(folder, work=folder / "build", cuda=cuda).values()))
    if _library_file(folder).exists():
        return folder
    REASONS["cpu"] = f"the C++ extension is {outcome}"
    return None


def _load() -> types.ModuleType | None:
    folder = _find()
    if folder is None:
        log.warning("%s; using the reference backend", REASONS["cpu"])
        return None
    try:
        spec = importlib.util.spec_from_file_location("dnl_kernels._C", _library_file(folder))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:  # e.g. built against another torch or Python
        REASONS["cpu"] = f"the C++ extension does not load: {str(error).splitlines()[0]}"
        log.warning("%s; using the reference backend", REASONS["cpu"])
        return None
    sys.modules[spec.name] = module
    if level := os.environ.get("DNL_CPU_ISA"):
        module.set_isa(level)
    _load_cuda(folder)
    return module


def _load_cuda(folder: pathlib.Path) -> None:
    if not (folder / CUDA_LIBRARY).exists():
        REASONS["cuda"] = "the CUDA kernels are not built (no nvcc at build time, or DNL_CUDA=0)"
        return
    try:
        torch.ops.load_library(str(folder / CUDA_LIBRARY))
        tell = ctypes.CDLL(str(folder / CUDA_LIBRARY)).dnl_cuda_architectures
        tell.restype = ctypes.c_char_p
        FACTS["CUDA architectures"] = tell().decode()
    except (OSError, AttributeError) as error:
        REASONS["cuda"] = f"the CUDA kernels do not load: {str(error).splitlines()[0]}"


_ops.define()  # the operators must exist before the library adds kernels to them
_C = _load()
if _C is None:
    REASONS["cuda"] = "the extension is absent"
