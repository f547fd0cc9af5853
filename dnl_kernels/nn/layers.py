"""What a layer of a dense block means, read from its submodules: the kind of layer that a kernel computes, or why none
may stand in for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
NORMS = {
    1: (nn.BatchNorm1d, nn.SyncBatchNorm),
    2: (nn.BatchNorm2d, nn.SyncBatchNorm),
    3: (nn.BatchNorm3d, nn.SyncBatchNorm),
}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ACTIVATIONS: dict[type, Callable[[Any], str | None]] = {
    nn.Identity: lambda module: "identity",
    nn.ReLU: lambda module: "relu",
    nn.Tanh: lambda module: "tanh",
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: "gelu" if module.approximate == "none" else None,
    nn.LeakyReLU: lambda module: f"leaky_relu({float(module.negative_slope)})",
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# What a change of a module's meaning shows in, by its type: names in its __dict__.
_COMMON = (*HOOKS, "_modules", "training")
_OWN = frozenset(nn.Module().__dict__)
_SIMPLE = (bool, int, float, str, type(None))
_CONVOLUTION = (
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels",
)  # fmt: skip
_WATCHED: dict[type, tuple[str, ...]] = {
    **dict.fromkeys([norm for norms in NORMS.values() for norm in norms], ("eps", "track_running_stats")),
    **dict.fromkeys(CONVOLUTIONS.values(), _CONVOLUTION),
    **dict.fromkeys(DROPOUTS, ("p",)),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.Linear: ("in_features", "out_features"),
}


class DenseLayer(NamedTuple):
    """One layer of a dense block: the user's own modules, none of them copied.

    name: what reports call the layer.
    module: the layer.
    call: plain PyTorch, from the states before the layer to the states after it, through `module.__call__`.
    parts: the submodules by their names in LayerParameters: "norm", "affine", "inner_norm", "inner", "query", "key",
        "value", "output", "skip"; or "rho", a parameter.
    activations: every activation of the layer in the order of the calls, a name where it is a function.
    dropout: behind the last convolution: a module, or a probability that holds while `module.training`.
    preactivation: (norm, activation, convolution), once or twice; else (convolution, norm if any, activation).
    others: submodules that only hold others, whose hooks and children matter.
    reads: which states the layer reads, None for all.
    options: further fields of BlockConfig: kernel, heads, head_dim, tau, input_skip, residual.
    plain_types: subclasses of torch's modules that compute what their base class does.

    A layer without parts is always called.
    """

    name: str
    module: nn.Module
    call: Callable[[nn.Module, list[Tensor]], list[Tensor]]
    parts: Mapping[str, Any]
    activations: tuple[nn.Module | str, ...] = ("relu",)
    dropout: float | nn.Module | None = None
    preactivation: bool = True
    others: tuple[nn.Module, ...] = ()
    reads: tuple[bool, ...] | None = None
    options: Mapping[str, Any] = {}
    plain_types: frozenset[type] = frozenset()

    def modules(self) -> list[nn.Module]:
        """All modules whose state decides what the layer computes."""
        found = [self.module, *self.others, *self.parts.values(), *self.activations, self.dropout]
        return [m for m in found if isinstance(m, nn.Module)]


class LayerKind(NamedTuple):
    """What consecutive layers have in common that one call of a kernel computes: fields of BlockConfig."""

    growth_rate: int
    affine: str
    spatial_dims: int
    norm: str | None
    preactivation: bool
    activation: str
    bottleneck: int | None
    eps: float
    training: bool
    options: tuple[tuple[str, Any], ...]


def is_simple(value: object) -> bool:
    """Numbers, names, and tuples or lists of them."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, _SIMPLE) for v in value)
    return isinstance(value, _SIMPLE)


def _simple_attributes(state: dict[str, Any]) -> list[str]:
    """What may decide what a module of a class unknown to us computes: eps, drop_rate."""
    return [name for name, value in state.items() if name not in _OWN and is_simple(value)]


