"""Triton's interpreter made trustworthy: rounding as on a GPU, bounds and alignment checked, traffic counted.

The interpreter of Triton 3.8 holds bfloat16 as 16-bit integers and computes on those, truncates float32 -> bfloat16,
multiplies matrices exactly where a GPU uses tf32, and reads and writes any address. `install()` repairs the first
three, and turns an access outside the launch's tensors, or not aligned to its element, into `OutOfBounds`.
It needs a process started with TRITON_INTERPRET=1, because Triton decides at import.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interp
from torch import Tensor

Handle, Builder = interp.TensorHandle, interp.InterpreterBuilder
SECTOR = 32  # bytes: the unit of a GPU's memory traffic


class OutOfBounds(RuntimeError):
    """A kernel touched memory outside the tensors of its launch, or a misaligned address."""


# --- numbers ---------------------------------------------------------------------------------------------------------

_TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_CARRIER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
# Builder methods that compute on floats, besides everything named create_f...
_FLOAT_METHODS = (
    *("maximumf", "maxnumf", "minimumf", "minnumf", "clampf", "precise_divf", "precise_sqrt"),
    *("cos", "erf", "exp", "exp2", "floor", "ceil", "log", "log2", "rsqrt", "sin", "sqrt"),
)


def _round_to(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """The conversion between floating types as a GPU does it, to nearest even: PyTorch's own."""
    values = torch.from_numpy(np.ascontiguousarray(data).copy())
    if source == tl.bfloat16:
        values = values.view(torch.bfloat16)
    result = values.to(_TORCH[target])
    if target == tl.bfloat16:
        return result.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return result.numpy().reshape(data.shape)


def _convert_float(data, source, target, rounding_mode, original=interp._convert_float):
    source, target = source.scalar, target.scalar
    if source in _TORCH and target in _TORCH and rounding_mode != interp._ir.ROUNDING_MODE.RTZ:
        return _round_to(data, source, target)
    return original(data, source, target, rounding_mode)


def _is_bf16(x: object) -> bool:
    return isinstance(x, Handle) and not isinstance(x.dtype, tl.pointer_type) and x.dtype.scalar == tl.bfloat16


def _widened(x):
    return Handle(_round_to(x.data, tl.bfloat16, tl.float32), tl.float32) if _is_bf16(x) else x


def _in_float32(method):
    """bfloat16 arithmetic: compute in float32, round the result, as the hardware does."""

    @functools.wraps(method)
    def wrapped(self, *args, **keywords):
        if not any(map(_is_bf16, args)):
            return method(self, *args, **keywords)
        result = method(self, *map(_widened, args), **keywords)
        if result.data.dtype != np.float32:  # a comparison
            return result
        return Handle(_round_to(result.data, tl.float32, tl.bfloat16), tl.bfloat16)

    return wrapped


def _cast(self, source, target):
    if source.dtype.scalar in _TORCH and target.scalar in _TORCH:
        return Handle(_round_to(source.data, source.dtype.scalar, target.scalar), target.scalar)
    if _is_bf16(source):
        return _cast_integer(self, _widened(source), target)
    if target.scalar == tl.bfloat16:
        wide = source.data.astype(np.float32)
        return Handle(_round_to(wide, tl.float32, tl.bfloat16), tl.bfloat16)
    return _cast_integer(self, source, target)


_cast_integer = Builder.cast_impl


def _tf32(data: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 stored bits of tf32's significand, to nearest, ties away (cvt.rna)."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(data), rounded, data)


def _dot(self, a, b, accumulator, precision, *rest, original=Builder.create_dot):
    """Half types are multiplied exactly and summed in float32; float32 is rounded to tf32 where the kernel allows.

    Rounded once per dot: like in the hardware's, and unlike numpy's, an element does not depend on the tile's shape."""
    if _Launch.traffic is not None:
        _Launch.traffic.flops += 2 * accumulator.data.size * a.data.shape[-1]
    if accumulator.data.dtype != np.float32:
        return original(self, a, b, accumulator, precision, *rest)
    parts = [_widened(x).data.astype(np.float32) for x in (a, b)]
    if precision == interp._ir.INPUT_PRECISION.TF32:
        parts = [_tf32(x) for x in parts]
    with np.errstate(all="ignore"):
        product = np.matmul(*(x.astype(np.float64) for x in parts)) + accumulator.data
        return Handle(product.astype(np.float32), tl.float32)


def _reduction(method):
    """Sums, minima and cumulative sums over bfloat16, computed in float32."""

    @functools.wraps(method)
    def wrapped(self, x, *args, **keywords):
        value = x[0] if isinstance(x, tuple) else x
        if value.dtype.scalar != tl.bfloat16:
            return method(self, x, *args, **keywords)
        type_ = tl.block_type(tl.float32, value.type.shape) if value.type.is_block() else tl.float32
        result = method(self, tl.core.tensor(_widened(value.handle), type_), *args, **keywords)

        def narrowed(t):
            if t.dtype.scalar != tl.float32:
                return t
            data = _round_to(t.handle.data, tl.float32, tl.bfloat16)
            return self.to_tensor(data if t.type.is_block() else data.reshape(-1)[0], tl.bfloat16)

        return type(result)(map(narrowed, result)) if isinstance(result, (tuple, list)) else narrowed(result)

    return wrapped


def _sum(self, x):
    """In a tree along any axis, as threads and warps add up. numpy's own does so along the last axis only; along
    another one it adds one row after the other, with an error that grows with their number."""
    data = x.handle.data
    if data.dtype == np.float32 and self.axis is not None:
        data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1)).sum(-1)
        return self.to_tensor(np.expand_dims(data, self.axis) if self.keep_dims else data, x.dtype)
    return _numpy_sum(self, x)


