"""Dense blocks: the layers of DenseNets (torchvision, timm, MONAI, torchxrayvision, segmentation_models_pytorch), of
FC-DenseNets, of residual dense networks, of densely connected perceptrons, and every copy of them with the same
children."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._activations import activate
from ..layers import DenseLayer
from ..plan import Plan, Segment
from .base import (
    MUST,
    Attributes,
    Executor,
    Skeleton,
    attributes,
    differ,
    get,
    is_activation,
    is_convolution,
    is_dropout,
    is_linear,
    is_norm,
    join,
    origin,
)

Call = Callable[[Any, list[Tensor]], list[Tensor]]
# How a block hands its states to a layer and takes its output: (the layer, states before) -> states after.
CALLS: dict[str, Callable[[int, Any], Call]] = {
    # torchvision, timm: the layer joins them
    "list": lambda axis, act: lambda layer, states: [*states, layer(states)],
    # MONAI, torchxrayvision: the layer appends its output
    "joined": lambda axis, act: lambda layer, states: [layer(join(states, axis))],
    # FC-DenseNet: the block does
    "output": lambda axis, act: lambda layer, states: [*states, layer(join(states, axis))],
    # the layers are convolutions or linear maps, and the block calls the activation
    "activated": lambda axis, act: lambda layer, states: [*states, act(layer(join(states, axis)))],
}
# How many numbers the states of a block of linear maps have where its kernels begin to be worth their calls, in a
# training step, of which they keep a fourth for backward, and in evaluation.
WORTH = (2**18, 2**22)
FUNCTIONS = ("relu", "gelu", "silu", "tanh", "identity")
NAMES = {  # parts of a layer by the names of torchvision's children; what has other names is told by its class
    "norm1": "norm", "conv1": "affine", "norm2": "inner_norm", "conv2": "inner",
}  # fmt: skip
DROPOUT = "drop_rate"
RECOMPUTATION = {"memory_efficient", "grad_checkpointing"}
KNOWN = {DROPOUT, *RECOMPUTATION}  # attributes whose change is understood


class Layer(NamedTuple):
    """One layer: paths from the owner, and the classes that were there when the block was proved."""

    path: str
    skeleton: tuple[Skeleton, ...]  # the layer and its containers
    parts: tuple[tuple[str, str], ...]
    activations: tuple[str | None, ...]  # None: functional, relu
    dropout: str | None  # the path of the module
    preactivation: bool
    norms: tuple[type, ...]  # classes of its norms that hold their activation themselves (timm)
    attributes: Attributes  # of the layer, but those that are understood


class Blueprint(NamedTuple):
    skeleton: tuple[Skeleton, ...]  # the owner and the container of its layers
    layers: tuple[Layer, ...]
    last: str | None  # the path of a further child, which the joined states go through
    call: str
    activation: str | None  # of "activated": the path of a child, or the name of a function
    appended: bool  # the result is the output of all layers without the input
    axis: int  # of the channels
    ranks: tuple[int, ...]  # of an input: those for which it was proved
    attributes: Attributes  # of the owner, but those that are understood

    @property
    def unsure(self) -> bool:
        """A list of maps of growing width is a dense block only if it runs as one: else nothing is said of it."""
        return self.call == "activated"


def leaves(owner: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """(path, module) in order, through containers (nn.Sequential) below the layer."""
    for name, child in get(owner, path)._modules.items():
        if child is None:
            continue
        inner = f"{path}.{name}"
        if isinstance(child, nn.Sequential):
            yield from leaves(owner, inner)
        else:
            yield inner, child


def containers(owner: nn.Module, path: str) -> Iterator[str]:
    yield path
    for name, child in get(owner, path)._modules.items():
        if isinstance(child, nn.Sequential):
            yield from containers(owner, f"{path}.{name}")


def read_layer(owner: nn.Module, path: str) -> Layer | None:
    """The layer at `path` if its children are those of a dense layer, in their order."""
    found = list(leaves(owner, path))
    skeleton = [Skeleton.of(owner, inner) for inner in containers(owner, path)]
    by_name = {inner.rpartition(".")[2]: inner for inner, _ in found}
    named = {"norm1", "conv1"} <= set(by_name)
    order: list[str] = []  # of kinds
    parts: dict[str, str] = {}
    activations: list[str | None] = []
    dropout = None
    norms: list[type] = []
    for inner, module in found:
        name = inner.rpartition(".")[2]
        role = NAMES.get(name) if named else None
        if role or is_norm(module) or is_convolution(module) or is_linear(module):
            kind = "norm" if (role.endswith("norm") if role else is_norm(module)) else "conv"
            order.append(kind)
            slots = ("norm", "inner_norm") if kind == "norm" else ("affine", "inner")
            free = [slot for slot in slots if slot not in parts]
            if not free:
                return None
            parts[free[0]] = inner
            act = module._modules.get("act")
            if kind == "norm" and act is not None:  # timm's norms hold their activation
                order.append("act")
                activations.append(f"{inner}.act")
                norms.append(type(module))
                skeleton.append(Skeleton.of(owner, inner))
                if module._modules.get("drop") is not None:
                    skeleton.append(Skeleton.of(owner, f"{inner}.drop"))
        elif is_dropout(module) or (named and name.startswith("drop")):
            if dropout is not None:
                return None
            dropout = inner
            order.append("dropout")
        elif is_activation(module) or (named and name.startswith(("relu", "act"))):
            order.append("act")
            activations.append(inner)
        elif not isinstance(module, nn.Identity):
            return None
    if "dropout" in order and order[-1] != "dropout":
        return None
    kinds = [kind for kind in order if kind != "dropout"]
    complete = _with_functional_activations(kinds)
    if complete is None:
        return None
    if "act" not in kinds:
        activations = [None] * complete.count("act")
    elif kinds != complete:
        return None
    return Layer(path, tuple(skeleton), tuple(parts.items()), tuple(activations), dropout,
                 complete[-1] == "conv", tuple(norms), attributes(owner, [path], KNOWN))  # fmt: skip


def opaque(owner: nn.Module, path: str) -> Layer:
    """A layer of which nothing is known but how it is called."""
    return Layer(path, (Skeleton.of(owner, path),), (), (), None, True, (), ())


def bare_layer(owner: nn.Module, path: str) -> Layer:
    """A convolution or a linear map, whose activation the block calls."""
    return Layer(path, (Skeleton.of(owner, path),), (("affine", path),), (), None, False, (), ())


def is_bare(layer: Layer) -> bool:
    return bool(layer.parts) and not layer.activations


def _affine(layers: Iterable[Layer]) -> list[tuple[str, str]]:
    return [(part, path) for layer in layers for part, path in layer.parts if part in ("affine", "inner")]


ORDERS = (  # of a dense layer
    ["norm", "act", "conv", "norm", "act", "conv"],
    ["norm", "act", "conv"],
    ["act", "conv"],
    ["conv", "norm", "act"],
    ["conv", "act"],
)


def _with_functional_activations(kinds: list[str]) -> list[str] | None:
    for order in ORDERS:
        if kinds == order or kinds == [kind for kind in order if kind != "act"]:
            return order
    return None


def widths(owner: nn.Module, layer: Layer) -> tuple[int | None, int | None]:
    """The channels that a layer reads and those of its output, where its convolutions say so."""
    convolutions = [get(owner, path) for _, path in _affine([layer])]
    if not convolutions:
        return None, None

    def width(module: Any, *names: str) -> int | None:
        return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)

    return width(convolutions[0], "in_channels", "in_features"), width(convolutions[-1], "out_channels", "out_features")


class DenseBlocks:
    name = "dense block"
    structure = (
        "dense blocks: layers whose children are a normalisation, an activation and a convolution once or twice in "
        "this order (norm1, relu1, conv1, norm2, relu2, conv2), or a convolution and an activation; or linear maps in "
        "their place; each reads all"
    )

    def blueprints(self, module: nn.Module) -> Iterable[Blueprint | str]:
        """A block is a module whose children, or the children of its only container, are dense layers of growing
        width."""
        found = self.layers(module)
        if found is None:
            kinds = {type(child) for child in module._modules.values()}
            child = next(iter(module._modules.values()), None)
            own = child is not None and not type(child).__module__.startswith("torch.nn")
            if own and len(kinds) == 1 < len(module._modules) and "dense" in origin(module).__name__.lower():
                names = ", ".join(child._modules)  # type: ignore[union-attr]
                yield f"its layers are other than those of a dense block: {type(child).__name__} of {names}"
            return
        at, layers, last, shared = found
        skeleton = tuple(Skeleton.of(module, path) for path in dict.fromkeys(("", at)))
        axis = -1 if all(is_linear(get(module, path)) for _, path in _affine(layers)) else 1
        channels = None
        for layer in layers:
            read, new = widths(module, layer)
            if channels is not None and read is not None and read != channels:
                if "dense" in origin(module).__name__.lower() and not is_bare(layer):
                    yield f"{layer.path} reads {read} channels; expected {channels}, all that come before it"
                return
            channels = None if read is None or new is None else read + new
        forms: list[tuple[str, str | None, bool]] = [(call, None, False) for call in ("list", "output", "joined")]
        forms.append(("output", None, True))
        if is_bare(layers[0]):
            functions = FUNCTIONS if shared is None else [shared]
            forms = [("activated", name, appended) for name in functions for appended in (False, True)]
        if origin(module).forward is nn.Sequential.forward:
            forms = [("joined", None, False)]
        for call, activation, appended in forms:
            yield Blueprint(skeleton, layers, last, call, activation, appended, axis, (),
                            attributes(module, [""], KNOWN))  # fmt: skip

    def layers(self, module: nn.Module) -> tuple[str, tuple[Layer, ...], str | None, str | None] | None:
        """The container of the layers, the layers, a further child, and an activation that all of them share."""
        at, last, shared = "", None, None
        children = {name: child for name, child in module._modules.items() if child is not None}
        lists = [name for name, child in children.items() if type(child) in (nn.ModuleList, nn.ModuleDict)]
        if len(lists) == 1:
            others = [name for name in children if name != lists[0]]
            activations = [name for name in others if is_activation(children[name])]
            if len(activations) <= 1 and len(others) - len(activations) <= 1:
                at, shared = lists[0], next(iter(activations), None)
                last = next((name for name in others if name != shared), None)
        names = list(get(module, at)._modules)
        if not names or any(get(module, f"{at}.{name}".strip(".")) is None for name in names):
            return None
        paths = [f"{at}.{name}".strip(".") for name in names]
        bare = [is_linear(get(module, path)) or is_convolution(get(module, path)) for path in paths]
        if at and len(paths) > 1 and bare[0] and sum(bare) > len(bare) / 2:
            layers = [bare_layer(module, p) if b else opaque(module, p) for p, b in zip(paths, bare, strict=True)]
            return at, tuple(layers), last, shared
        if shared is not None or any(bare) or not all(get(module, path)._modules for path in paths):
            return None
        layers = [read_layer(module, path) or opaque(module, path) for path in paths]
        read = [layer for layer in layers if layer.parts]
        called_dense = "dense" in origin(module).__name__.lower()
        if not read or (len(read) < len(layers) or len(layers) == 1) and not called_dense:
            return None
        return at, tuple(layers), last, None

    def inputs(self, module: nn.Module, blueprint: Blueprint) -> Iterable[tuple[Any, ...]]:
        first = next(layer for layer in blueprint.layers if layer.parts)
        parts = {part: get(module, path) for part, path in first.parts}
        channels, _ = widths(module, first)
        channels = channels or getattr(parts.get("norm"), "num_features", None)
        convolution = next((m for m in parts.values() if is_convolution(m)), None)
        if channels is None:
            return
        if convolution is None:
            yield from (((5, channels),), ((2, 5, channels),))
            return
        rank = len(convolution.kernel_size)
        for sizes in ((7,), (5, 6), (4, 5, 3))[rank - 1], ((32,), (12, 12), (8, 8, 8))[rank - 1]:
            yield ((2, channels, *sizes),)

    def execute_plainly(self, module: nn.Module, blueprint: Blueprint, *inputs: Any) -> Tensor:
        states, call = [inputs[0]], self.call(module, blueprint)
        for layer in blueprint.layers:
            states = call(get(module, layer.path), states)
        return self.finish(module, blueprint, join(states, blueprint.axis), inputs[0])

    def call(self, owner: nn.Module, blueprint: Blueprint) -> Call:
        name = blueprint.activation
        act = functools.partial(activate, activation=name) if name in FUNCTIONS else get(owner, name or "")
        return CALLS[blueprint.call](blueprint.axis, act)

    def finish(self, owner: nn.Module, blueprint: Blueprint, states: Tensor, x: Tensor) -> Tensor:
        """The block's result from all states and its input."""
        if blueprint.appended:
            width = x.shape[blueprint.axis]
            states = states.narrow(blueprint.axis, width, states.shape[blueprint.axis] - width)
        return states if blueprint.last is None else get(owner, blueprint.last)(states)

    def prepare(self, module: nn.Module) -> None:
        """For the proof: recomputation updates the statistics of a layer twice in PyTorch, here once."""
        for layer in module.modules():
            for name in RECOMPUTATION & layer.__dict__.keys():
                setattr(layer, name, False)

    def complete(self, module: nn.Module, blueprint: Blueprint, inputs: tuple[Any, ...]) -> Blueprint | None:
        """With the ranks of an input that the block was seen to take: linear maps may take rows, tokens or both."""
        ranks = [inputs[0].dim()]
        if blueprint.axis == -1 and ranks == [2]:
            tokens = torch.stack([inputs[0], inputs[0].flip(0)])
            try:
                found, expected = self.execute_plainly(module, blueprint, tokens), module(tokens)
                ranks += [3] if found.shape == expected.shape and torch.allclose(found, expected, 1e-9, 1e-9) else []
            except (RuntimeError, ValueError):  # batch normalisation reads its channels elsewhere
                pass
        return blueprint._replace(ranks=tuple(ranks))

    def executor(self, module: nn.Module, blueprint: Blueprint, backend: str | None) -> Executor:
        return BlockExecutor(module, blueprint, backend, self)


