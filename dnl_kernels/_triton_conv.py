"""The dense accumulation in Triton, of images (any odd filter) and of tokens (a 1x1 filter on rows): an implicit GEMM.

    y = scale * sum_j W_j (*) act(norm_scale x_j + norm_shift) + bias

The rows of the matrix are pixels, also across images, so that small images fill a tile. Its columns are the channels of
the states, times the taps of the filter: a loop over a table of pointers, in which states that lie side by side in one
buffer are one entry. A state is normalised and activated on its way into the product, in float32, and again in the
backward pass; nothing is concatenated. Tiles multiply on tensor cores and add up in float32 registers. Sums over pixels
are in two stages, partial sums of tiles and then torch's sum over these: deterministic, no atomics.

No shape goes to cuDNN or cuBLAS instead. They would want the activated concatenation in memory, and PyTorch lets them
add up half types in half precision (allow_fp16_reduced_precision_reduction) and cuDNN sum a weight gradient in any
order; what the operators promise is the opposite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import parse
from ._triton import VECTOR, aligned, architecture, as_rows, dot_precision, pointer_table, power_of_two

# --- inside the kernels ----------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def _tanh(u):
    s = u * u  # the series below 0.3, where the other form would cancel; its next term is below half a unit there
    series = u * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.3, series, tl.where(u < 0, -far, far))


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == "relu":
        u = tl.where(u <= 0, 0.0, u)  # a NaN stays
    elif ACTIVATION == "leaky_relu":
        u = tl.where(u > 0, u, SLOPE * u)
    elif ACTIVATION == "tanh":
        u = _tanh(u)
    elif ACTIVATION == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == "silu":
        u = u * _sigmoid(u)
    return u


@triton.jit
def _pull(g, u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act'(u) * g"""
    if ACTIVATION == "relu":
        g = tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(u > 0, g, SLOPE * g)
    elif ACTIVATION == "tanh":
        t = _tanh(u)
        g = g * (1.0 - t * t)
    elif ACTIVATION == "gelu":
        g = g * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u))
    elif ACTIVATION == "silu":
        s = _sigmoid(u)
        g = g * (s * (1.0 + u * (1.0 - s)))
    return g