class Watch:
    """The state of modules that decides what they compute. A look costs some 0.3 us a module."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.types = [type(m) for m in modules]
        self.rows = []
        for m in modules:
            state = m.__dict__
            names = (*_COMMON, *(_WATCHED[type(m)] if type(m) in _WATCHED else _simple_attributes(state)))
            get = itemgetter(*(name for name in names if name in state))
            # Copies: the same dictionary would be equal to itself whatever happened to it.
            values = tuple(copy.copy(value) if isinstance(value, (dict, list)) else value for value in get(state))
            self.rows.append((state, len(state), get, values))

    def unchanged(self) -> bool:
        if [m.__class__ for m in self.modules] != self.types:
            return False
        for state, size, get, values in self.rows:
            if len(state) != size or get(state) != values:
                return False
        return True


def plain(module: nn.Module) -> str | None:
    """Why calling the module is more than its class's forward, or None."""
    state = module.__dict__
    for name, words in HOOKS.items():
        if state[name]:
            return f"has {words}"
    return "has a forward of its own" if "forward" in state else None


def called_for_every_module() -> str | None:
    """Why every module of the process has to be called, or None."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "hooks are registered for all modules"
    if torch.jit.is_tracing():
        return "torch.jit.trace wants PyTorch's own operators"
    return None


def plain_tensors(tensors: list[Tensor | None]) -> bool:
    """Whether these are tensors with values of their own, none a wrapper such as DTensor or a quantised weight."""
    return not any(
        type(t) not in (nn.Parameter, Tensor) and is_traceable_wrapper_subclass(t) for t in tensors if t is not None
    )


def uses_batch_statistics(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def kind(layer: DenseLayer) -> LayerKind | str:
    """The kind of a layer whose modules a kernel computes exactly, or the reason why they have to be called."""
    if not layer.parts:
        return "its modules are not those of a layer that the kernels have"
    names = {id(part): name for name, part in layer.parts.items()}
    for m in layer.modules():
        if why := plain(m):
            return why if m is layer.module else f"{names.get(id(m), type(m).__name__)} {why}"
    dropout = layer.dropout.p if isinstance(layer.dropout, nn.Module) else layer.dropout
    if isinstance(layer.dropout, nn.Module) and type(layer.dropout) not in DROPOUTS:
        return f"{type(layer.dropout).__name__} is no dropout of torch.nn"
    if dropout and (layer.dropout.training if isinstance(layer.dropout, nn.Module) else layer.module.training):
        return f"draws a dropout of {dropout}"
    activation = _activation(layer)
    if activation is None:
        return f"activations {', '.join(map(_name, layer.activations))} are not all one that the kernels have"
    affine = _affine(layer)
    if not isinstance(affine, tuple):
        return affine
    (form, dims, growth, width) = affine
    norms = _norms(layer, dims if form != "linear" else 1)
    if isinstance(norms, str):
        return norms
    norm, eps, training = norms
    return LayerKind(
        growth, form, dims, norm, layer.preactivation, activation, width and width // growth, eps, training,
        tuple(sorted(layer.options.items())),
    )  # fmt: skip


def _name(activation: nn.Module | str) -> str:
    return activation if isinstance(activation, str) else str(activation)


def _activation(layer: DenseLayer) -> str | None:
    """The one activation of the layer, by the kernels' name for it."""
    found: set[str | None] = set()
    for activation in layer.activations:
        if isinstance(activation, str):
            found.add(activation)
        else:
            read = ACTIVATIONS.get(type(activation))
            found.add(None if read is None else read(activation))
    return found.pop() if len(found) == 1 else None


def _affine(layer: DenseLayer) -> tuple[str, int, int, int | None] | str:
    """The accumulation: its name in BlockConfig, spatial dimensions, output channels, width of a bottleneck."""
    parts = layer.parts
    for name in ("query", "key", "value", "output"):
        if (part := parts.get(name)) is not None and type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}"
    skip, first, last = parts.get("skip"), parts.get("affine"), parts.get("inner")
    outer = first if first is not None else skip
    if type(outer) is nn.Linear:
        if skip is not None and type(skip) is not nn.Linear:
            return f"skip is a {type(skip).__name__}"
        return "linear", 2, outer.out_features, None
    if isinstance(outer, nn.Module) and type(outer) not in CONVOLUTIONS.values():
        return f"affine is a {type(outer).__name__}"
    conv: Any = outer
    dims = len(conv.kernel_size)
    for name, part, allowed in (("affine", first, (1,) if last is not None else (1, 3)), ("inner", last, (3,)),
                                ("skip", skip, tuple(conv.kernel_size[:1]))):  # fmt: skip
        if part is not None and (why := _unlike_plain_convolution(part, dims, allowed)):
            return f"{name} {why}"
    if last is None:
        return f"conv{conv.kernel_size[0]}x{conv.kernel_size[0]}", dims, conv.out_channels, None
    if last.bias is not None:
        return "inner has a bias"
    if conv.out_channels % last.out_channels:
        return f"the bottleneck's {conv.out_channels} channels are no multiple of the layer's {last.out_channels}"
    return "conv3x3", dims, last.out_channels, conv.out_channels


