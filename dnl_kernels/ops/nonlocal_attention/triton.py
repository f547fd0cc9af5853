"""nonlocal_attention in Triton: tiles of queries against tiles of keys, the weights recomputed in the backward.

Scores are exponents of 2. Three kinds: "softmax" (factor q.k), "gaussian" (factor (q.k - |k|^2 / 2) with centred q and
k, the normalised Gaussian without the constant of its row) and "distance" (-factor |q - k|^2 / 2, the unnormalised one:
from differences, exact at any scale and offset, hence without tensor cores). kernel="dot" never gets here: it is two
matrix products, for which the vendor's library is the better choice (dot.py).

Tensors are read and written where they are, by their strides, in either layout. Products of half types accumulate in
float32; float32 is multiplied in tf32 only where torch allows it. Sums have a fixed order and there are no atomics:
the query's gradient has a kernel of its own, which also leaves what the key's and value's needs to know of each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import dot_precision, launch, power_of_two
from .triton_tiles import Config, config

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)  # finite, so that 0 * LOWEST is 0
INFINITY = tl.constexpr(float("inf"))


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _at(X, strides, b, h):
    return X + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def _load(X, strides, position, exists, FEATURES: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """[positions, BLOCK] of one (sample, head), from feature `first` on; zero where one of the two does not exist."""
    feature = first + tl.arange(0, BLOCK).to(position.dtype)
    mask = exists[:, None]
    if FEATURES % BLOCK != 0:
        mask = mask & (feature < FEATURES)[None, :]
    return tl.load(X + (position[:, None] * strides[2] + feature[None, :] * strides[3]), mask=mask, other=0.0)


@triton.jit
def _store(X, strides, position, exists, x, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    feature = tl.arange(0, BLOCK).to(position.dtype)
    mask = exists[:, None]
    if FEATURES != BLOCK:
        mask = mask & (feature < FEATURES)[None, :]
    place = X + (position[:, None] * strides[2] + feature[None, :] * strides[3])
    tl.store(place, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _positions(first, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """first, first + 1, ..; in 64 bits where offsets within one head need them."""
    position = first + tl.arange(0, BLOCK)
    return position.to(tl.int64) if WIDE else position


@triton.jit
def _centred(x, CENTRE, bh, D: tl.constexpr, BLOCK: tl.constexpr, first=0):
    if CENTRE is not None:
        feature = first + tl.arange(0, BLOCK)
        centre = tl.load(CENTRE + bh.to(tl.int64) * D + feature, mask=feature < D, other=0.0)
        x = (x.to(tl.float32) - centre[None, :]).to(x.dtype)
    return x


@triton.jit
def _product_in_parts(
    A, a_strides, i, i_exists, B, b_strides, j, j_exists, CENTRE, bh, FEATURES: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of centred rows, read again part by part: of operands that would fill the registers as wholes."""
    product = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for first in range(0, FEATURES, PART):
        a = _centred(_load(A, a_strides, i, i_exists, FEATURES, PART, first), CENTRE, bh, FEATURES, PART, first)
        b = _centred(_load(B, b_strides, j, j_exists, FEATURES, PART, first), CENTRE, bh, FEATURES, PART, first)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _factor(BANDWIDTH, h, scale, KIND: tl.constexpr):
    """What scores are multiplied with; `scale` is that of softmax, or 1 for a Gaussian, times log2(e)."""
    if KIND != "softmax":
        bandwidth = tl.load(BANDWIDTH + h).to(tl.float32)
        scale = scale / (bandwidth * bandwidth)
    return scale


@triton.jit
def _bias(k, factor):
    """-factor |k|^2 / 2 of centred keys."""
    wide = k.to(tl.float32)
    return tl.sum(wide * wide, 1) * (-0.5 * factor)


@triton.jit
def _minus_square_distances(A, a_strides, a, a_exists, B, b_strides, b, b_exists, D: tl.constexpr):
    """-|a_i - b_j|^2 in float32, one feature after the other."""
    s = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    for d in range(D):
        x = tl.load(A + (a * a_strides[2] + d * a_strides[3]), mask=a_exists, other=0.0).to(tl.float32)
        y = tl.load(B + (b * b_strides[2] + d * b_strides[3]), mask=b_exists, other=0.0).to(tl.float32)
        difference = x[:, None] - y[None, :]
        s -= difference * difference
    return s


