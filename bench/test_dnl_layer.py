"""dnl_layer against what a user writes: concatenation, projections, scaled_dot_product_attention, activation."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from bench.comparison import DEVICE, SMOKE, Case, compiled, way
from dnl_kernels.testing.dnl_layer import CASES, SIZES, call, inputs

NAMES = ("equation-1", "softmax")


def with_sdpa(case, states, tensors):
    """The softmax layer with torch's fused attention; images become tokens, as attention wants them."""
    images = len(case.positions) == 2
    x = torch.cat(states, 1 if images else -1)
    x = x.flatten(2).mT if images else x
    if case.preactivation:
        x = torch.relu(x * tensors["norm_scale"] + tensors["norm_shift"])
    y = case.tau * F.linear(x, tensors["affine_weight"].flatten(1)) + tensors.get("affine_bias", 0.0)

    def heads(name):
        return F.linear(y, tensors[f"theta.{name}_weight"], tensors.get(f"theta.{name}_bias")).unflatten(
            -1, (case.heads, -1)
        ).transpose(1, 2)  # fmt: skip

    attended = F.scaled_dot_product_attention(*map(heads, ("query", "key", "value")))
    z = F.linear(attended.transpose(1, 2).flatten(2), tensors["theta.output_weight"], tensors.get("theta.output_bias"))
    z = z + y if case.residual else z
    z = getattr(torch, case.activation)(z) if case.activation != "identity" else z
    return z.mT.unflatten(2, case.positions).contiguous() if images else z


def comparison(name: str) -> Case:
    case = (CASES | SIZES)[name]
    if SMOKE:
        case = case._replace(batch=min(case.batch, 1), positions=tuple(min(n, 64) for n in case.positions))
    states, tensors = inputs(case, torch.float32)
    names, given = list(tensors), [t.to(DEVICE) for t in (*tensors.values(), *states)]

    def split(function):
        def applied(*leaves, **options):
            return function(case, list(leaves[len(names) :]), dict(zip(names, leaves, strict=False)), **options)

        return applied

    ours, eager = split(call), functools.partial(split(call), backend="reference")
    ways = {"ours": way(ours, given), "eager": way(eager, given)}
    ways["compile"] = compiled(ways["eager"]) if name in SIZES else "the small cases are not compiled"
    plain = case.kernel == "softmax" and (case.size == 1 or len(case.positions) == 1) and not case.skip
    if plain:
        ways["sdpa"] = way(split(with_sdpa), given)
    positions, channels, inner = math.prod(case.positions), sum(case.channels), 3 * case.heads
    per_position = channels * case.width * (case.size**2 if len(case.positions) == 2 else 1)
    if case.kernel != "local":
        per_position += 4 * inner * case.width + 2 * positions * inner
    rows = case.batch * positions
    return Case(
        "dnl_layer", name, ways, way(eager, [t.double() for t in given]),
        flops=2.0 * rows * per_position, bytes=4.0 * rows * (channels + case.width),
        backward_flops=2.5 if case.kernel != "local" else 2.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *SIZES])
def test_dnl_layer(record, name):
    record(comparison(name))
