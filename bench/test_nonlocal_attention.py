"""nonlocal_attention against the strongest other ways of computing the same, with the bars of the CPU kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dnl_kernels as dnl
from bench import comparison
from bench.comparison import COMPILE, DEVICE, SMOKE, Way, of_module, way
from bench.peers import PlainNonLocal2d, keops_gaussian, peer, sdpa_gaussian

LARGE_MATRIX = 4 * 2**20  # pairs of positions, per head and sample, above which nobody writes the matrix


class Case(NamedTuple):
    """q, k, v: [B, 1, N, D], or views of [B, 1, D, N]. bars: peer / ours that is aimed at."""

    kernel: str
    B: int
    N: int
    D: int
    train: bool = True
    bars: Mapping[str, float] = {}
    channels_first: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        words = [self.kernel, f"B{self.B}", f"N{self.N}", f"D{self.D}"] + ["forward"] * (not self.train)
        words += ["channels-first"] * self.channels_first + ["bf16"] * (self.dtype == torch.bfloat16)
        return "-".join(words)

    def smaller(self) -> Case:
        return self._replace(B=min(self.B, 2), N=min(self.N, 64)) if SMOKE else self


CASES = [
    Case("softmax", 256, 64, 16),
    *(Case("softmax", 16, 1024, D, False, {"sdpa": bar}) for D, bar in ((8, 5.0), (16, 2.7), (32, 2.4), (64, 2.4))),
    *(Case("softmax", 16, 1024, D, True, {"sdpa": bar}) for D, bar in ((8, 2.5), (16, 2.0), (32, 1.6), (64, 1.5))),
    *(Case("softmax", 2, 1024, D, True, {"sdpa": 1 / 1.1}) for D in (128, 256)),
    *(Case("softmax", 4, 1024, D, True, {"sdpa": 1 / 1.1}, dtype=torch.bfloat16) for D in (16, 64)),
    Case("softmax", 2, 56 * 56, 32, True, {"sdpa": 2.0}, channels_first=True),
    *(Case("gaussian", 16, 1024, D, True, {"softmax": 1 / 1.1}) for D in (16, 64)),
    Case("gaussian", 1, 4096, 3, True, {"sdpa": 1.2, "keops": 2.0}),
    Case("gaussian", 1, 4096, 64, True, {"sdpa": 1.2, "keops": 10.0}),
    Case("dot", 16, 1024, 32),
]


def _sdpa(q, k, v, channels_first):
    """As users write it: what they have, seen as tokens, without a copy."""
    if channels_first:
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
    return F.scaled_dot_product_attention(q, k, v)


def comparison_of(case: Case) -> comparison.Case:
    case = case.smaller()
    shape = (case.B, 1, case.D, case.N) if case.channels_first else (case.B, 1, case.N, case.D)
    given = [torch.randn(shape, device=DEVICE).to(case.dtype) for _ in range(3)]
    bandwidth = math.sqrt(case.D)  # so that weights are neither flat nor one-hot
    options: dict[str, Any] = {"kernel": case.kernel, "layout": "channels_first" if case.channels_first else "tokens"}
    if case.kernel == "gaussian":
        options["bandwidth"] = bandwidth
    ours: Callable[..., Tensor] = functools.partial(dnl.nonlocal_attention, **options)
    eager: Callable[..., Tensor] = functools.partial(ours, backend="reference")
    sdpa = functools.partial(_sdpa, channels_first=case.channels_first)
    found: dict[str, Way | str] = {"ours": way(ours, given)}
    exact: Callable[..., Tensor] = eager
    if case.kernel == "softmax":
        found |= {"sdpa": way(sdpa, given)}
        exact = sdpa
        found["flex"] = _flex(given, case.train)
    elif case.kernel == "gaussian":
        augmented = functools.partial(sdpa_gaussian, bandwidth=bandwidth)
        found |= {"sdpa": way(augmented, given), "softmax": way(dnl.nonlocal_attention, given, same=False)}
        exact = augmented
        if case.B == 1:
            found["keops"] = peer("pykeops", lambda: way(functools.partial(keops_gaussian, bandwidth=bandwidth), given))
    else:
        found["two products"] = way(lambda q, k, v: q @ (k.mT @ v) / case.N, given)
    if case.B * case.N**2 <= 4 * LARGE_MATRIX and case.dtype == torch.float32:
        found["eager"] = way(eager, given)
    pairs = case.B * case.N**2
    flops = 4.0 * pairs * case.D if case.kernel != "dot" else 4.0 * case.B * case.N * case.D**2
    return comparison.Case(
        "nonlocal_attention", case.name, found, way(exact, [t.double() for t in given]), flops=flops,
        bytes=4.0 * case.B * case.N * case.D * given[0].element_size(), backward_flops=2.5, train=case.train,
        bars=case.bars,
    )  # fmt: skip


def _flex(given, train: bool) -> Way | str:
    if train:
        return "FlexAttention cannot train on the CPU; its forward pass is in the forward cases"
    if not COMPILE:
        return "not asked for (it has to be compiled)"
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, dynamic=False)
    return Way(lambda: run(*given), given)  # not `way`: on the CPU it refuses inputs that want a gradient


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nonlocal_attention(record, case):
    record(comparison_of(case))


def test_nonlocal2d(record):
    """Wang et al.'s block, 64 channels, 56 x 56, as a training step."""
    channels, inner, size = 64, 32, 8 if SMOKE else 56
    ours = dnl.NonLocal2d(channels, inner, zero_init=False).to(DEVICE)
    plain = PlainNonLocal2d(ours.theta, ours.phi, ours.g, ours.out, ours.norm)
    x = torch.randn(2, channels, size, size, device=DEVICE).requires_grad_()

    def mmcv():
        from mmcv.cnn import NonLocal2d

        block = NonLocal2d(channels, mode="embedded_gaussian", norm_cfg={"type": "BN"}, zeros_init=False)
        names = {"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "out": "conv_out.conv", "norm": "conv_out.bn"}
        for name, other in names.items():
            target, source = block.get_submodule(other), getattr(ours, name)
            state = {k: v for k, v in source.state_dict().items() if k in target.state_dict()}
            target.load_state_dict(state)
        return of_module(block.to(DEVICE), x)._replace(leaves=[x])

    exact_x = x.detach().double().requires_grad_()
    twin = dnl.NonLocal2d(channels, inner, zero_init=False).to(DEVICE)
    twin.load_state_dict(ours.state_dict())
    twin.double()
    exact = of_module(PlainNonLocal2d(twin.theta, twin.phi, twin.g, twin.out, twin.norm), exact_x)
    found: dict[str, Way | str] = {
        "ours": of_module(ours, x)._replace(leaves=[x]),
        "matmul and softmax": of_module(plain, x)._replace(leaves=[x]),
        "mmcv": peer("mmcv", mmcv),
    }
    record(comparison.Case("NonLocal2d", f"C{channels}-{size}x{size}-B2", found, exact._replace(leaves=[exact_x]),
                           bars={"matmul and softmax": 2.0}))  # fmt: skip
