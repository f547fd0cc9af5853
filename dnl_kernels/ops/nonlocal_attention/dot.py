"""The dot-product kernel needs no kernel of its own: it is associative, hence two matrix products.

Its compositions are differentiable to any order as they stand, in memory linear in N and M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # queries of a causal chunk


def dot_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, normalize: bool, causal: bool) -> Tensor:
    """(1/Z_i) sum_j (q_i . k_j) v_j for q [B, h, N, D], k [B, h, M, D], v [B, h, M, E]."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    dtype, (q, k, v) = v.dtype, (t.to(wide) for t in (q, k, v))
    N, M, D, E = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))
    if causal:
        out = _causal(q, k, v)
    elif D * E * (N + M) <= N * M * (D + E):
        out = q @ (k.mT @ v)
    else:
        out = (q @ k.mT) @ v  # no larger than q and k themselves
    if normalize:
        out = out / _counts(q, M, key_mask, causal)
    return out.to(dtype)


def _counts(q: Tensor, M: int, key_mask: Tensor | None, causal: bool) -> Tensor:
    """Z_i, the number of keys that a query sees, at least 1; broadcastable to [B, h, N, 1]."""
    seen = torch.ones(1, M, dtype=torch.int64, device=q.device) if key_mask is None else key_mask.to(torch.int64)
    seen = F.pad(seen.cumsum(-1), (1, 0))
    last = torch.arange(1, q.shape[-2] + 1, device=q.device).clamp(max=M) if causal else slice(M, M + 1)
    return seen[:, None, last, None].clamp(min=1).to(q.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Chunks of queries: earlier chunks are seen through the running sum of k^T v, a chunk's own keys directly."""
    N = q.shape[-2]
    length = -(-N // CHUNK) * CHUNK

    def chunks(t: Tensor) -> Tensor:  # [B, h, chunks, CHUNK, features]
        t = t[..., :length, :]
        return F.pad(t, (0, 0, 0, length - t.shape[-2])).unflatten(-2, (length // CHUNK, CHUNK))

    q, k, v = chunks(q), chunks(k), chunks(v)
    state = (k.mT @ v).cumsum(2)
    earlier = F.pad(state, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    out = q @ earlier + (q @ k.mT).tril() @ v
    return out.flatten(2, 3)[..., :N, :]
