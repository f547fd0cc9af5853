"""The proof that a module may be accelerated: both ways on a small random input, in float64, on copies.

The copies have random parameters and statistics, so that neither a zero weight nor a gamma of 1 hides a difference;
they have the modes of the module, but not its hooks, which would see the proof.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .families.base import MUST, Family, origin
from .subclass import Declined, Settings, put_on

CPU = (None, "reference", "cpu")  # backends that can run the proof
TOLERANCE = 1e-7  # of the largest element, in float64 after a few dozen layers
HOOKS = [name for name in nn.Module().__dict__ if "hook" in name]


def copy_in_float64(module: nn.Module, generator: torch.Generator | None = None) -> Any:
    """`module` in float64 on the CPU, without hooks; with random tensors where there is a generator. `module` is only
    read."""
    memo: dict[int, Any] = {}

    def tensor(value: Tensor, positive: bool) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):
            return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach().cpu().clone()
        if generator is None:
            return value.detach().clone()
        if positive:  # a buffer: a variance, a mask, a frozen weight
            return torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
        fan_in = max(value.numel() // max(value.shape[0], 1), 1) if value.dim() > 1 else 1
        return torch.randn(value.shape, generator=generator, dtype=torch.float64) / fan_in**0.5

    def convert(value: Any, positive: bool = False) -> Any:
        if id(value) in memo:
            return memo[id(value)]
        if isinstance(value, nn.Module):
            return visit(value)
        if isinstance(value, nn.Parameter):
            new: Any = nn.Parameter(tensor(value, False)) if value.is_floating_point() else value
        elif isinstance(value, Tensor):
            new = tensor(value, positive)
        elif type(value) in (list, tuple):
            new = type(value)(convert(item, positive) for item in value)
        elif type(value) is dict or isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
            new = type(value)((key, convert(item, positive)) for key, item in value.items())
        elif isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, convert(value.__self__))
        else:
            return value
        memo[id(value)] = new
        return new

    def visit(original: nn.Module) -> nn.Module:
        new: Any = object.__new__(origin(original))
        memo[id(original)] = new
        state = new.__dict__
        for key, value in original.__dict__.items():
            if key.startswith("_dnl"):
                continue
            state[key] = (
                type(value)() if key in HOOKS and isinstance(value, dict) else convert(value, key == "_buffers")
            )
        return new

    return visit(module)


def verdict(module: nn.Module, family: Family, backend: str | None, verify: bool) -> Settings | str | None:
    """How `module` may be accelerated as one of `family`, or why it may not; None where it has no likeness."""
    reason = model = None
    for found in family.blueprints(module):
        if isinstance(found, str):
            return found
        if "forward" in module.__dict__:
            return "a forward of its own was set on the instance"
        with _isolated():
            try:
                if model is None:
                    proved = family.subject(module, found) if hasattr(family, "subject") else module
                    model = copy_in_float64(proved, torch.Generator().manual_seed(1))
                    getattr(family, "prepare", lambda model: None)(model)
                settings, inputs = _fit(model, family, found, backend)
                if isinstance(settings, Settings) and verify:
                    settings = _prove(model, family, settings, inputs)
            except Exception as error:  # whatever the user's modules raise
                settings = f"it could not be run on a copy of it: {type(error).__name__}: {_first_line(error)}"
        if isinstance(settings, Settings):
            return settings
        if not getattr(found, "unsure", False):
            reason = reason or settings
    return reason


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class _isolated:
    """Random numbers, gradient mode, autocast and the default device as if nothing had been run."""

    def __enter__(self) -> None:
        self._contexts: list[Any] = [
            torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ]  # fmt: skip
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _drive(family: Family) -> Callable[..., Tensor]:
    return getattr(family, "drive", lambda module, *inputs: module(*inputs))


def _sample(shapes: tuple[Any, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def _differ(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """The largest error, as a part of the largest number or of `floor`."""
    if a.shape != b.shape:
        return float("inf")
    scale = max(float(b.abs().amax()) if b.numel() else 0.0, floor)
    error = float((a - b).abs().amax()) if b.numel() else 0.0
    if error == 0.0:
        return 0.0
    return error / scale if error == error and scale > 0.0 else float("inf")


def _fit(
    module: nn.Module, family: Family, blueprint: Any, backend: str | None
) -> tuple[Settings | str, tuple[Tensor, ...]]:
    """The settings, and an input that the module takes; or why the blueprint, in plain PyTorch, is not what the module
    computes in evaluation."""
    copy = copy_in_float64(module).eval()
    failure: Exception | None = None
    for shapes in family.inputs(module, blueprint):
        inputs = _sample(shapes)
        with torch.no_grad():
            try:
                expected = _drive(family)(copy, *inputs)
            except RuntimeError as raised:
                failure = raised
                continue
            completed = family.complete(copy, blueprint, inputs)
            found = family.execute_plainly(copy, completed, *inputs)
        if not isinstance(expected, Tensor):
            return f"its forward returns {type(expected).__name__}, not a tensor", ()
        if (error := _differ(found, expected)) > TOLERANCE:
            return f"its forward differs from that of a {family.name} with its children by {error:.1g}", ()
        return Settings(family.name, completed, backend), inputs
    if failure is None:
        return "it does not say how many channels it reads", ()
    return f"it takes no small input: {_first_line(failure)}", ()


def _prove(module: nn.Module, family: Family, settings: Settings, inputs: tuple[Tensor, ...]) -> Settings | str:
    """Output, gradients and buffers of the accelerated copy against those of the plain one: as the module stands, in
    evaluation and in training."""
    modes = [submodule.training for submodule in module.modules()]
    gradients = not getattr(family, "evaluated", False)
    several = ("its present modes",) if len(set(modes)) > 1 else ()
    for mode in (*several, "evaluation", "training") if gradients else ("evaluation",):
        results = []
        for accelerated in (False, True):
            copy = copy_in_float64(module)
            if mode != "its present modes":
                copy.train(mode == "training")
            if accelerated:
                put_on(copy, settings._replace(backend=settings.backend if settings.backend in CPU else None))
                copy.__dict__[MUST] = True
            try:
                results.append(_run(copy, family, inputs, gradients))
            except Declined:
                return "its plan declines a small input"
        plain, fast = results
        # What is zero for every input, such as the gradient of a bias before softmax, is rounding in both.
        floor = 1e-6 * max((float(t.abs().amax()) for t in plain.values() if t.numel()), default=0.0)
        for name, expected in plain.items():
            if (error := _differ(fast[name], expected, floor)) > TOLERANCE:
                return f"in {mode} {name} differs from that of its own forward by {error:.1g}"
    return settings


def _run(copy: Any, family: Family, sample: tuple[Tensor, ...], gradients: bool) -> dict[str, Tensor]:
    """Everything that a step of training can see, or an evaluation."""
    inputs = [x.clone().requires_grad_(gradients) for x in sample]
    torch.manual_seed(3)  # of dropout
    with torch.set_grad_enabled(gradients):
        out = _drive(family)(copy, *inputs)
    if not gradients:
        return {"the output": out}
    generator = torch.Generator().manual_seed(11)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
    found = {"the output": out.detach()}
    for index, x in enumerate(inputs):
        found[f"the gradient of input {index}"] = torch.zeros_like(x) if x.grad is None else x.grad
    for name, parameter in copy.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[f"the gradient of {name}"] = gradient
    return found | {name: buffer.double() for name, buffer in copy.named_buffers() if not buffer.is_complex()}
