"""`python -m dnl_kernels.info` and `dnl info`: versions, build facts, and every backend with why it is unavailable."""

from __future__ import annotations

import platform

import torch

from . import __version__, _backend, _extension
from .ops.dnl_block.api import ROUTES


def facts() -> dict[str, str]:
    """Versions and build facts, name to text."""
    library = _extension._C
    isa = f"{library.isa()} (available: {', '.join(library.isa_levels())})" if library else "no C++ extension"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return {
        "dnl_kernels": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "compiler": f"{library.compiler}, for torch >= {library.torch_target}" if library else "none",
        "instruction set": isa,
        "CUDA architectures": _extension.FACTS.get("CUDA architectures", "not built"),
        "CUDA": cuda,
    }


def backends() -> dict[str, str]:
    """Each backend: the operators it has, or why it cannot be used here."""
    table = {}
    for backend in _backend.PREFERENCE:
        operators = [op for op, supports in _backend.SUPPORTS.items() if backend in supports]
        why = _backend.absence(backend) or (None if operators else "no operator has such a kernel yet")
        if why is None and backend in ("cuda", "triton") and not torch.cuda.is_available():
            why = "torch finds no CUDA device"
        table[backend] = f"unavailable: {why}" if why else ", ".join(operators)
    return table


def implementations() -> dict[str, str]:
    """What a block may run on, the fastest first; `DNLBlock.explain(x)` says which of them does, and why."""
    return {f"{at}.": route.name for at, route in enumerate(ROUTES[1:], 1)}


def main() -> None:
    for title, rows in (("facts", facts()), ("backends", backends()), ("blocks run as", implementations())):
        print(title)
        for name, text in rows.items():
            print(f"  {name:<20}{text}")


if __name__ == "__main__":
    main()