def _unlike_plain_convolution(conv: Any, dims: int, sizes: tuple[int, ...]) -> str | None:
    if type(conv) is not CONVOLUTIONS[dims]:
        return f"is a {type(conv).__name__}"
    size = conv.kernel_size[0]
    wanted = {
        "kernel_size": (size,) * dims if size in sizes else (sizes[-1],) * dims, "stride": (1,) * dims,
        "dilation": (1,) * dims, "groups": 1, "padding_mode": "zeros",
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(conv, name) != value:
            return f"has {name}={getattr(conv, name)}"
    if conv.padding not in ((size // 2,) * dims, "same"):
        return f"has padding={conv.padding}"
    return None


def _norms(layer: DenseLayer, dims: int) -> tuple[str | None, float, bool] | str:
    """norm, eps and training of BlockConfig: the same for all normalisations of a layer."""
    found = set()
    for name in ("norm", "inner_norm"):
        if (norm := layer.parts.get(name)) is None:
            continue
        frozen = _is_frozen_batch_norm(norm)
        if not frozen and type(norm) not in NORMS[dims] and not _is_plain_subclass(norm, layer, NORMS[dims]):
            return f"{name} is a {type(norm).__name__}"
        training = not frozen and uses_batch_statistics(norm)
        if type(norm) is nn.SyncBatchNorm and training:
            return f"{name} is a SyncBatchNorm in training, whose statistics are those of all processes"
        found.add(("batch", norm.eps, training))
    if len(found) > 1:
        return "the layer's normalisations differ in eps or in mode"
    return found.pop() if found else (None, 1e-5, False)


def _is_plain_subclass(module: nn.Module, layer: DenseLayer, classes: tuple[type, ...]) -> bool:
    return type(module) in layer.plain_types and isinstance(module, classes)


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether it is torchvision's FrozenBatchNorm2d: constants named as a BatchNorm2d's tensors."""
    return type(module).__module__ == "torchvision.ops.misc" and type(module).__name__ == "FrozenBatchNorm2d"


def tensors(layer: DenseLayer) -> dict[str, Tensor | None]:
    """The layer's tensors by their names in LayerParameters."""
    found: dict[str, Tensor | None] = {}
    for name, part in layer.parts.items():
        if part is None:
            continue
        if name == "rho":
            found[name] = part
        elif name.endswith("norm"):
            found |= {f"{name}_weight": part.weight, f"{name}_bias": part.bias}
            found |= {f"{name}_mean": part.running_mean, f"{name}_var": part.running_var}
        else:
            found[f"{name}_weight"] = part.weight
            if name != "inner":
                found[f"{name}_bias"] = part.bias
    return found


def gained_a_bias(layer: DenseLayer) -> bool:
    """Whether the second convolution has been given the bias that no kernel adds."""
    inner: Any = layer.parts.get("inner")
    return inner is not None and inner.bias is not None


def input_width(layer: DenseLayer) -> int | None:
    """The channels that the layer's accumulation reads, where its module says so."""
    first: Any = layer.parts.get("affine")
    return getattr(first, "in_features", None) or getattr(first, "in_channels", None)


def output_width(layer: DenseLayer) -> int | None:
    """The channels of the layer's output, where its module says so."""
    last: Any = next(
        (layer.parts[name] for name in ("output", "inner", "affine", "skip") if layer.parts.get(name) is not None), None
    )
    return getattr(last, "out_features", None) or getattr(last, "out_channels", None)