@triton.jit
def _normalise(x, c, exists, SCALE, SHIFT):
    """norm_scale x + norm_shift of a tile [pixels, channels] in float32."""
    u = x.to(tl.float32)
    if SCALE is not None:
        u *= tl.load(SCALE + c, mask=exists, other=0.0).to(tl.float32)[None, :]
    if SHIFT is not None:
        u += tl.load(SHIFT + c, mask=exists, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def _listed(LIST, j):
    """The j-th of a few states that are parameters of the kernel: (their addresses, numbers as a table's columns)."""
    TENSORS, numbers = LIST[0], LIST[1]
    length: tl.constexpr = len(TENSORS)
    address = TENSORS[0].to(tl.int64, bitcast=True)
    stride, channels = tl.cast(numbers[0], tl.int64), tl.cast(numbers[length], tl.int64)
    first = tl.cast(numbers[2 * length], tl.int64)
    for k in tl.static_range(1, length):
        address = tl.where(j == k, TENSORS[k].to(tl.int64, bitcast=True), address)
        stride = tl.where(j == k, numbers[k], stride)
        channels = tl.where(j == k, numbers[length + k], channels)
        first = tl.where(j == k, numbers[2 * length + k], first)
    return address, stride, channels, first


@triton.jit
def _entry(TABLE, j, like, LAST: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """The j-th state: its address, its row stride, how many channels it has, and its first channel.

    COLUMNS: of the table in memory; 0 for a list (see _listed)."""
    if COLUMNS == 0:
        address, stride, channels, first = _listed(TABLE, j)
    else:
        TABLE += j * COLUMNS
        address, stride, channels = tl.load(TABLE), tl.load(TABLE + 1), tl.load(TABLE + 2)
        first = tl.load(TABLE + 3)
    channels = channels.to(tl.int32)
    if LAST and ALIGNED:  # rows of channels, whole pieces of 16 bytes; of planes any number may be aligned
        channels = tl.multiple_of(channels, VECTOR_ELEMENTS(like))
    return address.to(like.dtype, bitcast=True), stride, channels, first


@triton.constexpr_function
def VECTOR_ELEMENTS(like):
    return 128 // like.dtype.element_ty.primitive_bitwidth


@triton.jit
def _chunk(TABLE, pid, count, C: tl.constexpr, STATES: tl.constexpr, COLUMNS: tl.constexpr):
    """Which state, and which of its channels, the pid-th chunk of C channels is."""
    index = tl.arange(0, STATES)
    starts = tl.load(TABLE + index * COLUMNS + 4, mask=index < count, other=2147483647)
    j = tl.sum((starts <= pid).to(tl.int32), 0) - 1
    start = tl.load(TABLE + j * COLUMNS + 4).to(tl.int32)
    return j, (pid - start) * C + tl.arange(0, C)


@triton.jit
def _pixels(first, plane, P: tl.constexpr):
    """Number, image, and place in the image, of a tile of pixels."""
    p = first + tl.arange(0, P)
    return p, p // plane, (p % plane).to(tl.int32)


@triton.jit
def _tap(place, inside, tap, plane, width, SIZE: tl.constexpr):
    """The places that a tap of the filter sees, and which of them are in the image."""
    if SIZE > 1:
        dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        row, column = place // width + dy, place % width + dx
        inside = inside & (row >= 0) & (row < plane // width) & (column >= 0) & (column < width)
        place += dy * width + dx
    return place, inside


@triton.jit
def _load(base, image, place, inside, c, exists, stride, plane, LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile [pixels, channels]; zeros outside."""
    pointers = _pointers(base, image, place, c, stride, plane, LAST, ALIGNED)
    return tl.load(pointers, mask=inside[:, None] & exists[None, :], other=0.0)


@triton.jit
def _pointers(base, image, place, c, stride, plane, LAST: tl.constexpr, ALIGNED: tl.constexpr):
    if LAST:  # [pixels, channels]
        pointers = base + (((image * plane + place) * stride)[:, None] + c[None, :])
        return tl.multiple_of(pointers, (1, 16)) if ALIGNED else pointers
    pointers = base + ((image * stride + place)[:, None] + (c.to(tl.int64) * plane)[None, :])
    return tl.multiple_of(pointers, (16, 1)) if ALIGNED else pointers


@triton.jit
def _accumulated(
    y, TABLE, X, WEIGHT, SCALE, SHIFT, image, place, inside, n, count, plane, width, outputs, tap_stride,
    channel_stride, output_stride, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y + sum_j W_j (*) act(norm_scale x_j + norm_shift), a tile [pixels, outputs n]."""
    TAPS: tl.constexpr = SIZE * SIZE
    for j in range(0, count):
        state, stride, channels, first = _entry(TABLE, j, X, LAST, ALIGNED, COLUMNS)
        for i in range(0, tl.cdiv(channels, K) * TAPS):
            c = i // TAPS * K + tl.arange(0, K)
            tap = i % TAPS
            exists = c < channels
            seen, valid = _tap(place, inside, tap, plane, width, SIZE)
            x = _load(state, image, seen, valid, c, exists, stride, plane, LAST, ALIGNED)
            u = _activate(_normalise(x, first + c, exists, SCALE, SHIFT), ACTIVATION, SLOPE)
            z = tl.where(valid[:, None], u, 0.0).to(x.dtype)  # the padding comes after the activation
            w = WEIGHT + tap * tap_stride + ((first + c) * channel_stride)[:, None] + (n * output_stride)[None, :]
            w = tl.load(w, mask=exists[:, None] & (n < outputs)[None, :], other=0.0)
            y = tl.dot(z, w, y, input_precision=PRECISION)
    return y


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def accumulate_kernel(
    TABLE, X, WEIGHT, BIAS, SCALE, SHIFT, Y, MOMENTS, count, pixels, plane, width, outputs, y_stride,
    tap_stride, channel_stride, output_stride, scale,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of y, and its means and sums of squared deviations per channel into MOMENTS [tiles, 2, outputs]."""
    first_pixel = tl.program_id(0).to(tl.int64) * P
    p, image, place = _pixels(first_pixel, plane, P)
    inside = p < pixels
    n = tl.program_id(1) * N + tl.arange(0, N)
    y = _accumulated(
        tl.zeros((P, N), tl.float32), TABLE, X, WEIGHT, SCALE, SHIFT, image, place, inside, n, count, plane, width,
        outputs, tap_stride, channel_stride, output_stride, SIZE, ACTIVATION, SLOPE, LAST, ALIGNED, PRECISION,
        COLUMNS, K,
    )  # fmt: skip
    y *= scale
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    rounded = y.to(Y.dtype.element_ty)
    mask = inside[:, None] & (n < outputs)[None, :]
    tl.store(_pointers(Y, image, place, n, y_stride, plane, Y_LAST, False), rounded, mask=mask)
    if MOMENTS is not None:  # of what was stored; around the tile's own mean, so that a large mean cancels nothing
        y = rounded.to(tl.float32)
        elements = tl.minimum(pixels - first_pixel, P).to(tl.float32)
        mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / elements
        deviation = tl.where(inside[:, None], y - mean[None, :], 0.0)
        MOMENTS += tl.program_id(0).to(tl.int64) * 2 * outputs + n
        tl.store(MOMENTS, mean, mask=n < outputs)
        tl.store(MOMENTS + outputs, tl.sum(deviation * deviation, 0), mask=n < outputs)


@triton.jit(do_not_specialize=["count"])
def pull_kernel(
    DY, TABLE, DTABLE, X, DX, WEIGHT, SCALE, SHIFT, PARTIAL, count, pixels, plane, width, outputs, total, dy_stride,
    tap_stride, channel_stride, output_stride, scale,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, Y_LAST: tl.constexpr,
    DX_LAST: tl.constexpr,
    ADD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """du = act'(u) * scale * W^T dy on a tile of one state's channels, u = norm_scale x + norm_shift. Stores (or adds)
    dx = norm_scale * du, and the tile's sums of du * x and of du into PARTIAL [tiles, 2, total]."""
    TAPS: tl.constexpr = SIZE * SIZE
    p, image, place = _pixels(tl.program_id(0).to(tl.int64) * P, plane, P)
    inside = p < pixels
    j, c = _chunk(TABLE, tl.program_id(1), count, C, STATES, COLUMNS)
    state, stride, channels, first = _entry(TABLE, j, X, LAST, ALIGNED, COLUMNS)
    exists = c < channels
    g = tl.zeros((P, C), tl.float32)
    for i in range(0, tl.cdiv(outputs, K) * TAPS):
        n = i // TAPS * K + tl.arange(0, K)
        tap = i % TAPS
        seen, valid = _tap(place, inside, TAPS - 1 - tap, plane, width, SIZE)  # the filter turned around
        dy = _load(DY, image, seen, valid, n, n < outputs, dy_stride, plane, Y_LAST, False)
        w = WEIGHT + tap * tap_stride + (n * output_stride)[:, None] + ((first + c) * channel_stride)[None, :]
        w = tl.load(w, mask=(n < outputs)[:, None] & exists[None, :], other=0.0)
        g = tl.dot(dy, w, g, input_precision=PRECISION)
    mask = inside[:, None] & exists[None, :]
    x = _load(state, image, place, inside, c, exists, stride, plane, LAST, ALIGNED)
    g = tl.where(mask, _pull(g * scale, _normalise(x, first + c, exists, SCALE, SHIFT), ACTIVATION, SLOPE), 0.0)
    if PARTIAL is not None:
        PARTIAL += tl.program_id(0).to(tl.int64) * 2 * total + first + c
        tl.store(PARTIAL, tl.sum(g * x.to(tl.float32), 0), mask=exists)
        tl.store(PARTIAL + total, tl.sum(g, 0), mask=exists)
    if DTABLE is not None:
        if SCALE is not None:
            g *= tl.load(SCALE + first + c, mask=exists, other=0.0).to(tl.float32)[None, :]
        dstate = tl.load(DTABLE + 2 * j).to(DX.dtype, bitcast=True)
        to = _pointers(dstate, image, place, c, tl.load(DTABLE + 2 * j + 1), plane, DX_LAST, ALIGNED)
        if ADD:
            g += tl.load(to, mask=mask, other=0.0)
        tl.store(to, g.to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "steps"])
def weight_gradient_kernel(
    DY, TABLE, X, SCALE, SHIFT, PARTIAL, count, steps, pixels, plane, width, outputs, total, dy_stride, scale,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """scale * sum dy z over `steps` tiles of pixels, for one tap and a chunk of channels: PARTIAL [.., N, C, taps]."""
    TAPS: tl.constexpr = SIZE * SIZE
    j, c = _chunk(TABLE, tl.program_id(1), count, C, STATES, COLUMNS)
    tap = tl.program_id(2) % TAPS
    n = tl.program_id(2) // TAPS * N + tl.arange(0, N)
    state, stride, channels, first = _entry(TABLE, j, X, LAST, ALIGNED, COLUMNS)
    exists = c < channels
    dw = tl.zeros((N, C), tl.float32)
    for i in range(0, steps):
        p, image, place = _pixels((tl.program_id(0).to(tl.int64) * steps + i) * P, plane, P)
        inside = p < pixels
        seen, valid = _tap(place, inside, tap, plane, width, SIZE)
        x = _load(state, image, seen, valid, c, exists, stride, plane, LAST, ALIGNED)
        u = _activate(_normalise(x, first + c, exists, SCALE, SHIFT), ACTIVATION, SLOPE)
        z = tl.where(valid[:, None], u, 0.0).to(x.dtype)
        dy = _load(DY, image, place, inside, n, n < outputs, dy_stride, plane, Y_LAST, False)
        dw = tl.dot(tl.trans(dy), z, dw, input_precision=PRECISION)
    at = ((tl.program_id(0).to(tl.int64) * outputs + n)[:, None] * total + (first + c)[None, :]) * TAPS + tap
    tl.store(PARTIAL + at, dw * scale, mask=(n < outputs)[:, None] & exists[None, :])


# --- launches --------------------------------------------------------------------------------------------------------

COLUMNS = 5  # of the table: address, row stride, channels, first channel, first chunk
SPLITS = 512  # programs that a weight gradient is split into, at most


class Images(NamedTuple):
    """Where pixels are: B images of H x W. Tokens are one image with one row."""

    images: int
    height: int
    width: int

    @property
    def plane(self) -> int:
        return self.height * self.width

    @property
    def pixels(self) -> int:
        return self.images * self.plane


class Operand(NamedTuple):
    """Matrices [B, C, H * W], or [pixels, C] (last): their row strides and their first channels."""

    tensors: list[Tensor]
    strides: list[int]
    firsts: list[int]
    last: bool

    @property
    def channels(self) -> list[int]:
        return [x.shape[1] for x in self.tensors]

    def chunks(self, size: int) -> list[int]:
        """The number of the first chunk of `size` channels of each state, and how many there are."""
        numbers = [0]
        for channels in self.channels:
            numbers.append(numbers[-1] + triton.cdiv(channels, size))
        return numbers

    def table(self, size: int, device: torch.device) -> Tensor:
        return pointer_table(
            self.tensors, self.strides, self.channels, self.firsts, self.chunks(size)[:-1], device=device
        )

    def aligned(self, at: Images, filter_size: int) -> bool:
        """Whether threads may access 16 bytes at once, along the contiguous dimension."""
        lengths = self.channels if self.last else [at.plane]
        fits = all(n * x.element_size() % VECTOR == 0 for n in lengths for x in self.tensors[:1])
        return fits and aligned(self.tensors, self.strides) and (self.last or filter_size == 1)


def operand(states: Sequence[Tensor], last: bool, merge: bool = False) -> Operand:
    """[B, C_j, H, W], or with `last` [.., C_j], as matrices; read in place where they are slices of a buffer.

    merge: states that lie side by side in a buffer become one."""
    _, found, strides = as_rows(states, [states[0].dim() - 1 if last else 1])
    result = Operand([], [], [], last)
    first = 0
    for x, stride in zip(found, strides, strict=True):
        channels = x.shape[-1 if last else 1]
        sizes = [math.prod(x.shape[:-1]), channels] if last else [x.shape[0], channels, math.prod(x.shape[2:])]
        steps = [stride, 1] if last else [stride, sizes[2], 1]
        if channels:
            before = result.tensors[-1] if merge and result.tensors else None
            if (
                before is not None
                and before.untyped_storage()._cdata == x.untyped_storage()._cdata
                and (stride == result.strides[-1] or sizes[0] == 1)
                and before.storage_offset() + before.shape[1] * steps[1] == x.storage_offset()
            ):
                sizes[1] += before.shape[1]
                result.tensors[-1] = before.as_strided(sizes, before.stride())
            else:
                result.tensors.append(x.as_strided(sizes, steps))
                result.strides.append(stride)
                result.firsts.append(first)
        first += channels
    return result


class Problem(NamedTuple):
    """A call. weight [D, C, k, k] or [D, C]; y and dy lie as `y_last` says."""

    at: Images
    weight: Tensor
    norm_scale: Tensor | None
    norm_shift: Tensor | None
    activation: str
    scale: float
    y_last: bool

    @property
    def size(self) -> int:
        return self.weight.shape[2] if self.weight.dim() == 4 else 1

    def filters(self) -> tuple[Tensor, int, int, int]:
        """The weight, and its steps by tap, channel and output. A filter's taps are put outside: rows of a tile."""
        outputs, channels = self.weight.shape[:2]
        if self.size == 1:
            return self.weight.contiguous(), 0, 1, channels
        return self.weight.permute(2, 3, 1, 0).contiguous(), channels * outputs, outputs, 1

    def static(self) -> dict:
        kind, slope = parse(self.activation)
        return {
            "SIZE": self.size, "ACTIVATION": kind, "SLOPE": slope, "PRECISION": dot_precision(), "COLUMNS": COLUMNS,
        }  # fmt: skip


class Tile(NamedTuple):
    """Rows (pixels) and the limit of columns of a tile of the result, and the step of the summed dimension."""

    rows: int
    columns: int
    step: int
    warps: int


# Half types multiply on tensor cores. float32 does so only in tf32, and else in registers, which want smaller tiles.
TILES = {
    "accumulate": {2: Tile(64, 64, 32, 4), 4: Tile(64, 64, 16, 8)},
    "pull": {2: Tile(64, 64, 32, 4), 4: Tile(64, 32, 16, 4)},
    "weight": {2: Tile(64, 64, 32, 4), 4: Tile(32, 32, 16, 4)},
}
# What would spill on one architecture only: (architecture, kernel, bytes of an element).
TILES_OF = {(100, "accumulate", 4): Tile(32, 64, 16, 8)}


def tile(kernel: str, like: Tensor) -> Tile:
    size = like.element_size()
    return TILES_OF.get((architecture(), kernel, size), TILES[kernel][size])


def accumulate(
    problem: Problem, states: Operand, bias: Tensor | None, y: Tensor, y_stride: int, moments: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Writes y, in place in whatever buffer it is part of; with `moments` its mean and biased variance per channel."""
    p, at, t = problem, problem.at, tile("accumulate", y)
    outputs = p.weight.shape[0]
    tiles, columns = triton.cdiv(at.pixels, t.rows), power_of_two(outputs, 16, t.columns)
    partial = y.new_empty((tiles, 2, outputs), dtype=torch.float32) if moments else None
    weight, *steps = p.filters()
    accumulate_kernel[(tiles, triton.cdiv(outputs, columns))](
        states.table(t.step, y.device), states.tensors[0] if states.tensors else y, weight, bias,
        p.norm_scale, p.norm_shift, y, partial, len(states.tensors), at.pixels, at.plane, at.width, outputs, y_stride,
        *steps, p.scale, **p.static(), LAST=states.last, Y_LAST=p.y_last, ALIGNED=states.aligned(at, p.size),
        P=t.rows, N=columns, K=t.step, num_warps=t.warps,
    )  # fmt: skip
    if partial is None:
        return None
    # The tiles' means and deviations put together; all tiles but the last have `rows` pixels.
    means, deviations = partial.unbind(1)
    last = at.pixels - (tiles - 1) * t.rows
    mean = (means[:-1].sum(0) * t.rows + means[-1] * last) / at.pixels
    between = (means - mean).square()
    return mean, (deviations.sum(0) + between[:-1].sum(0) * t.rows + between[-1] * last) / at.pixels


def pull(
    problem: Problem, dy: Operand, states: Operand, dstates: Operand | None, need_norm: bool, add: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Writes the gradients of the states, or adds them; the gradients of norm_scale and norm_shift, float32 [C]."""
    p, at, t = problem, problem.at, tile("pull", dy.tensors[0])
    outputs, total = p.weight.shape[:2]
    columns = power_of_two(max(states.channels), 16, t.columns)
    tiles = triton.cdiv(at.pixels, t.rows)
    partial = p.weight.new_empty((tiles, 2, total), dtype=torch.float32) if need_norm else None
    weight, *steps = p.filters()
    vectors = states.aligned(at, 1) and (dstates is None or dstates.aligned(at, 1))
    pull_kernel[(tiles, states.chunks(columns)[-1])](
        dy.tensors[0], states.table(columns, dy.tensors[0].device),
        None if dstates is None else pointer_table(dstates.tensors, dstates.strides),
        states.tensors[0], None if dstates is None else dstates.tensors[0], weight, p.norm_scale, p.norm_shift, partial,
        len(states.tensors), at.pixels, at.plane, at.width, outputs, total, dy.strides[0], *steps, p.scale,
        **p.static(), LAST=states.last, Y_LAST=p.y_last, DX_LAST=dstates is not None and dstates.last, ADD=add,
        ALIGNED=vectors, STATES=power_of_two(len(states.tensors), 2), P=t.rows, C=columns, K=t.step, num_warps=t.warps,
    )  # fmt: skip
    if partial is None:
        return None
    return tuple(partial.sum(0).unbind(0))  # type: ignore[return-value]


def weight_gradient(problem: Problem, dy: Operand, states: Operand) -> Tensor:
    """The gradient of the weight, float32."""
    p, at, t = problem, problem.at, tile("weight", dy.tensors[0])
    outputs, total, taps = p.weight.shape[0], p.weight.shape[1], p.size**2
    columns, rows = power_of_two(max(states.channels), 16, t.columns), power_of_two(outputs, 16, t.columns)
    chunks, others = states.chunks(columns)[-1], triton.cdiv(outputs, rows) * taps
    tiles = triton.cdiv(at.pixels, t.step)
    steps = triton.cdiv(tiles, min(tiles, max(SPLITS // (chunks * others), 1)))
    partial = p.weight.new_empty((triton.cdiv(tiles, steps), *p.weight.shape), dtype=torch.float32)
    weight_gradient_kernel[(partial.shape[0], chunks, others)](
        dy.tensors[0], states.table(columns, dy.tensors[0].device), states.tensors[0], p.norm_scale, p.norm_shift,
        partial, len(states.tensors), steps, at.pixels, at.plane, at.width, outputs, total, dy.strides[0], p.scale,
        **p.static(), LAST=states.last, Y_LAST=p.y_last, ALIGNED=states.aligned(at, p.size),
        STATES=power_of_two(len(states.tensors), 2), P=t.step, C=columns, N=rows,
        # As few threads as keep 16 bytes for each in the tiles that are read.
        num_warps=power_of_two(t.step * min(columns, rows) * p.weight.element_size() // (32 * VECTOR), 1, t.warps),
    )  # fmt: skip
    return partial.sum(0)


# --- the two operators -----------------------------------------------------------------------------------------------


def _images(x: Tensor, last: bool) -> Images:
    return Images(1, 1, math.prod(x.shape[:-1])) if last else Images(x.shape[0], *x.shape[2:])


def reads_last(images: Sequence[Tensor]) -> bool:
    """Whether the states are images whose channels lie side by side: read as rows, in 16-byte pieces for any filter."""
    return all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in images)


def _read(states: Sequence[Tensor], last: bool, merge: bool = False) -> Operand:
    if last or not reads_last(states):
        return operand(states, last, merge)
    return operand([x.permute(0, 2, 3, 1) for x in states], True, merge)


def dense_fwd(states, weight, bias, norm_scale, norm_shift, activation, scale, *, last: bool) -> Tensor:
    """dense_linear (last) and dense_conv2d, forward."""
    first = states[0]
    shape = (*first.shape[:-1], weight.shape[0]) if last else (first.shape[0], weight.shape[0], *first.shape[2:])
    y = weight.new_empty(shape)
    if y.numel():
        problem = Problem(_images(first, last), weight, norm_scale, norm_shift, activation, scale, last)
        outputs = weight.shape[0]
        with torch.cuda.device_of(y):
            stride = outputs if last else outputs * problem.at.plane
            accumulate(problem, _read(states, last, merge=True), bias, y, stride)
    return y


def dense_bwd(
    dy, states, weight, norm_scale, norm_shift, activation, scale, need_states, need_weight, need_bias, need_norm,
    *, last: bool,
):  # fmt: skip
    """Their backward: dstates, dweight, dbias, dnorm_scale, dnorm_shift; empty where not wanted."""
    needs = [need_weight, need_bias, need_norm and norm_scale is not None, need_norm and norm_shift is not None]
    shapes = [weight.shape, weight.shape[:1], weight.shape[1:2], weight.shape[1:2]]
    dstates = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in states] if need_states else []
    found = [weight.new_zeros(shape if n else (0, *shape[1:])) for n, shape in zip(needs, shapes, strict=True)]
    if dy.numel() and any(x.numel() for x in states):
        problem = Problem(_images(states[0], last), weight, norm_scale, norm_shift, activation, scale, last)
        with torch.cuda.device_of(dy):
            pulled = operand([dy], last)
            if need_states or any(needs[2:]):
                into = operand(dstates, last) if need_states else None
                sums = pull(problem, pulled, _read(states, last), into, any(needs[2:]))
                for i in (0, 1):
                    if needs[2 + i] and sums is not None:
                        found[2 + i] = sums[i].to(weight.dtype)
            if need_weight:
                found[0] = weight_gradient(problem, pulled, _read(states, last, merge=True)).to(weight.dtype)
    else:
        dstates = [x.zero_() for x in dstates]
    if need_bias and dy.numel():  # one pass, and torch's own sum is a good one
        others = [d for d in range(dy.dim()) if d != (dy.dim() - 1 if last else 1)]
        found[1] = (dy.sum(others, dtype=torch.float32) if others else dy).to(weight.dtype)
    return dstates, *found
