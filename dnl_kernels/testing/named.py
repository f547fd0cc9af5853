"""The named cases of every operator in one form, for tests that run them on any backend and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dnl_block.config import LayerParameters
from . import dense_conv2d, dense_linear, dense_sum, dnl_block, dnl_layer, nonlocal_attention
from .budget import assert_within_budget, relative_error


class Call(NamedTuple):
    """leaves: the differentiable tensors by name, on the CPU. run(leaves, backend): the operator on them, wherever they
    are. factors: of the error budget by the name of a gradient or "output", where it is not 2; "" for all.
    sensitive: the result depends so much on the inputs' last bits that eager's error is chance; see `sensitivity`.
    together: all gradients are measured as one vector, since a single one has a few elements, whose error is chance."""

    leaves: dict[str, Tensor]
    run: Callable[[Mapping[str, Tensor], str | None], Tensor]
    factors: Mapping[str, float] = {}
    sensitive: bool = False
    together: bool = False


def _listed(states: list[Tensor]) -> dict[str, Tensor]:
    return {f"states[{j}]": state for j, state in enumerate(states)}


def _given(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _split(leaves: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    states = [t for name, t in leaves.items() if name.startswith("states[")]
    return states, {name: t for name, t in leaves.items() if not name.startswith("states[")}


def _dense_sum(case, dtype) -> Call:
    weight, states = dense_sum.inputs(case, dtype)

    def run(leaves, backend):
        states, others = _split(leaves)
        return dense_sum.dense_sum(states, others["weight"], channel_dim=case.channel_dim or 0, backend=backend)

    return Call({"weight": weight, **_listed(states)}, run)


def _dense_linear(case, dtype) -> Call:
    tensors: dict[str, Any] = dense_linear.inputs(case, dtype)
    states = tensors.pop("states")

    def run(leaves, backend):
        states, others = _split(leaves)
        words: Any = {"activation": case.activation, "scale": case.scale, "backend": backend}
        return dense_linear.dense_linear(states, **others, **words)

    return Call({**_given(tensors), **_listed(states)}, run)


def _dense_conv2d(case, dtype) -> Call:
    parameters, states = dense_conv2d.inputs(case, dtype)

    def run(leaves, backend):
        states, others = _split(leaves)
        words: Any = {"activation": case.activation, "scale": case.scale, "backend": backend}
        return dense_conv2d.dense_conv2d(states, **others, **words)

    named = dict(zip(dense_conv2d.NAMES, parameters, strict=True))
    return Call({**_given(named), **_listed(states)}, run)


def _nonlocal_attention(kernel):
    def make(case, dtype) -> Call:
        tensors, mask = nonlocal_attention.inputs(case, kernel, dtype)

        def run(leaves, backend):
            words = nonlocal_attention.keywords(case, kernel) | {"backend": backend}
            words["key_mask"] = None if mask is None else mask.to(leaves["query"].device)
            return nonlocal_attention.nonlocal_attention(**leaves, **words)

        named = dict(zip(("query", "key", "value", "bandwidth"), tensors, strict=True))
        sensitive = case.spread > 1  # over eight draws the Triton kernels were seen at 2.4 times the budget's baseline
        return Call(_given(named), run, {"": 3.0 if sensitive else case.factor, "bandwidth": 10.0}, sensitive)

    return make


def _dnl_layer(case, dtype) -> Call:
    states, tensors = dnl_layer.inputs(case, dtype)

    def run(leaves, backend):
        states, others = _split(leaves)
        return dnl_layer.call(case, states, others, backend)

    return Call({**tensors, **_listed(states)}, run)


def _dnl_block(case, dtype) -> Call:
    x0, layers = dnl_block.inputs(case, dtype)
    trainable = dnl_block.trainable(layers)

    def run(leaves, backend):
        x0, *others = leaves.values()
        filled = [{name: t.to(x0) for name, t in layer.items()} for layer in layers]
        for (i, name), leaf in zip(trainable, others, strict=True):
            filled[i][name] = leaf
        parameters = [LayerParameters(**layer) for layer in filled]
        return dnl_block.dnl_block(x0, parameters, case.config, backend=backend)

    leaves = {"x0": x0, **{f"layer {i}: {name}": layers[i][name] for i, name in trainable}}
    return Call(leaves, run, together=True)


def _cases() -> dict[str, dict[str, Callable[[torch.dtype], Call]]]:
    def bind(make, cases):
        return {name: lambda dtype, case=case: make(case, dtype) for name, case in cases.items()}

    found = {
        "dense_sum": bind(_dense_sum, dense_sum.CASES),
        "dense_linear": bind(_dense_linear, dense_linear.CASES),
        "dense_conv2d": bind(_dense_conv2d, dense_conv2d.CASES),
        "nonlocal_attention": {},
        "dnl_layer": bind(_dnl_layer, dnl_layer.CASES),
        "dnl_block": bind(_dnl_block, dnl_block.CASES),
    }
    for kernel in nonlocal_attention.KERNELS:
        for name, make in bind(_nonlocal_attention(kernel), nonlocal_attention.CASES).items():
            found["nonlocal_attention"][f"{kernel}-{name}"] = make
    return found


CASES = _cases()  # operator -> case -> (dtype -> Call)


def gradients(call: Call, leaves: Mapping[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """The output and the gradient of every leaf, for a fixed gradient of the output."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    output = call.run(leaves, backend)
    ramp = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output)
    found = torch.autograd.grad(output, list(leaves.values()), ramp, allow_unused=True)
    named = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    return {"output": output.detach(), **named}


def sensitivity(call: Call, exact: Mapping[str, Tensor], dtype: torch.dtype, draws: int = 8) -> dict[str, float]:
    """The largest errors that one rounding of every input causes in exact arithmetic: what no algorithm in that dtype
    can be expected to beat (backward stability), and no luck of a single eager result changes."""
    generator, unit = torch.Generator().manual_seed(0), torch.finfo(dtype).eps / 2
    worst = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        moved = {
            name: t.double() * (1 + unit * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))
            for name, t in call.leaves.items()
        }
        for name, found in gradients(call, moved, "reference").items():
            worst[name] = max(worst[name], relative_error(found, exact[name]))
    return worst


def _together(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.cat([t.flatten() for name, t in found.items() if name != "output"])
    return {"output": found["output"], "gradients": gradients}


def check(call: Call, backend: str | None, device: str = "cpu") -> None:
    """The output and every gradient on `device`, within the error budget against float64 on the CPU."""
    there = {name: t.to(device) for name, t in call.leaves.items()}
    actual = gradients(call, there, backend)
    eager = gradients(call, there, "reference")
    exact = gradients(call, {name: t.double() for name, t in call.leaves.items()}, "reference")
    assert actual.keys() == eager.keys() == exact.keys()
    if call.together:
        actual, eager, exact = map(_together, (actual, eager, exact))
    floors = sensitivity(call, exact, next(iter(call.leaves.values())).dtype) if call.sensitive else {}
    for name, value in actual.items():
        factor = call.factors.get(name, call.factors.get("", 2.0))
        assert_within_budget(name, value.cpu(), exact[name], eager[name].cpu(), factor, floors.get(name, 0.0))
