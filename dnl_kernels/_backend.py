"""Which implementation runs: backends as data, the reasons why one cannot run, and the choice.

Every operator declares with `declare` what each of its implementations supports. `select` is plain Python over these
records, which torch.compile folds away.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, _ops

log = logging.getLogger("dnl_kernels")

PREFERENCE = ("cuda", "triton", "cpu", "reference")  # best first; the only place where an order is written
# Below so many numbers in all tensors of a call it costs more to call a kernel than PyTorch's own operators.
FEW = 1 << 12
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMESPACE = {"cpu": "dnl", "cuda": "dnl", "triton": "dnl_triton"}  # tests add emulated backends
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Support(NamedTuple):
    """What one backend can run of one operator.

    devices: device types, empty for any. dtypes: element types. limit: given the facts of a call (keywords of
    `select`), the reason why it cannot run, or None.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    limit: Callable[..., str | None] | None = None


REFERENCE = Support()
CPU = Support(devices=("cpu",))
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = Support(devices=("cuda",), dtypes=CUDA_DTYPES)
SMALLEST_SHARED_MEMORY = 99 << 10  # bytes that a block may have on every architecture from sm_80 on
TRITON = Support(devices=_ops.TRITON_DEVICES, dtypes=CUDA_DTYPES)

SUPPORTS: dict[str, dict[str, Support]] = {}
_CHOICES: dict[tuple[str, str, torch.dtype], str] = {}  # (op, device, dtype): the best backend where it has no limit


def declare(op: str, **backends: Support) -> None:
    """Records the backends of operator `op`; the reference runs everywhere."""
    SUPPORTS[op] = {"reference": REFERENCE, **backends}
    _CHOICES.clear()


def absence(backend: str) -> str | None:
    """Why the backend cannot be used at all in this process, or None."""
    if backend == "triton":
        return _broken_triton() if _HAS_TRITON else "Triton is not installed"
    return None if backend == "reference" else _extension.REASONS.get(backend)


def _broken_triton() -> str | None:
    if torch.compiler.is_compiling():
        return None
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def reasons(op: str, backend: str, device: str, dtype: torch.dtype, facts: Mapping[str, object]) -> list[str]:
    """Everything that keeps `backend` from running this call of `op`; empty when it can."""
    support = SUPPORTS[op].get(backend)
    if support is None:
        return [f"{op} has no {backend} kernel"]
    found = []
    if missing := absence(backend):
        found.append(missing)
    if support.devices and device not in support.devices:
        found.append(f"runs on {' or '.join(support.devices)}, the tensors are on {device}")
    if dtype not in support.dtypes:
        found.append(f"supports {', '.join(str(d).removeprefix('torch.') for d in support.dtypes)}, not {dtype}")
    if support.limit is not None and (limit := support.limit(**facts)):
        found.append(limit)
    return found


def decomposes() -> bool:
    """Whether only PyTorch's own operators will do, which the reference consists of: under a transform of torch.func
    (vmap, grad, jvp and what is made of them), and in an export to ONNX."""
    return torch._C._are_functorch_transforms_active() or (
        torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    )


def select(op: str, backend: str | None, example: Tensor, **facts: object) -> str:
    """The backend that runs this call: the requested one or an error with every reason, or the best one for None."""
    device, dtype = example.device.type, example.dtype
    if backend is not None:
        check_backend(op, backend)
        if backend != "reference" and decomposes():
            raise ValueError(f"{op}: backend='{backend}' has no rule for torch.func's transforms and ONNX; None has")
        if why := reasons(op, backend, device, dtype, facts):
            raise ValueError(f"{op}: backend='{backend}' cannot run this call: " + "; ".join(why))
        return backend
    if torch.compiler.is_compiling():  # Dynamo would guard every entry of the table
        return "reference" if decomposes() else _best(op, device, dtype, facts)
    if torch._C._are_functorch_transforms_active():
        return "reference"
    return _CHOICES.get((op, device, dtype)) or _best(op, device, dtype, facts)


def _best(op: str, device: str, dtype: torch.dtype, facts: Mapping[str, object]) -> str:
    supports = SUPPORTS[op]
    certain = not torch.compiler.is_compiling()
    for name in PREFERENCE:
        support = supports.get(name)
        if support is None or (support.devices and device not in support.devices):
            continue
        if dtype in support.dtypes and absence(name) is None and (support.limit is None or not support.limit(**facts)):
            if certain and support.limit is None:
                _CHOICES[op, device, dtype] = name
            return name
        certain = certain and support.limit is None
        log_fallback(op, name, "; ".join(reasons(op, name, device, dtype, facts)))
    raise AssertionError("the reference backend runs every call")


def check_backend(op: str, backend: str | None) -> None:
    if backend is not None and backend not in PREFERENCE and backend not in NAMESPACE:
        raise ValueError(f"{op}: backend is {backend!r}; expected None or one of {', '.join(PREFERENCE)}")


def log_fallback(op: str, backend: str, why: str) -> None:
    """Says once why a backend that was considered does not run."""
    if not torch.compiler.is_compiling():
        _log_once(op, backend, why)


@functools.cache
def _log_once(op: str, backend: str, why: str) -> None:
    log.info("%s: not using the %s backend: %s", op, backend, why)


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's setting lets a GPU multiply matrices of this type as tf32: by
    `torch.backends.cuda.matmul.fp32_precision`, which `allow_tf32` beside it and `torch.set_float32_matmul_precision`
    set as well. It is off by default, and holds for convolutions too: cudnn's own switch is on by default, and here a
    user of float32 gets float32."""
    return dtype == torch.float32 and _tf32_setting()


def _tf32_setting() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Dynamo cannot trace it, and compiles anew when torch's setting changes. This is torch.compiler.assume_constant_result,
# which would import Dynamo, and Triton with it, when this package is imported.
_tf32_setting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks it
    return properties.shared_memory_per_block_optin


def few(numbers: int, example: Tensor) -> bool:
    """Whether a call without a requested backend is for PyTorch's own operators, where these compute the same: of so
    many numbers on the CPU, in the dtype that they accumulate in. Asked before `select`, which takes longer."""
    return numbers <= FEW and example.is_cpu and example.dtype in _WIDE and not torch.compiler.is_compiling()


_WIDE = frozenset((torch.float32, torch.float64))


def kernel(backend: str, name: str) -> Callable:
    """The registered operator `name` ('<op>_fwd', '<op>_bwd') in the namespace of `backend`."""
    return getattr(getattr(torch.ops, NAMESPACE[backend]), name).default