class BlockExecutor:
    """Runs a block by the plan of its layers."""

    def __init__(self, owner: nn.Module, blueprint: Blueprint, backend: str | None, family: DenseBlocks):
        self._owner, self._blueprint, self._backend, self._family = owner, blueprint, backend, family
        self.plan = Plan(self.describe, blueprint.axis, tokens=False)

    def __call__(self, x: Tensor) -> Tensor | None:
        if x.dim() not in self._blueprint.ranks or self._too_small(x):
            return None
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
            return None  # joined with what autocast makes narrower, the states are as wide as x
        states = self.plan(self._owner, x, self._backend)
        return None if states is None else self._family.finish(self._owner, self._blueprint, states, x)

    def _too_small(self, x: Tensor) -> bool:
        """Whether a block of linear maps would gain nothing; asked for a backend, or in the proof, it is never."""
        if self._blueprint.axis == 1 or self._backend is not None or MUST in self._owner.__dict__:
            return False
        outputs = [widths(self._owner, layer)[1] or 0 for layer in self._blueprint.layers]
        parameters = self._owner.parameters()
        backward = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
        return x[..., 0].numel() * (x.shape[-1] + sum(outputs)) < WORTH[not backward]

    def summary(self) -> str:
        """How many layers run on kernels as they are now, and why the others do not."""
        first = next(layer for layer in self._blueprint.layers if layer.parts)
        channels, _ = widths(self._owner, first)
        return summarise(self.plan.segments(self._owner, torch.empty(1, channels or 0, device="meta")))

    def describe(self, owner: nn.Module) -> list[DenseLayer] | str:
        for skeleton in self._blueprint.skeleton:
            if not skeleton.holds(owner):
                return f"{skeleton.path or 'it'} has other children than when it was accelerated"
        if changed := differ(owner, self._blueprint.attributes, KNOWN):  # it may mean anything
            return f"{changed[0]} is not what it was when it was accelerated"
        call, name = self._family.call(owner, self._blueprint), self._blueprint.activation
        shared = name if name is None or name in FUNCTIONS else get(owner, name)
        holders = tuple(get(owner, skeleton.path) for skeleton in self._blueprint.skeleton if skeleton.path)
        return [describe_layer(owner, layer, call, shared, holders) for layer in self._blueprint.layers]


