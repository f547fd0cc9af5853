"""accelerate and restore: the dense networks that people already have, in place, proved equal."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from .._backend import check_backend
from .families import FAMILIES
from .proof import verdict
from .subclass import Settings, put_on, summary, take_off

OP = "accelerate"


class BlockReport(NamedTuple):
    """One block. name: its path in the model. reason: why it was left as it is, None where it was accelerated.
    layers: of a dense block, how many of its layers run on kernels as they are now, and why the others do not."""

    name: str
    type: str
    family: str
    reason: str | None
    layers: str = ""

    @property
    def accelerated(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        what = f"{self.name or 'the model'} ({self.type}, {self.family})"
        if self.reason is not None:
            return f"{what}: left as it is: {self.reason}"
        return f"{what}: accelerated" + (f", {self.layers}" if self.layers else "")


class Report(tuple[BlockReport, ...]):
    """Every block that was found, in the model's order."""

    __slots__ = ()

    @property
    def accelerated(self) -> list[str]:
        return [block.name for block in self if block.accelerated]

    @property
    def refused(self) -> dict[str, str]:
        """Names and reasons."""
        return {block.name: block.reason for block in self if block.reason is not None}

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def accelerate(
    model: nn.Module,
    *,
    report: bool = False,
    strict: bool = False,
    verify: bool = True,
    backend: str | None = None,
) -> Any:
    """Makes the dense blocks, transitions, non-local blocks and depth-weighted averages of `model` run on kernels of
    this package, in place, in evaluation its stem and final pooling too. The model computes what it computed.

    What changes is how a block runs, not what it is: its submodules, their names, the state_dict, hooks and optimiser
    groups stay, and isinstance holds. Each block gets a subclass of its own class, whose forward reads the tensors of
    the submodules; a layer with anything unusual (a hook, a wrapper, dropout, another normalisation) is computed by
    calling it. Where no numbers flow (torch.export, torch.compile, fx, tracing, scripting, vmap) the original forward
    runs. `restore` undoes it.

    A block is recognised by its children, whatever its class is called, and then proved: it and its accelerated copy
    run on a small random input in float64, in evaluation and in training, and every output, gradient and running
    statistic must agree. Otherwise it is left as it was, with a warning that names it and says why. Stems and final
    poolings, proved in evaluation, are not mentioned where they are left.

    Args:
        model: any module that contains such blocks, or is one. On any device, in any mode, of any dtype.
        report: return the list of all blocks with what became of them, in place of the model; no warnings then.
        strict: a block that has to be left as it is is an error, and the model is left unchanged.
        verify: the proof. Without it a block is compared in evaluation only, by plain PyTorch.
        backend: None (the best), "reference", "cpu", "triton" or "cuda", of the operators.

    Returns:
        `model`; with report=True a `Report`: a tuple of `BlockReport`, with `.accelerated`, `.refused` and a readable
        str.

    Raises:
        TypeError: model is no module, or one that is compiled, scripted, traced or wrapped by FSDP1.
        ValueError: there is no such block in the model; with strict=True, the blocks that were refused.

    Examples:
        >>> model = torchvision.models.densenet121(weights="DEFAULT")
        >>> dnl.accelerate(model)
        >>> print(dnl.accelerate(model, report=True))
    """
    _check_model(model)
    check_backend(OP, backend)
    decided = _decide(model, verify, backend)
    if not decided:
        looked_for = "; ".join(family.structure for family in FAMILIES.values())
        raise ValueError(f"{OP}: model is of type {type(model).__name__} without a block to accelerate: {looked_for}")
    refused = [block for block, _, settings in decided if settings is None]
    if strict and refused:
        raise ValueError(f"{OP}: " + "; ".join(map(str, refused)))
    restore(model)  # what was accelerated and is no longer understood stays as it is
    for _, module, settings in decided:
        if settings is not None:
            put_on(module, settings)
    if report:
        return Report(block._replace(layers=summary(module)) for block, module, _ in decided)
    for block in refused:
        warnings.warn(f"{OP}: {block}", stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every module has its own class again. Returns `model`; nothing else in it changes.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is of type {type(model).__name__}; expected a torch.nn.Module")
    for module in model.modules():
        take_off(module)
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model is of type {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"{name} in it" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{OP}: model: {where} is scripted or traced ({kind}); accelerate it before")
        if isinstance(module, torch.fx.GraphModule):
            raise TypeError(
                f"{OP}: model: {where} is a torch.fx graph ({kind}), which has no blocks; accelerate it before"
            )
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise TypeError(f"{OP}: model: {where} is compiled ({kind}); accelerate what it was made of, ._orig_mod")
        if kind == "FullyShardedDataParallel":
            raise TypeError(
                f"{OP}: model: {where} is wrapped by FSDP ({kind}), which owns its tensors; accelerate before"
            )


def _decide(
    model: nn.Module, verify: bool, backend: str | None
) -> list[tuple[BlockReport, nn.Module, Settings | None]]:
    """The verdict on every module that looks like a block; what is inside a block is part of it, what is inside an
    nn.Sequential or a network around blocks is not."""
    decided: list[tuple[BlockReport, nn.Module, Settings | None]] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        refused = None
        for family in FAMILIES.values():
            found = verdict(module, family, backend, verify)
            around = getattr(family, "surroundings", False)
            if isinstance(found, Settings):
                decided.append((BlockReport(name, type(module).__name__, family.name, None), module, found))
                inside.update(map(id, module.modules()) if not around else [id(module)])
                break
            if isinstance(found, str) and refused is None and not around:
                refused = BlockReport(name, type(module).__name__, family.name, found)
        else:
            if refused is not None:
                decided.append((refused, module, None))
                inside.update(map(id, module.modules()))
    return decided