@triton.jit
def _seen_keys(MASK, b, j, M):
    seen = j < M
    if MASK is not None:
        seen = seen & (tl.load(MASK + b.to(tl.int64) * M + j, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _reread(x, inside, TENSOR_CORES: tl.constexpr):
    """x, in a loop whose body is `inside`. Without tensor cores a thread needs whole rows of a product's operands. The
    compiler would move them out of the loop into registers, and spill; this keeps them in shared memory."""
    if not TENSOR_CORES:
        x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def _add_product(
    sum, w, x, allowed, WORK: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """sum + w x, w being zero where not allowed. Where causality cuts through a tile, a NaN or infinity of x must not
    reach a row that does not see it, as it would in a matrix product: 0 * NaN. The rows that see it become NaN."""
    if CAUSAL:
        finite = tl.abs(x.to(tl.float32)) < INFINITY
        sum = tl.dot(w.to(WORK), tl.where(finite, x, 0.0).to(WORK), sum, input_precision=PRECISION)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            seen = tl.dot(allowed.to(WORK), tl.where(finite, 0.0, 1.0).to(WORK), input_precision=PRECISION)
            sum += tl.where(seen > 0.0, float("nan"), 0.0)
    else:
        sum = tl.dot(w.to(WORK), x.to(WORK), sum, input_precision=PRECISION)
    return sum


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _fold_keys(
    out, total, top, q, i, i_exists, factor, first, last, M, b, bh, Q, K, V, CENTRE, MASK, q_strides, k_strides,
    v_strides, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr, WORK_PRECISION: tl.constexpr,
    TENSOR_CORES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Takes the keys [first, last) into the rows' sums; not MASKED: all of them exist and are seen by every row."""
    for j0 in range(first, last, BLOCK_N):
        j = _positions(j0, BLOCK_N, WIDE)
        seen = _seen_keys(MASK, b, j, M) if MASKED else j >= 0
        if KIND == "distance":
            s = _minus_square_distances(Q, q_strides, i, i_exists, K, k_strides, j, seen, D) * (0.5 * factor)
        else:
            k = _centred(_load(K, k_strides, j, seen, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
            s = tl.dot(_reread(q, j0 < last, TENSOR_CORES), tl.trans(k), input_precision=PRECISION) * factor
            if KIND == "gaussian":
                s += _bias(k, factor)[None, :]
        allowed = seen[None, :]
        if MASKED:
            if CAUSAL:
                allowed = allowed & (i[:, None] >= j[None, :])
            s = tl.where(allowed, s, -INFINITY)
        if NORMALIZE:
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == -INFINITY, 0.0, higher)
            decay = tl.exp2(top - base)
            w = tl.exp2(s - base[:, None])
            total = total * decay + tl.sum(w, 1)
            out = out * decay[:, None]
            top = higher
        else:
            w = tl.exp2(s)
        v = _load(V, v_strides, j, seen, E, BLOCK_E)
        out = _add_product(out, w, v, allowed, WORK, WORK_PRECISION, CAUSAL=CAUSAL and MASKED)
    return out, total, top


@triton.jit
def nonlocal_fwd_kernel(
    Q, K, V, BANDWIDTH, CENTRE, MASK, OUT, SHIFT, SUM, q_strides, k_strides, v_strides, out_strides, heads, N, M, scale,
    D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, WORK: tl.constexpr, WORK_PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TENSOR_CORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of queries: output, and the rows' shift and sum."""
    tiles = tl.cdiv(N, BLOCK_M)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b, h = bh // heads, bh % heads
    Q, K, V = _at(Q, q_strides, b, h), _at(K, k_strides, b, h), _at(V, v_strides, b, h)
    OUT = _at(OUT, out_strides, b, h)
    i = _positions(tile * BLOCK_M, BLOCK_M, WIDE)
    i_exists = i < N
    factor = _factor(BANDWIDTH, h, scale, KIND)
    q = i
    if KIND != "distance":
        q = _centred(_load(Q, q_strides, i, i_exists, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    last = tl.minimum(M, (tile + 1) * BLOCK_M) if CAUSAL else M
    full = 0
    if TENSOR_CORES and MASK is None:
        full = (tl.minimum(M, tile * BLOCK_M + 1) if CAUSAL else M) // BLOCK_N * BLOCK_N
        out, total, top = _fold_keys(
            out, total, top, q, i, i_exists, factor, 0, full, M, b, bh, Q, K, V, CENTRE, MASK, q_strides, k_strides,
            v_strides, D, E, KIND, NORMALIZE, CAUSAL, False, PRECISION, WORK, WORK_PRECISION, TENSOR_CORES, BLOCK_N,
            BLOCK_D, BLOCK_E,
            WIDE,
        )  # fmt: skip
    out, total, top = _fold_keys(
        out, total, top, q, i, i_exists, factor, full, last, M, b, bh, Q, K, V, CENTRE, MASK, q_strides, k_strides,
        v_strides, D, E, KIND, NORMALIZE, CAUSAL, True, PRECISION, WORK, WORK_PRECISION, TENSOR_CORES, BLOCK_N,
        BLOCK_D, BLOCK_E, WIDE,
    )  # fmt: skip
    if NORMALIZE:
        alone = total == 0.0  # sees no key
        out = out * tl.where(alone, 0.0, 1.0 / tl.where(alone, 1.0, total))[:, None]
        top = tl.where(alone, 0.0, top)
    else:
        top, total = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), 1.0, tl.float32)
    _store(OUT, out_strides, i, i_exists, out, E, BLOCK_E)
    row = bh.to(tl.int64) * N + i
    tl.store(SHIFT + row, top, mask=i_exists)
    tl.store(SUM + row, total, mask=i_exists)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse(total):
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _pull_keys(
    dq, row_sum, moment, mean, q, dout, shift, drift, i, i_exists, factor, first, last, M, b, bh, Q, K, V, DOUT, CENTRE,
    MASK, q_strides, k_strides, v_strides, dout_strides, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, MOMENT: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr,
    WORK_PRECISION: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Takes the keys [first, last) into dq and the rows' sums: of delta, and of delta and weight times exponent."""
    # What is masked needs registers itself.
    PARTS: tl.constexpr = TENSOR_CORES and (BLOCK_D > 64 or BLOCK_E > 64) and (CAUSAL or MASK is not None)
    PART: tl.constexpr = 64
    for j0 in range(first, last, BLOCK_N):
        j = _positions(j0, BLOCK_N, WIDE)
        seen = _seen_keys(MASK, b, j, M) if MASKED else j >= 0
        k = _centred(_load(K, k_strides, j, seen, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
        if KIND == "distance":
            s = _minus_square_distances(Q, q_strides, i, i_exists, K, k_strides, j, seen, D) * (0.5 * factor)
        else:
            if PARTS:
                s = _product_in_parts(Q, q_strides, i, i_exists, K, k_strides, j, seen, CENTRE, bh, D, PART, PRECISION)
            else:
                s = tl.dot(_reread(q, j0 < last, TENSOR_CORES), tl.trans(k), input_precision=PRECISION)
            s *= factor
            if KIND == "gaussian":
                s += _bias(k, factor)[None, :]
        s -= shift[:, None]
        if PARTS:
            dw = _product_in_parts(DOUT, dout_strides, i, i_exists, V, v_strides, j, seen, None, bh, E, PART, PRECISION)
        else:
            v = _load(V, v_strides, j, seen, E, BLOCK_E)
            dw = tl.dot(_reread(dout, j0 < last, TENSOR_CORES), tl.trans(v), input_precision=PRECISION)
        w = tl.exp2(s)
        delta = w * (dw - drift[:, None])
        allowed = seen[None, :]
        if MASKED:
            if CAUSAL:
                allowed = allowed & (i[:, None] >= j[None, :])
            delta = tl.where(allowed, delta, 0.0)
        if MOMENT:
            s = tl.maximum(s, LOWEST)
            if MASKED:
                s = tl.where(allowed, s, 0.0)
            moment += tl.sum(delta * s, 1)
            mean += tl.sum(w * s, 1)
        if KIND != "softmax":
            row_sum += tl.sum(delta, 1)
        if CAUSAL and MASKED:  # see _add_product; rows that see what is not finite are NaN, in all features here
            finite = tl.abs(k.to(tl.float32)) < INFINITY
            lost = tl.min(finite.to(tl.int32), 1) == 0
            if tl.max(lost.to(tl.int32), 0) > 0:
                row_sum += tl.where(tl.max((allowed & lost[None, :]).to(tl.int32), 1) > 0, float("nan"), 0.0)
            k = tl.where(finite, k, 0.0).to(k.dtype)
        dq = tl.dot(delta.to(WORK), k.to(WORK), dq, input_precision=WORK_PRECISION)
    return dq, row_sum, moment, mean


@triton.jit
def nonlocal_bwd_query_kernel(
    Q, K, V, BANDWIDTH, CENTRE, MASK, DOUT, OUT, SHIFT, SUM, DQ, DRIFT, MOMENTS, q_strides, k_strides, v_strides,
    dout_strides, out_strides, dq_strides, heads, N, M, scale, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr,
    NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, MOMENT: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr,
    WORK_PRECISION: tl.constexpr, WIDE: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of queries: dq, the rows' drift sum_j w_ij (dout_i . v_j) = dout_i . out_i, and the tile's moment
    sum_ij delta_ij (s_ij - the row's mean s), of which the bandwidth's gradient is made."""
    tiles = tl.cdiv(N, BLOCK_M)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b, h = bh // heads, bh % heads
    Q, K, V = _at(Q, q_strides, b, h), _at(K, k_strides, b, h), _at(V, v_strides, b, h)
    i = _positions(tile * BLOCK_M, BLOCK_M, WIDE)
    i_exists = i < N
    factor = _factor(BANDWIDTH, h, scale, KIND)
    row = bh.to(tl.int64) * N + i
    shift = tl.load(SHIFT + row, mask=i_exists, other=0.0)
    inverse = _inverse(tl.load(SUM + row, mask=i_exists, other=0.0))
    DOUT = _at(DOUT, dout_strides, b, h)
    dout = _load(DOUT, dout_strides, i, i_exists, E, BLOCK_E)
    drift = tl.zeros((BLOCK_M,), tl.float32)
    if NORMALIZE:
        out = _load(_at(OUT, out_strides, b, h), out_strides, i, i_exists, E, BLOCK_E)
        drift = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(DRIFT + row, drift, mask=i_exists)
    q = _centred(_load(Q, q_strides, i, i_exists, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    moment, mean = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(M, (tile + 1) * BLOCK_M) if CAUSAL else M
    full = 0
    if TENSOR_CORES and MASK is None:
        full = (tl.minimum(M, tile * BLOCK_M + 1) if CAUSAL else M) // BLOCK_N * BLOCK_N
        dq, row_sum, moment, mean = _pull_keys(
            dq, row_sum, moment, mean, q, dout, shift, drift, i, i_exists, factor, 0, full, M, b, bh, Q, K, V, DOUT,
            CENTRE, MASK, q_strides, k_strides, v_strides, dout_strides, D, E, KIND, CAUSAL, False, MOMENT, PRECISION,
            WORK, WORK_PRECISION, TENSOR_CORES, BLOCK_N, BLOCK_D, BLOCK_E, WIDE,
        )  # fmt: skip
    dq, row_sum, moment, mean = _pull_keys(
        dq, row_sum, moment, mean, q, dout, shift, drift, i, i_exists, factor, full, last, M, b, bh, Q, K, V, DOUT,
        CENTRE, MASK, q_strides, k_strides, v_strides, dout_strides, D, E, KIND, CAUSAL, True, MOMENT, PRECISION, WORK,
        WORK_PRECISION, TENSOR_CORES, BLOCK_N, BLOCK_D, BLOCK_E, WIDE,
    )  # fmt: skip
    if MOMENT:
        # Any exponent of a row does for a normalised one, see below; its mean is the one that row_sum's error spares.
        typical = mean * inverse if NORMALIZE else 0.0
        tl.store(MOMENTS + bh * tiles + tile, tl.sum((moment - row_sum * typical) * inverse, 0))
    if KIND != "softmax":
        # Normalised, row_sum is zero but for the rounding of the drift, which all deltas of a row share: dq_i is a sum
        # of differences to q_i where q_i is nearer to the keys that matter than their centre is, whose exponent is 0.
        if NORMALIZE:
            row_sum *= tl.where(shift > tl.log2(tl.maximum(M * inverse, 1e-30)), 1.0, 0.0)  # which keeps a NaN
        dq -= q.to(tl.float32) * row_sum[:, None]
    elif CAUSAL:
        dq += row_sum[:, None]
    dq *= (inverse * (factor / LOG2E))[:, None]
    _store(_at(DQ, dq_strides, b, h), dq_strides, i, i_exists, dq, D, BLOCK_D)


@triton.jit
def _pull_queries(
    dk, dv, column, k, v, bias, j, j_seen, factor, first, last, N, b, h, bh, Q, K, DOUT, CENTRE, SHIFT, SUM, DRIFT,
    q_strides, k_strides, dout_strides, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr, WORK_PRECISION: tl.constexpr,
    TENSOR_CORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Takes the queries [first, last) into dk, dv and the columns' sums of delta. MASKED: causality cuts through.

    Rows that do not exist have weight zero."""
    for i0 in range(first, last, BLOCK_M):
        i = _positions(i0, BLOCK_M, WIDE)
        exists = i < N
        row = bh.to(tl.int64) * N + i
        shift = tl.load(SHIFT + row, mask=exists, other=0.0)
        inverse = _inverse(tl.load(SUM + row, mask=exists, other=0.0))
        q = _centred(_load(Q, q_strides, i, exists, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
        if KIND == "distance":
            s = _minus_square_distances(K, k_strides, j, j_seen, Q, q_strides, i, exists, D) * (0.5 * factor)
        else:
            s = tl.dot(_reread(k, i0 < last, TENSOR_CORES), tl.trans(q), input_precision=PRECISION) * factor
            if KIND == "gaussian":
                s += bias[:, None]
        w = tl.exp2(s - shift[None, :]) * inverse[None, :]
        if MASKED:
            allowed = i[None, :] >= j[:, None]
            w = tl.where(allowed, w, 0.0)
        dout = _load(DOUT, dout_strides, i, exists, E, BLOCK_E)
        dv = tl.dot(w.to(WORK), dout.to(WORK), dv, input_precision=WORK_PRECISION)
        delta = tl.dot(_reread(v, i0 < last, TENSOR_CORES), tl.trans(dout), input_precision=PRECISION)
        if NORMALIZE:
            delta -= tl.load(DRIFT + row, mask=exists, other=0.0)[None, :]
        delta = w * delta
        if MASKED:
            delta = tl.where(allowed, delta, 0.0)
        if KIND != "softmax":
            column += tl.sum(delta, 1)
        dk = tl.dot(delta.to(WORK), q.to(WORK), dk, input_precision=WORK_PRECISION)
    return dk, dv, column


@triton.jit
def nonlocal_bwd_key_kernel(
    Q, K, V, BANDWIDTH, CENTRE, MASK, DOUT, SHIFT, SUM, DRIFT, DK, DV, q_strides, k_strides, v_strides, dout_strides,
    dk_strides, dv_strides, heads, N, M, scale, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr,
    NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WORK: tl.constexpr,
    WORK_PRECISION: tl.constexpr, WIDE: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of keys: dk and dv."""
    tiles = tl.cdiv(M, BLOCK_N)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // heads, bh % heads
    Q, K, V = _at(Q, q_strides, b, h), _at(K, k_strides, b, h), _at(V, v_strides, b, h)
    DOUT = _at(DOUT, dout_strides, b, h)
    j = _positions(tile * BLOCK_N, BLOCK_N, WIDE)
    j_exists = j < M
    seen = _seen_keys(MASK, b, j, M)
    factor = _factor(BANDWIDTH, h, scale, KIND)
    k = _centred(_load(K, k_strides, j, seen, D, BLOCK_D), CENTRE, bh, D, BLOCK_D)
    v = _load(V, v_strides, j, seen, E, BLOCK_E)
    bias = _bias(k, factor)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    column = tl.zeros((BLOCK_N,), tl.float32)
    start = 0
    if CAUSAL:
        first = tile * BLOCK_N // BLOCK_M * BLOCK_M
        start = tl.minimum(N, tl.cdiv((tile + 1) * BLOCK_N, BLOCK_M) * BLOCK_M)
        dk, dv, column = _pull_queries(
            dk, dv, column, k, v, bias, j, seen, factor, first, start, N, b, h, bh, Q, K, DOUT, CENTRE, SHIFT, SUM,
            DRIFT, q_strides, k_strides, dout_strides, D, E, KIND, NORMALIZE, True, PRECISION, WORK, WORK_PRECISION,
            TENSOR_CORES, BLOCK_M, BLOCK_D, BLOCK_E, WIDE,
        )  # fmt: skip
    dk, dv, column = _pull_queries(
        dk, dv, column, k, v, bias, j, seen, factor, start, N, N, b, h, bh, Q, K, DOUT, CENTRE, SHIFT, SUM, DRIFT,
        q_strides, k_strides, dout_strides, D, E, KIND, NORMALIZE, False, PRECISION, WORK, WORK_PRECISION,
        TENSOR_CORES, BLOCK_M, BLOCK_D, BLOCK_E, WIDE,
    )  # fmt: skip
    if KIND != "softmax":
        dk -= k.to(tl.float32) * column[:, None]
    dk *= factor / LOG2E
    if MASK is not None:  # what was computed for a key that nobody sees is not its gradient
        dk, dv = tl.where(seen[:, None], dk, 0.0), tl.where(seen[:, None], dv, 0.0)
    _store(_at(DK, dk_strides, b, h), dk_strides, j, j_exists, dk, D, BLOCK_D)
    _store(_at(DV, dv_strides, b, h), dv_strides, j, j_exists, dv, E, BLOCK_E)


# --- launches --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What all kernels of a call are given: tensors, then numbers and constants."""

    tensors: tuple
    strides: tuple
    constants: dict
    width: int

    def tiles(self, kernel: str, query: Tensor) -> tuple[Config, dict]:
        facts = self.constants
        plain = facts["KIND"] == "softmax" and not facts["CAUSAL"] and self.tensors[-1] is None
        chosen = config(kernel, query.element_size(), self.width, plain)
        return chosen, {
            "BLOCK_M": chosen.queries, "BLOCK_N": chosen.keys, "num_warps": chosen.warps, "num_stages": chosen.stages
        }  # fmt: skip


def _strides(t: Tensor, channels_first: bool) -> tuple[int, int, int, int]:
    """Of sample, head, position, feature."""
    b, h, x, y = t.stride()
    return (b, h, y, x) if channels_first else (b, h, x, y)


def _wide(tensors, channels_first: bool) -> bool:
    """Whether an offset within one (sample, head) does not fit in 31 bits."""
    return any(sum((n - 1) * s for n, s in zip(t.shape[2:], t.stride()[2:], strict=True)) >= 2**31 for t in tensors)


def _centre(key: Tensor, key_mask: Tensor | None, channels_first: bool) -> Tensor:
    """[B, h, D] in float32: the mean of the finite coordinates of the keys that are seen.

    Of half types, differences to it would have to be rounded again: there it is zero, unless all coordinates lie within
    a factor of two of it, so that differences are exact (Sterbenz) and products would otherwise cancel."""
    key = key.mT if channels_first else key
    usable = key.isfinite()
    if key_mask is not None:
        usable &= key_mask[:, None, :, None]
    count = usable.sum(2)
    centre = torch.where(usable, key, 0).sum(2, dtype=torch.float32) / count.clamp(min=1)
    if key.dtype == torch.float32:
        return centre.contiguous()
    centre = centre.to(key.dtype).float()
    size = centre.abs()
    along = torch.where(usable, key * centre.sign().to(key.dtype)[:, :, None], centre.abs().to(key.dtype)[:, :, None])
    near = (along.amin(2) >= size / 2) & (along.amax(2) <= size * 2)
    return torch.where(near, centre, 0).contiguous()


def _prepare(query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first, others=()) -> _Call:
    position, feature = (3, 2) if channels_first else (2, 3)
    D, E = query.shape[feature], value.shape[feature]
    kind = "softmax" if bandwidth is None else "gaussian" if normalize else "distance"
    centre = None if bandwidth is None else _centre(key, key_mask, channels_first)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    precision = dot_precision()
    # Unnormalised softmax weights leave float16's range; tf32 has its precision and float32's range.
    ranged = query.dtype == torch.float16 and kind == "softmax" and not normalize
    work = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]
    constants = {
        "heads": query.shape[1], "N": query.shape[position], "M": key.shape[position],
        "scale": LOG2E.value * (scale if bandwidth is None else 1.0), "D": D, "E": E, "KIND": kind,
        "NORMALIZE": normalize,
        "CAUSAL": causal, "PRECISION": precision, "WORK": tl.float32 if ranged else work,
        "WORK_PRECISION": "tf32" if ranged else precision,
        "TENSOR_CORES": query.dtype != torch.float32 or precision == "tf32",
        "WIDE": _wide((query, key, value, *others), channels_first),
        "BLOCK_D": power_of_two(D, 16), "BLOCK_E": power_of_two(E, 16),
    }  # fmt: skip
    strides = tuple(_strides(t, channels_first) for t in (query, key, value))
    tensors = (query, key, value, None if bandwidth is None else bandwidth.contiguous(), centre, mask)
    return _Call(tensors, strides, constants, max(constants["BLOCK_D"], constants["BLOCK_E"]))


def nonlocal_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, bandwidth: Tensor | None, key_mask: Tensor | None, scale: float,
    normalize: bool, causal: bool, channels_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    position, feature = (3, 2) if channels_first else (2, 3)
    B, h, N, E = query.shape[0], query.shape[1], query.shape[position], value.shape[feature]
    out = query.new_empty((B, h, E, N) if channels_first else (B, h, N, E))
    shift = query.new_empty((B, h, N), dtype=torch.float32)
    total = torch.empty_like(shift)
    if not (out.numel() and key.numel()):
        return out.zero_(), shift.zero_(), total.fill_(0.0 if normalize else 1.0)
    call = _prepare(query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first, (out,))
    with torch.cuda.device_of(query):  # the tiles too are those of its architecture
        chosen, tiles = call.tiles("forward", query)
        launch(
            nonlocal_fwd_kernel, B * h * triton.cdiv(N, chosen.queries), *call.tensors, out, shift, total,
            *call.strides, _strides(out, channels_first), **call.constants, **tiles,
        )  # fmt: skip
    return out, shift, total


def nonlocal_attention_bwd(
    doutput: Tensor, query: Tensor, key: Tensor, value: Tensor, bandwidth: Tensor | None, key_mask: Tensor | None,
    output: Tensor, shift: Tensor, sum: Tensor, scale: float, normalize: bool, causal: bool, channels_first: bool,
    need_bandwidth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dquery, dkey, dvalue = (t.new_empty(t.shape) for t in (query, key, value))
    B, h, N = shift.shape
    if not (output.numel() and key.numel()):
        return dquery.zero_(), dkey.zero_(), dvalue.zero_(), shift.new_zeros(h if need_bandwidth else 0)
    given = (query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first)
    call = _prepare(*given, (doutput, output, dquery, dkey, dvalue))
    strides = [_strides(t, channels_first) for t in (doutput, output, dquery, dkey, dvalue)]
    drift = torch.empty_like(shift) if normalize else None
    with torch.cuda.device_of(query):
        by_query, tiles = call.tiles("query", query)
        count = triton.cdiv(N, by_query.queries)
        moments = shift.new_empty((B, h, count)) if need_bandwidth else None
        launch(
            nonlocal_bwd_query_kernel, B * h * count, *call.tensors, doutput, output, shift, sum, dquery, drift,
            moments, *call.strides, *strides[:3], MOMENT=need_bandwidth, **call.constants, **tiles,
        )  # fmt: skip
        by_key, tiles = call.tiles("key", query)
        # Operands of up to 64 features fit into registers without tensor cores, too.
        tiles |= {"TENSOR_CORES": call.constants.pop("TENSOR_CORES") or call.width <= 64}
        launch(
            nonlocal_bwd_key_kernel, B * h * triton.cdiv(call.constants["M"], by_key.keys), *call.tensors, doutput,
            shift, sum, drift, dkey, dvalue, *call.strides, strides[0], *strides[3:], **call.constants, **tiles,
        )  # fmt: skip
    if not need_bandwidth or moments is None or bandwidth is None:
        return dquery, dkey, dvalue, shift.new_empty(0)
    # d s_ij / d bandwidth = -2 s_ij / bandwidth, up to a constant of the row, whose deltas sum to zero if it is not.
    dbandwidth = moments.sum((0, 2), dtype=torch.float64) * (-2 / LOG2E.value) / bandwidth.double()
    return dquery, dkey, dvalue, dbandwidth.float()
