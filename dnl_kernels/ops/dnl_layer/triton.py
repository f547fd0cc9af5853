"""dnl_layer in two launches of Triton kernels: the dense accumulation y with its projections to query, key and value,
and the non-local operator with its output projection, the residual, the normalisation and the activation.

y stays in registers, a tile of positions with all its channels; only the projections are stored between the launches.
Under `residual` it waits in the result's own memory. Backward computes y and the projections again from the inputs,
so that nothing but these is kept, and is made of the backward passes of the parts.
"""

from __future__ import annotations

import collections
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._activations import parse
from ..._triton import architecture, dot_precision, power_of_two
from ..._triton_conv import (
    Images,
    Operand,
    _accumulated,
    _activate,
    _images,
    _pixels,
    _pointers,
    dense_bwd,
    dense_fwd,
    operand,
    reads_last,
)
from ..nonlocal_attention.triton import (
    INFINITY,
    LOG2E,
    _at,
    _fold_keys,
    _load,
    _positions,
    _reread,
    _store,
    _strides,
    _wide,
    nonlocal_attention_bwd,
    nonlocal_attention_fwd,
)
from . import pointwise, projected
from .config import LayerConfig
from .fused import LISTED, PARAMETERS

Parameters: Any = collections.namedtuple("Parameters", PARAMETERS)  # type: ignore[misc]  # noqa: PYI024


# --- accumulate and project ------------------------------------------------------------------------------------------


