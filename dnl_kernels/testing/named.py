"""The named cases of every operator in one form, for tests that run them on any backend and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dnl_block.config import LayerParameters
from . import dense_conv2d, dense_linear, dense_sum, dnl_block, dnl_layer, nonlocal_attention
from .budget import assert_within_budget, cotangent, exactly, relative_error


class Call(NamedTuple):
    """leaves: the differentiable tensors by name, on the CPU. run(leaves, backend): the operator on them, wherever they
    are."""

    leaves: dict[str, Tensor]
    run: Callable[[Mapping[str, Tensor], str | None], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype


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
        return Call(_given(named), run)

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
    return Call(leaves, run)


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
    found = torch.autograd.grad(output, list(leaves.values()), cotangent(output), allow_unused=True)
    named = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    return {"output": output.detach(), **named}


def check(call: Call, backend: str | None, device: str = "cpu") -> None:
    """The output and every gradient on `device`, within the error budget against float64 on the CPU."""
    wide = {name: t.double() for name, t in call.leaves.items()}
    exact = exactly(lambda: gradients(call, wide, "reference"), call.dtype, call.dtype)
    actual = gradients(call, {name: t.to(device) for name, t in call.leaves.items()}, backend)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_budget(name, value.cpu(), exact[name])


FEW = 256  # elements, whose largest error is chance: the gradients of so few are measured as one vector


def _small_ones_together(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    small = {name: t for name, t in found.items() if name != "output" and t.numel() <= FEW}
    large = {name: t for name, t in found.items() if name not in small}
    return large | ({"small gradients": torch.cat([t.flatten() for t in small.values()])} if small else {})


def check_once(call: Call, backend: str | None, device: str = "cpu") -> None:
    """The output and every gradient of a case that is too large for `check`, whose bound takes many runs of the
    reference in float64, and for a Gaussian all pairs' differences in memory: one run of it, on `device`, and one in
    the dtype of the case. Ours may be twice as wrong as that one is, plus four units in the last place of the largest
    element: the weaker rule, as eager's error is that of its libraries."""
    there = {name: t.to(device) for name, t in call.leaves.items()}
    exact = gradients(call, {name: t.double() for name, t in there.items()}, "reference")
    eager, actual = (gradients(call, there, b) for b in ("reference", backend))
    assert actual.keys() == eager.keys() == exact.keys()
    actual, eager, exact = map(_small_ones_together, (actual, eager, exact))
    for name, value in actual.items():
        error, baseline = (relative_error(t, exact[name]) for t in (value, eager[name]))
        allowed = 2 * baseline + 4 * torch.finfo(value.dtype).eps
        assert error <= allowed, f"{name}: error {error:.2e}, eager's {baseline:.2e}"
