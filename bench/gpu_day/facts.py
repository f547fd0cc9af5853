"""What this process would work with, as one line of JSON: versions, card, libraries, and the parts of the tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from dnl_kernels import _backend, _builder, _extension


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def card() -> dict[str, Any]:
    p: Any = torch.cuda.get_device_properties(0)  # whose stub lacks some
    run = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    told = subprocess.run(run, capture_output=True, text=True, check=False).stdout if shutil.which(run[0]) else ""
    return {
        "card": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "shared_memory_per_block": p.shared_memory_per_block_optin, "driver, power limit": told.strip(),
        "cards": torch.cuda.device_count(),
    }  # fmt: skip


def runs_on(architectures: str, capability: str) -> bool:
    """Whether a library compiled for these has code for a card: for the same major version and no later minor one, or
    as PTX of an earlier one."""
    major, minor = (int(n) for n in capability.split("."))
    for name in filter(None, re.split("[; ]", architectures)):
        of = tuple(int(n) for n in name.removesuffix("+PTX").split("."))
        if (of[0] == major and of[1] <= minor) or (name.endswith("+PTX") and of <= (major, minor)):
            return True
    return False


def facts() -> dict[str, Any]:
    rehearsal = os.environ.get("DNL_GPU_TESTS") == "emulated"
    built = _extension.FACTS.get("CUDA architectures", "")
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
        "torchvision": version("torchvision"), "nvcc": nvcc(), "cuda_of_torch": torch.version.cuda or "none",
        "plugins": [p for p in ("pytest_timeout",) if importlib.util.find_spec(p)],
        "sanitizer": shutil.which("compute-sanitizer") or "", "architectures": built,
        "missing": dict(_extension.REASONS),
    }  # fmt: skip
    backends = ("cuda_emulated", "triton") if rehearsal else ("cuda", "triton")
    found["parts"] = [
        f"{op}:{backend}"
        for backend in backends
        for op, supports in _backend.SUPPORTS.items()
        if backend.partition("_")[0] in supports
    ]
    if torch.cuda.is_available():
        found |= card()
        if built and not runs_on(built, found["capability"]):
            found["missing"]["cuda"] = f"the library is for {built}, the card is a {found['capability']}"
    elif not rehearsal:
        found["missing"]["device"] = "torch finds no CUDA device"
    return found


def nvcc() -> str:
    program = _builder.nvcc()
    if program is None:
        return "absent"
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


if __name__ == "__main__":
    print("FACTS " + json.dumps(facts()))
    sys.exit(0)