def summarise(segments: list[Segment] | str) -> str:
    if isinstance(segments, str):
        return segments
    count = sum(len(segment.layers) for segment in segments)
    called = {segment.layers[0].name: segment.reason for segment in segments if segment.config is None}
    by_kernels = sum(len(segment.layers) for segment in segments if segment.config is not None)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in called.items())
    return f"{by_kernels} of {count} layers by kernels" + (f"; by their submodules: {reasons}" if reasons else "")


def describe_layer(
    owner: nn.Module, layer: Layer, call: Call, shared: Any = None, holders: tuple[Any, ...] = ()
) -> DenseLayer:
    """What stands at the layer's path now; without parts where it is not what was proved: it is only called then.
    shared: the activation that the block calls behind a layer without one, a name or a module. holders: containers of
    the layers, in which one may be replaced."""
    module = get(owner, layer.path)
    name = layer.path.rpartition(".")[2]
    parts = {part: get(owner, path) for part, path in layer.parts}
    activations = tuple("relu" if path is None else get(owner, path) for path in layer.activations)
    activations = (shared,) if is_bare(layer) and shared is not None else activations
    if (
        not all(skeleton.holds(owner) for skeleton in layer.skeleton)
        or any(part is None for part in parts.values())
        or any(activation is None for activation in activations)
        or differ(owner, layer.attributes, KNOWN)
    ):
        return DenseLayer(name, module, call, {}, (), others=holders)
    dropout: Any = get(owner, layer.dropout) if layer.dropout else getattr(module, DROPOUT, 0.0) or None
    others = (*holders, *(get(owner, skeleton.path) for skeleton in layer.skeleton[1:]))
    return DenseLayer(
        name, module, call, parts, activations, dropout, layer.preactivation, others, plain_types=frozenset(layer.norms)
    )
