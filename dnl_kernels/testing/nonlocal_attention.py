"""Named cases of nonlocal_attention."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.nonlocal_attention.api import nonlocal_attention
from .budget import relative_error
from .operator import Operator


class Case(NamedTuple):
    """Sizes B, h, N, M, D, E; keywords of the call; mask: the share of keys that are seen; spread: of the inputs."""

    B: int
    h: int
    N: int
    M: int
    D: int
    E: int
    keywords: dict = {}
    mask: float | None = None
    spread: float = 1.0


CASES = {
    "one-pair": Case(1, 1, 1, 1, 1, 1),
    "odd": Case(2, 3, 37, 29, 5, 11),
    "channels-first": Case(2, 2, 35, 35, 16, 16, {"layout": "channels_first"}),
    "causal": Case(2, 1, 45, 45, 8, 8, {"causal": True}),
    "causal-more-queries": Case(1, 2, 40, 13, 3, 4, {"causal": True}),
    "causal-more-keys": Case(1, 2, 13, 40, 3, 4, {"causal": True, "layout": "channels_first"}),
    "key-mask": Case(3, 2, 33, 41, 9, 7, mask=0.6),
    "causal-key-mask": Case(3, 1, 50, 50, 4, 6, {"causal": True}, mask=0.5),
    "several-parts": Case(1, 1, 33, 530, 6, 5),
    "large-scores": Case(1, 2, 40, 50, 12, 6, spread=20.0),
    "wide": Case(1, 1, 9, 20, 130, 256),
    "no-batch": Case(0, 2, 5, 6, 3, 4),
    "no-queries": Case(2, 2, 0, 6, 3, 4),
    "no-keys": Case(2, 2, 5, 0, 3, 4),
}
KERNELS: dict[str, dict] = {
    "softmax": {},
    "softmax-unnormalised": {"normalize": False, "scale": 0.1},
    "gaussian": {"kernel": "gaussian"},
    "gaussian-unnormalised": {"kernel": "gaussian", "normalize": False},
    "dot": {"kernel": "dot"},
    "dot-unnormalised": {"kernel": "dot", "normalize": False},
}


def keywords(case: Case, kernel: str) -> dict:
    return {**KERNELS[kernel], **case.keywords}


def inputs(case: Case, kernel: str, dtype: torch.dtype, device: str = "cpu"):
    """([query, key, value, bandwidth or None], key_mask or None) of the case, drawn from torch's generator."""
    positions = (case.N, case.M, case.M)
    features = (case.D, case.D, case.E)
    spread = (case.spread, case.spread, 1.0) if "un" not in kernel else (1.0, 1.0, 1.0)
    tensors: list[Tensor | None] = []
    for n, c, s in zip(positions, features, spread, strict=True):
        t = s * torch.randn(case.B, case.h, n, c, dtype=torch.float64)
        t = t.mT.contiguous() if case.keywords.get("layout") == "channels_first" else t
        tensors.append(t.to(device, dtype))
    bandwidth = None
    if kernel.startswith("gaussian"):
        bandwidth = (1 + torch.rand(case.h, dtype=torch.float64)) * case.D**0.5
        bandwidth = bandwidth.to(device, dtype)
    mask = None if case.mask is None else torch.rand(case.B, case.M, device=device) < case.mask
    return [*tensors, bandwidth], mask


def errors_of_rows_that_see_themselves(backend: str, spread: float, layout: str, draws: int) -> dict[str, float]:
    """The backend's error / eager's in float32 of a normalised Gaussian of tokens among themselves, medians over draws.

    As in a deep layer: the further apart tokens are (in bandwidths), the more of its weight a row has itself. Values
    have an offset, so that the rows' deltas do not sum to zero exactly, and what they are multiplied by matters."""
    ratios: dict[str, list[float]] = {"token": [], "value": [], "bandwidth": []}
    for _ in range(draws):
        given = [spread * torch.randn(1, 2, 3, 100), 5 + torch.randn(1, 2, 3, 100), torch.tensor([1.0, 0.7])]
        doutput = torch.rand(1, 2, 3, 100)

        def gradients(dtype, backend, given=given, doutput=doutput):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
            token, value, g = (t if layout == "channels_first" else t.mT for t in (*leaves[:2], doutput.to(dtype)))
            words: dict = {"kernel": "gaussian", "bandwidth": leaves[2], "layout": layout, "backend": backend}
            return torch.autograd.grad(nonlocal_attention(token, token, value, **words), leaves, g)

        exact = gradients(torch.float64, "reference")
        found, eager = gradients(torch.float32, backend), gradients(torch.float32, "reference")
        for name, a, b, e in zip(ratios, found, eager, exact, strict=True):
            rounding = 2 * torch.finfo(torch.float32).eps
            ratios[name].append(relative_error(a, e) / (relative_error(b, e) + rounding))
    return {name: statistics.median(of) for name, of in ratios.items()}


def _leaves(dtype: torch.dtype, batch: int) -> list[Tensor]:
    tensors, _ = inputs(Case(batch, 2, 5, 7, 3, 4), "gaussian", dtype)
    return [*tensors[:3], torch.tensor([0.75, 1.5], dtype=dtype)]


def _registered(query: Tensor, key: Tensor, value: Tensor, bandwidth: Tensor) -> dict:
    mask = torch.tensor([True, False, True, True, False, True, True]).expand(query.shape[0], -1)
    static = (0.5, True, True, False)
    arguments = (query, key, value, bandwidth, mask)
    output, *rows = torch.ops.dnl.nonlocal_attention_fwd.default(*arguments, *static)
    backward = (torch.ones_like(output), *arguments, output, *rows, *static, True)
    return {"nonlocal_attention_fwd": (*arguments, *static), "nonlocal_attention_bwd": backward}


OPERATOR = Operator(
    name="nonlocal_attention",
    leaves=_leaves,
    names=("query", "key", "value", "bandwidth"),
    call=lambda query, key, value, bandwidth, backend=None: nonlocal_attention(
        query, key, value, kernel="gaussian", bandwidth=bandwidth, backend=backend
    ),
    batched=(0, 1, 2),
    registered=_registered,
)