@triton.jit
def _project(
    y, n, outputs, WEIGHT, BIAS, OUT, first, rows, image, place, inside, stride, plane, LAST: tl.constexpr,
    PRECISION: tl.constexpr, TENSOR_CORES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """W y + b of a tile, into the channels first, first + 1, .. of OUT."""
    for start in range(0, rows, R):
        r = start + tl.arange(0, R)
        w = tl.load(WEIGHT + r[None, :] * outputs + n[:, None], mask=(r < rows)[None, :] & (n < outputs)[:, None],
                    other=0.0)  # fmt: skip
        x = tl.dot(_reread(y, start < rows, TENSOR_CORES), w, input_precision=PRECISION)
        if BIAS is not None:
            x += tl.load(BIAS + r, mask=r < rows, other=0.0).to(tl.float32)[None, :]
        to = _pointers(OUT, image, place, first + r, stride, plane, LAST, False)
        tl.store(to, x.to(OUT.dtype.element_ty), mask=inside[:, None] & (r < rows)[None, :])


@triton.jit(do_not_specialize=["TENSORS", "numbers", "SKIP", "skip_numbers", "count"])
def project_kernel(
    TENSORS, numbers, SKIP, skip_numbers, X, WEIGHT, BIAS, SCALE, SHIFT, SKIP_WEIGHT, SKIP_BIAS, Q, Q_BIAS, K, K_BIAS,
    V, V_BIAS, OUT, Y, count, pixels, plane, width, outputs, q_rows, v_rows, out_stride, y_stride, steps, skip_steps,
    tau,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP_ALIGNED: tl.constexpr, PRECISION: tl.constexpr, TENSOR_CORES: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tile of y = tau * sum_j K_j act(norm(x_j)) + b [+ A x_s + a], and of its projections, side by side in OUT."""
    p, image, place = _pixels(tl.program_id(0).to(tl.int64) * P, plane, P)
    inside = p < pixels
    n = tl.arange(0, N)
    y = _accumulated(
        tl.zeros((P, N), tl.float32), (TENSORS, numbers), X, WEIGHT, SCALE, SHIFT, image, place, inside, n, count,
        plane, width, outputs, steps[0], steps[1], steps[2], SIZE, ACTIVATION, SLOPE, LAST, ALIGNED, PRECISION, 0, C,
    )  # fmt: skip
    y *= tau
    if SKIP_WEIGHT is not None:
        y = _accumulated(
            y, (SKIP, skip_numbers), X, SKIP_WEIGHT, None, None, image, place, inside, n, 1, plane, width, outputs,
            skip_steps[0], skip_steps[1], skip_steps[2], SIZE, "identity", 0.0, LAST, SKIP_ALIGNED, PRECISION, 0, C,
        )  # fmt: skip
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if SKIP_BIAS is not None:
        y += tl.load(SKIP_BIAS + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    rounded = y.to(OUT.dtype.element_ty)
    if Y is not None:
        to = _pointers(Y, image, place, n, y_stride, plane, OUT_LAST, False)
        tl.store(to, rounded, mask=inside[:, None] & (n < outputs)[None, :])
    first = q_rows
    _project(rounded, n, outputs, Q, Q_BIAS, OUT, 0, q_rows, image, place, inside, out_stride, plane, OUT_LAST,
             PRECISION, TENSOR_CORES, R)  # fmt: skip
    if K is not None:
        first += q_rows
        _project(rounded, n, outputs, K, K_BIAS, OUT, q_rows, q_rows, image, place, inside, out_stride, plane, OUT_LAST,
                 PRECISION, TENSOR_CORES, R)  # fmt: skip
    _project(rounded, n, outputs, V, V_BIAS, OUT, first, v_rows, image, place, inside, out_stride, plane, OUT_LAST,
             PRECISION, TENSOR_CORES, R)  # fmt: skip


# --- the operator, and what follows it -------------------------------------------------------------------------------


@triton.jit
def attend_kernel(
    Q, K, V, RHO, WEIGHT, BIAS, SCALE, SHIFT, OUT, q_strides, k_strides, v_strides, out_strides, heads, N, scale,
    D: tl.constexpr, E: tl.constexpr, OUTPUTS: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr,
    TENSOR_CORES: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of act(scale (W_o concat_heads(attention) + b [+ y]) + shift); y stands where the result goes."""
    tiles = tl.cdiv(N, BLOCK_M)
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i = _positions(tile * BLOCK_M, BLOCK_M, WIDE)
    i_exists = i < N
    n = tl.arange(0, BLOCK_O)
    e = tl.arange(0, BLOCK_E)
    z = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for h in range(0, heads):
        head = tl.cast(h, tl.int64)
        Q_h, K_h, V_h = _at(Q, q_strides, b, head), _at(K, k_strides, b, head), _at(V, v_strides, b, head)
        factor = scale
        if KIND != "softmax":
            factor = scale * tl.exp(-2.0 * tl.load(RHO + h).to(tl.float32))
        q = i
        if KIND != "distance":
            q = _load(Q_h, q_strides, i, i_exists, D, BLOCK_D)
        out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        full = 0
        if TENSOR_CORES:
            full = N // BLOCK_N * BLOCK_N
            out, total, top = _fold_keys(
                out, total, top, q, i, i_exists, factor, 0, full, N, b, h, Q_h, K_h, V_h, None, None, q_strides,
                k_strides, v_strides, D, E, KIND, True, False, False, PRECISION, WORK, PRECISION, TENSOR_CORES,
                BLOCK_N, BLOCK_D, BLOCK_E, WIDE,
            )  # fmt: skip
        out, total, top = _fold_keys(
            out, total, top, q, i, i_exists, factor, full, N, N, b, h, Q_h, K_h, V_h, None, None, q_strides,
            k_strides, v_strides, D, E, KIND, True, False, True, PRECISION, WORK, PRECISION, TENSOR_CORES, BLOCK_N,
            BLOCK_D, BLOCK_E, WIDE,
        )  # fmt: skip
        out = (out / total[:, None]).to(WORK)
        w = tl.load(WEIGHT + n[None, :] * (heads * E) + h * E + e[:, None], mask=(n < OUTPUTS)[None, :] &
                    (e < E)[:, None], other=0.0)  # fmt: skip
        z = tl.dot(out, w, z, input_precision=PRECISION)
    if BIAS is not None:
        z += tl.load(BIAS + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    OUT += b.to(tl.int64) * out_strides[0]
    if RESIDUAL:
        z += _load(OUT, out_strides, i, i_exists, OUTPUTS, BLOCK_O).to(tl.float32)
    if SCALE is not None:
        z *= tl.load(SCALE + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if SHIFT is not None:
        z += tl.load(SHIFT + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    _store(OUT, out_strides, i, i_exists, _activate(z, ACTIVATION, SLOPE), OUTPUTS, BLOCK_O)


# --- launches --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """project: positions, channels of the states at once, rows of a projection at once. attend: queries, keys."""

    sizes: tuple[int, ...]
    warps: int
    stages: int


# (kernel, bytes of an element) -> the largest number of channels, padded to a power of two, of a tile -> tile.
TILES = {
    ("project", 2): {64: Tile((128, 32, 64), 8, 2), 128: Tile((64, 32, 32), 8, 2)},
    ("project", 4): {64: Tile((64, 32, 16), 8, 1)},
    ("attend", 2): {32: Tile((64, 64), 8, 2), 64: Tile((128, 32), 8, 2), 128: Tile((64, 32), 8, 1)},
    ("attend", 4): {64: Tile((64, 32), 8, 1)},
}
# What would spill on one architecture only: (architecture, kernel, bytes of an element).
TILES_OF = {
    (80, "attend", 4): {32: Tile((64, 32), 8, 1), 64: Tile((16, 32), 8, 1)},
    (90, "project", 4): {32: Tile((32, 32, 16), 8, 1)},
    (120, "project", 4): {32: Tile((64, 32, 16), 8, 1), 64: Tile((32, 32, 16), 8, 1)},
}


def tile(kernel: str, element: int, width: int) -> Tile:
    table = {**TILES[kernel, element], **TILES_OF.get((architecture(), kernel, element), {})}
    return table[next(most for most in sorted(table) if width <= most)]


class _Call(NamedTuple):
    """A layer: what the registered functions are given, in one form for images and tokens."""

    states: list[Tensor]
    skip: Tensor | None
    p: Any  # Parameters
    layer: LayerConfig

    @property
    def images(self) -> bool:
        return self.p.affine_weight.dim() == 4

    @property
    def tensor_cores(self) -> bool:
        return self.states[0].dtype != torch.float32 or dot_precision() == "tf32"

    @property
    def axis(self) -> int:
        return 1 if self.images else 2

    @property
    def heads(self) -> projected.Config:
        return projected.Config(self.layer.kernel, self.layer.heads, self.images, "triton")

    @property
    def width(self) -> int:
        return self.p.query_weight.shape[0] // self.layer.heads

    def new(self, channels: int) -> Tensor:
        shape = list(self.states[0].shape)
        shape[self.axis] = channels
        return self.states[0].new_empty(shape)

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of query, key (unless it is the query's) and value."""
        p = self.p
        pairs = [(p.query_weight, self.query_bias()), (p.key_weight, p.key_bias), (p.value_weight, p.value_bias)]
        return [pair for pair in pairs if pair[0] is not None]

    def query_bias(self) -> Tensor | None:
        """Distances of queries to keys that share it do not depend on it, but their rounding does."""
        return self.p.query_bias if self.p.key_weight is not None else None

    def split(self, products: Tensor) -> list[Tensor]:
        """query, key and value [B, h, D, N] or [B, h, N, D], where they are."""
        products = products.flatten(2) if self.images else products
        sizes = [w.shape[0] for w, _ in self.weights()]
        parts = [projected.split_heads(t, self.heads) for t in products.split(sizes, self.axis)]
        return [parts[0], parts[-2], parts[-1]]


def _row_stride(x: Tensor, images: bool) -> int:
    return x.stride(0) if images else x.stride(1)


def _source(states: list[Tensor], last: bool, images: bool) -> Operand:
    if images and last:
        states = [x.permute(0, 2, 3, 1) for x in states]
    return operand(states, last, merge=True)


def _list(source: Operand, like: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Addresses and numbers as kernel parameters: a launch for a table in memory is saved, in exchange for a kernel for
    each length in LISTED."""
    tensors = source.tensors or [like]
    more = next(n for n in LISTED if n >= len(tensors)) - len(tensors)
    rows = (source.strides, source.channels, source.firsts) if source.tensors else ([0], [0], [0])
    numbers = tuple(n for row in rows for n in (*row, *[0] * more))
    return (*tensors, *[tensors[-1]] * more), numbers


def _steps(weight: Tensor | None) -> tuple[int, int, int]:
    """The weight's steps by tap, channel and output. The filter is small and not copied into another order."""
    if weight is None:
        return 0, 0, 0
    return (1 if weight.dim() == 4 else 0), weight.stride(1), weight.stride(0)


def project(call: _Call, y: Tensor | None) -> Tensor:
    """The projections of y, side by side; y too where asked for."""
    p, images, first = call.p, call.images, call.states[0]
    given = [*call.states, *([] if call.skip is None else [call.skip])]
    last = not images or reads_last(given)
    at: Images = _images(first, not images)
    source = _source(call.states, last, images)
    skip = _source([call.skip], last, images) if call.skip is not None else source
    size = p.affine_weight.shape[2] if images else 1
    outputs, columns = p.affine_weight.shape[0], power_of_two(p.affine_weight.shape[0], 16)
    chosen = tile("project", first.element_size(), columns)
    products = call.new(sum(w.shape[0] for w, _ in call.weights()))
    weight, skip_weight = (None if w is None else w.contiguous() for w in (p.affine_weight, p.skip_weight))
    maps = [None if w is None else w.contiguous() for w in (p.query_weight, p.key_weight, p.value_weight)]
    skip_list = _list(skip, products) if call.skip is not None else ((products,), (0, 0, 0))
    rows, step, at_once = chosen.sizes
    kind, slope = parse(call.layer.input_activation)
    project_kernel[(triton.cdiv(at.pixels, rows),)](
        *_list(source, products), *skip_list, first, weight, p.affine_bias, p.norm_scale, p.norm_shift, skip_weight,
        p.skip_bias, maps[0], call.query_bias(), maps[1], p.key_bias, maps[2], p.value_bias, products, y,
        len(source.tensors), at.pixels, at.plane, at.width, outputs, p.query_weight.shape[0], p.value_weight.shape[0],
        _row_stride(products, images), 0 if y is None else _row_stride(y, images), _steps(weight),
        _steps(skip_weight), call.layer.tau, SIZE=size, ACTIVATION=kind, SLOPE=slope, LAST=last,
        OUT_LAST=not images, ALIGNED=source.aligned(at, size), SKIP_ALIGNED=skip.aligned(at, size),
        PRECISION=dot_precision(), TENSOR_CORES=call.tensor_cores, P=rows, N=columns, C=step,
        R=power_of_two(max(p.query_weight.shape[0], p.value_weight.shape[0]), 16, at_once),
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return products


def attend(call: _Call, products: Tensor, out: Tensor) -> None:
    """The rest of the layer, into `out`, in place in whatever buffer it is part of."""
    p, layer = call.p, call.layer
    query, key, value = call.split(products)
    position, feature = (3, 2) if call.images else (2, 3)
    D, E, N, outputs = query.shape[feature], value.shape[feature], query.shape[position], p.output_weight.shape[0]
    blocks = [power_of_two(n, 16) for n in (D, E, outputs)]
    chosen = tile("attend", out.element_size(), max(blocks))
    precision, half = dot_precision(), out.dtype != torch.float32
    activation, slope = parse(layer.activation)
    # In float32 distances are sums of squared differences, exact at any offset. In half types the coordinates' own
    # rounding is what an offset costs; products of them are exact.
    kind = layer.kernel if layer.kernel == "softmax" or half else "distance"
    to = (out.flatten(2) if call.images else out)[:, None]
    work = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[out.dtype]
    attend_kernel[(out.shape[0] * triton.cdiv(N, chosen.sizes[0]),)](
        query, key, value, p.rho, p.output_weight.contiguous(), p.output_bias, p.output_scale, p.output_shift, to,
        *(_strides(t, call.images) for t in (query, key, value, to)), layer.heads, N,
        LOG2E.value * (call.width**-0.5 if kind == "softmax" else 1.0), D=D, E=E, OUTPUTS=outputs, KIND=kind,
        ACTIVATION=activation, SLOPE=slope, RESIDUAL=layer.residual, PRECISION=precision, WORK=work,
        TENSOR_CORES=call.tensor_cores, WIDE=_wide((query, key, value, to), call.images),
        BLOCK_M=chosen.sizes[0], BLOCK_N=chosen.sizes[1], BLOCK_D=blocks[0], BLOCK_E=blocks[1], BLOCK_O=blocks[2],
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def layer_into(call: _Call, out: Tensor) -> None:
    if out.numel():
        with torch.cuda.device_of(out):
            attend(call, project(call, out if call.layer.residual else None), out)


def _call(states, skip, arguments) -> _Call:
    count = len(PARAMETERS)
    return _Call(states, skip, Parameters(*arguments[:count]), LayerConfig(*arguments[count:]))


def dnl_layer_fwd(states, skip_input, *arguments) -> Tensor:
    call = _call(states, skip_input, arguments)
    out = call.new(call.p.output_weight.shape[0])
    layer_into(call, out)
    return out


def dnl_layer_bwd(dout, states, skip_input, *arguments) -> tuple[list[Tensor], Tensor]:
    """dstates (with that of skip_input at the end), and the gradients of all given parameters in one vector."""
    *given, need_states, need_parameters = arguments
    call = _call(states, skip_input, given)
    if not dout.numel():
        inputs = [*states, *([] if skip_input is None else [skip_input])]
        size = sum(t.numel() for t in call.p if t is not None)
        zeros = [t.new_zeros(t.shape) for t in inputs] if need_states else []
        return zeros, dout.new_zeros(size if need_parameters else 0)
    with torch.cuda.device_of(dout):
        return _backward(call, dout, need_states, need_parameters)


def _backward(call: _Call, dout: Tensor, need_states: bool, need: bool) -> tuple[list[Tensor], Tensor]:
    p, layer, images = call.p, call.layer, call.images
    forward, backward = partial(dense_fwd, last=not images), partial(dense_bwd, last=not images)
    plain = (None, None, "identity", 1.0)
    found: dict[str, Tensor | None] = {}

    def matrix(weight: Tensor) -> Tensor:
        return weight[:, :, None, None] if images else weight

    def shaped(t: Tensor) -> Tensor:  # [B, h, D, N] or [B, h, N, D] as y is
        t = projected.join_heads(t, call.heads)
        return t.unflatten(2, dout.shape[2:]) if images else t

    y = call.new(p.affine_weight.shape[0])
    products = project(call, y)
    query, key, value = call.split(products)
    bandwidth = None if p.rho is None else torch.exp(p.rho.float())
    static = (call.width**-0.5, True, False, images)
    out, shift, total = nonlocal_attention_fwd(query, key, value, bandwidth, None, *static)
    attended = shaped(out)
    dz = dout.contiguous()
    if p.output_scale is not None or p.output_shift is not None or layer.activation != "identity":
        z = forward([attended], matrix(p.output_weight), p.output_bias, *plain)
        z = z + y if layer.residual else z
        scale, shifted = p.output_scale, p.output_shift
        scale = z.new_ones(z.shape[call.axis]) if scale is None else scale
        shifted = torch.zeros_like(scale) if shifted is None else shifted
        tensors, needs = (z, scale, shifted), (True, p.output_scale is not None, p.output_shift is not None)
        dz, found["output_scale"], found["output_shift"] = pointwise.backward(
            pointwise.Config(layer.activation, call.axis), dz, tensors, (), needs
        )
    (dattended,), dweight, found["output_bias"], *_ = backward(
        dz, [attended], matrix(p.output_weight), *plain, True, need, need and p.output_bias is not None, False
    )
    found["output_weight"] = dweight
    pulled = projected.split_heads(dattended.flatten(2) if images else dattended, call.heads)
    dquery, dkey, dvalue, dbandwidth = nonlocal_attention_bwd(
        pulled, query, key, value, bandwidth, None, out, shift, total, *static, need and p.rho is not None
    )
    if bandwidth is not None and need:
        found["rho"] = dbandwidth * bandwidth
    parts = [dquery, dkey, dvalue] if p.key_weight is not None else [dquery + dkey, dvalue]
    weights = [w for w, _ in call.weights()]
    (dy,), dweight, dbias, *_ = backward(
        torch.cat([shaped(t) for t in parts], call.axis), [y], matrix(torch.cat(weights)), *plain, True, need, need,
        False,
    )  # fmt: skip
    if need:
        sizes, names = (
            [w.shape[0] for w in weights],
            ["query", "key", "value"] if len(weights) == 3 else ["query", "value"],
        )
        for name, w, b in zip(names, dweight.split(sizes), dbias.split(sizes), strict=True):
            found[f"{name}_weight"], found[f"{name}_bias"] = w, b
    dy = dy + dz if layer.residual else dy
    dstates, found["affine_weight"], found["affine_bias"], found["norm_scale"], found["norm_shift"] = backward(
        dy, call.states, p.affine_weight, p.norm_scale, p.norm_shift, layer.input_activation, layer.tau, need_states,
        need, need and p.affine_bias is not None, need,
    )  # fmt: skip
    if call.skip is not None:
        dskip, found["skip_weight"], found["skip_bias"], *_ = backward(
            dy, [call.skip], p.skip_weight, *plain, need_states, need, need and p.skip_bias is not None, False
        )
        dstates = [*dstates, *dskip]
    if not need:
        return dstates, dout.new_empty(0)
    given = [(name, t) for name, t in p._asdict().items() if t is not None]
    return dstates, torch.cat([found[name].to(t.dtype).flatten() for name, t in given])  # type: ignore[union-attr]