_numpy_sum = interp.ReduceOps.sum


# --- memory ----------------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    name: str
    first: int
    end: int


class Traffic:
    """Bytes that kernels requested: `load`, `store`, and by tensor; the 32-byte sectors that they touched; the
    operations of their matrix products (`flops`), with those of a tile's padding."""

    def __init__(self) -> None:
        self.load = self.store = self.launches = self.flops = 0
        self.by_tensor: dict[str, dict[str, int]] = {}
        self._sectors: dict[str, set[int]] = {"load": set(), "store": set()}

    @property
    def requested(self) -> int:
        return self.load + self.store

    @property
    def unique_sector_bytes(self) -> int:
        """The least traffic with memory: every sector once for reading and once for writing."""
        return SECTOR * sum(map(len, self._sectors.values()))

    def add(self, kind: str, addresses: np.ndarray, size: int, owners: np.ndarray, extents: list[Extent]) -> None:
        setattr(self, kind, getattr(self, kind) + addresses.size * size)
        self._sectors[kind].update(np.unique(addresses // SECTOR).tolist())
        for owner in np.unique(owners):
            tensor = self.by_tensor.setdefault(extents[owner].name, {"load": 0, "store": 0})
            tensor[kind] += int((owners == owner).sum()) * size


class _Launch:
    """What the running launch may touch."""

    kernel = ""
    extents: list[Extent] = []
    traffic: Traffic | None = None
    patched: set[int] = set()  # the modules whose view of the language is the interpreter's already
    tables: list[tuple[weakref.ref, list[Extent]]] = []  # pointer tables, and the tensors whose addresses they hold


def _extents(name: str, argument: object) -> Iterator[Extent]:
    if isinstance(argument, tuple):
        for i, item in enumerate(argument):
            yield from _extents(f"{name}[{i}]", item)
    elif isinstance(argument, Tensor) and argument.numel():
        span = 1 + sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        yield Extent(name, argument.data_ptr(), argument.data_ptr() + span * argument.element_size())


def _check(kind: str, pointers, mask) -> None:
    size = interp._get_np_dtype(pointers.get_element_ty()).itemsize
    active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
    addresses = pointers.data[active].reshape(-1).astype(np.int64)
    if not addresses.size:
        return
    low, high = int(addresses.min()), int(addresses.max()) + size
    whole = next((i for i, e in enumerate(_Launch.extents) if e.first <= low and high <= e.end), -1)
    owners = np.full(addresses.shape, whole)
    if whole < 0:
        for i, extent in enumerate(_Launch.extents):
            owners[(addresses >= extent.first) & (addresses + size <= extent.end)] = i
    where = f"{_Launch.kernel}: program {interp.interpreter_builder.grid_idx}: {kind}"
    if (owners < 0).any():
        bad = int(addresses[owners < 0][0])
        message = f"{where} of {int((owners < 0).sum())} elements outside every tensor of the launch"
        if _Launch.extents:
            near = min(_Launch.extents, key=lambda e: min(abs(bad - e.first), abs(bad - e.end)))
            message += f"; the first is at byte {bad - near.first} of '{near.name}', which has {near.end - near.first}"
        raise OutOfBounds(message)
    if (addresses % size).any():
        raise OutOfBounds(f"{where} at an address that is no multiple of {size} bytes")
    if _Launch.traffic is not None:
        _Launch.traffic.add(kind, addresses, size, owners, _Launch.extents)


def _load(self, pointers, mask, *rest, original=Builder.create_masked_load, **keywords):
    _check("load", pointers, mask)
    return original(self, pointers, mask, *rest, **keywords)


def _store(self, pointers, value, mask, *rest, original=Builder.create_masked_store, **keywords):
    _check("store", pointers, mask)
    return original(self, pointers, value, mask, *rest, **keywords)


def _atomic(self, *args):
    raise NotImplementedError("atomics: the project's kernels are deterministic and use none")


def _hint(self, name, values, original=Handle.set_attr):
    """`multiple_of` of pointers and numbers: the compiler makes wide accesses of what follows the first element of a
    row."""
    if name == "tt.divisibility":
        what, unit = ("pointers", " bytes") if isinstance(self.dtype, tl.pointer_type) else ("numbers", "")
        for dimension, value in enumerate(values):
            starts = self.data.take([0], dimension) if self.data.ndim else self.data
            wrong = starts.astype(np.int64) % value != 0
            if wrong.any():
                raise OutOfBounds(
                    f"{_Launch.kernel}: {int(wrong.sum())} of {wrong.size} runs of {what} said to start at multiples"
                    f" of {value}{unit} do not"
                )
    return original(self, name, values)


def _patch_tensor(tensor, scope, original=interp._patch_lang_tensor):
    """A number as the end of a loop is an array of one element, which numpy 2.4 no longer turns into a number; Triton
    3.6 has it do so."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _argument(value, original=interp._implicit_cvt):
    """An integer from 2^31 to 2^32 reaches a kernel as int64; the interpreter would hold it in 32 bits."""
    if type(value) is int and 2**31 <= value < 2**32:
        return tl.tensor(Handle(np.array([value], dtype=np.int64), tl.int64), tl.int64)
    return original(value)


def _launch(self, *args, original=interp.GridExecutor.__call__, **keywords):
    names = inspect.getfullargspec(self.fn).args
    arguments = [*zip(names, args, strict=False), *keywords.items()]
    _Launch.kernel = self.fn.__name__
    _Launch.extents = [extent for name, argument in arguments for extent in _extents(name, argument)]
    _Launch.tables = [(table, extents) for table, extents in _Launch.tables if table() is not None]
    given = [argument.data_ptr() for _, argument in arguments if isinstance(argument, Tensor)]
    for reference, extents in _Launch.tables:
        if (known := reference()) is not None and known.data_ptr() in given:
            _Launch.extents += extents
    if _Launch.kernel == "pointer_table_kernel":
        table = dict(arguments)["TABLE"]
        _Launch.tables.append((weakref.ref(table), [e for e in _Launch.extents if e.name.startswith("TENSORS")]))
    _Launch.patched = {id(self.fn.__globals__)}
    if _Launch.traffic is not None:
        _Launch.traffic.launches += 1
    try:
        return original(self, *args, **keywords)
    except interp.InterpreterError as error:
        if isinstance(error.__cause__, OutOfBounds):
            raise error.__cause__ from None
        raise
    finally:
        _Launch.extents = []


def _device_function(self, *args, **keywords):
    """A call inside a kernel. The original patches all of the language at every one, most of a test's time."""
    if (module := id(self.fn.__globals__)) not in _Launch.patched:
        interp._patch_lang(self.fn)
        _Launch.patched.add(module)
    try:
        return self.rewrite()(*args, **keywords)
    except interp.InterpreterError:
        raise
    except Exception as error:
        raise interp.InterpreterError(repr(error)) from error


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the memory traffic of the kernels launched inside."""
    _Launch.traffic = count = Traffic()
    try:
        yield count
    finally:
        _Launch.traffic = None


def _first_configuration(self, *args, **keywords):
    """An autotuner without a device to measure on: the first configuration."""
    chosen = {k: v for k, v in self.configs[0].all_kwargs().items() if k in self.arg_names}
    return self.fn.run(*args, **{**keywords, **chosen})


@functools.cache
def install() -> None:
    """Repairs and guards the interpreter of this process, for good."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is off: start the process with TRITON_INTERPRET=1")
    interp._convert_float = _convert_float
    for name in dir(Builder):
        stem = name.removeprefix("create_")
        conversion = stem.startswith("fp_")
        if name != stem and not conversion and (stem.startswith("f") or stem in _FLOAT_METHODS):
            setattr(Builder, name, _in_float32(getattr(Builder, name)))
    Builder.cast_impl = _cast
    Builder.create_dot = _dot
    interp.ReduceOps.sum = _sum
    for operations, names in ((interp.ReduceOps, ("sum", "min_max")), (interp.ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            setattr(operations, name, _reduction(getattr(operations, name)))
    Builder.create_masked_load = _load
    Builder.create_masked_store = _store
    Builder.create_atomic_rmw = Builder.create_atomic_cas = _atomic
    interp.GridExecutor.__call__ = _launch
    interp.InterpretedFunction.__call__ = _device_function
    interp._implicit_cvt = _argument
    interp._patch_lang_tensor = _patch_tensor
    Handle.set_attr = _hint
    # Nothing to copy back: the tensors are the CPU's own (and copying would touch every page of a sparse one).
    interp.GridExecutor._restore_args_dev = lambda self, *arguments: None
    triton.runtime.autotuner.Autotuner.run = _first_configuration
