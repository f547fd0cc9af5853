"""Depth as a dial: Theta, a DNLBlock or a whole DNLNet carried to another depth by Definitions 3 and 4, in training.

A block's tensors are samples of curves (`blocks` says which); at the nodes of the new grid the (bi)linear extensions
are read off. Between the blocks of a DNLNet, batch norms, transitions and the classifier read all states x_0 .. x_L of
a block: over the states they are one-index, and weights that sum over the states carry the step 1/L like the block's.
The channels that a transition produces are no curve. Where the deeper network has more of them, the additional filters
are new (Kaiming's initialisation) and what reads them starts at 0: the function does not jump.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import TWO_INDEX_NORM, WEIGHT, Triangle, check_block
from .extension import PiecewiseLinear, prolong, restrict
from .parameters import DiscreteParameters, unpack

if TYPE_CHECKING:
    from dnl_kernels.nn import DNLBlock

State = dict[str, Tensor]


def refine(source: Any, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """The network of twice the depth whose parameters are the (bi)linear extensions of the given ones at l / (2 L).

    x'^{2j} - x^j = O(tau) where the parameters are samples of smooth curves. The step is halved: an explicit tau = 1/L
    becomes 1/(2 L); any other tau (1.0, the step absorbed) is kept and the weights are halved instead. The input's
    column is extended without halving if the block has no input skip.

    Args:
        source: Theta; a DNLBlock with at least 2 layers, one growth rate and connectivity="dense"; or a DNLNet of such
            blocks, whose transitions and classifier are carried along. It is not changed. A DNLNet that becomes wider
            draws its new filters from the global generator.
        optimizer: SGD over the source's parameters in one group. Its momentum is a tangent vector, carried by the same
            linear maps (0 for new channels).

    Returns:
        The same kind of object with 2 L layers; for modules a new one, on the same device, in the same mode. With an
        optimizer the pair (module, SGD over its parameters with the same settings).

    Raises:
        TypeError, ValueError: a module, an optimizer or a setting that has no extension, named.

    Source: DNL Defs. 3-4, applied to a network's tensors (our construction).

    Examples:
        >>> net, sgd = theory.refine(net, sgd)  # in a training loop, after some epochs
    """
    if isinstance(source, DiscreteParameters):
        _no_optimizer(optimizer)
        return prolong(source, 2 * source.layers)
    return _with_optimizer(source, optimizer, True)


def coarsen(source: Any, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Every second layer and state, the inverse of `refine`: coarsen(refine(x)) has the tensors of x exactly.

    Args:
        source: Theta, a DNLBlock or a DNLNet; an even number of layers in each block, at least 4 for modules.
        optimizer: as in `refine`.
    """
    if isinstance(source, DiscreteParameters):
        _no_optimizer(optimizer)
        if source.layers % 2:
            raise ValueError(f"source must have an even number of layers to be coarsened, got {source.layers}")
        return restrict(source, source.layers // 2)
    return _with_optimizer(source, optimizer, False)


def _no_optimizer(optimizer: object) -> None:
    if optimizer is not None:
        raise TypeError("optimizer must be None for DiscreteParameters: refine its momentum as DiscreteParameters")


def _with_optimizer(source: nn.Module, optimizer: torch.optim.Optimizer | None, finer: bool) -> Any:
    if optimizer is not None:
        _check_optimizer(source, optimizer)
    target = _target(source, finer)
    fresh = target.state_dict()
    found = _carried(source, target, dict(source.state_dict()), fresh)
    target.load_state_dict(found)
    _carry_flags(source, target)
    if optimizer is None:
        return target
    group = optimizer.param_groups[0]
    new = torch.optim.SGD(target.parameters(), **{name: group[name] for name in optimizer.defaults if name in group})
    momenta = {
        name: optimizer.state[p]["momentum_buffer"]
        for name, p in source.named_parameters()
        if optimizer.state.get(p, {}).get("momentum_buffer") is not None
    }
    if momenta:
        tangent = {n: momenta.get(n, torch.zeros_like(p)).detach() for n, p in source.named_parameters()}
        carried = _carried(source, target, tangent, None)
        for name, p in target.named_parameters():
            new.state[p]["momentum_buffer"] = carried[name].clone()
    return target, new


def _check_optimizer(source: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) is not torch.optim.SGD:
        raise TypeError(f"optimizer must be torch.optim.SGD, whose state is a velocity, got {type(optimizer).__name__}")
    if len(optimizer.param_groups) != 1:
        raise ValueError(f"optimizer must have one parameter group, got {len(optimizer.param_groups)}")
    if {id(p) for p in optimizer.param_groups[0]["params"]} != {id(p) for p in source.parameters()}:
        raise ValueError("optimizer must be over all parameters of source, and no others")


def _carry_flags(source: nn.Module, target: nn.Module) -> None:
    """requires_grad of parameters that exist in both, else of the layer that lies at or before the new one."""
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    if all(flags.values()):
        return
    own, new = (len(_blocks(m)[0].layers) for m in (source, target))
    for name, p in target.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str(int(parts[at]) * own // new)
        p.requires_grad_(flags[".".join(parts)])


def _blocks(module: nn.Module) -> list[DNLBlock]:
    from dnl_kernels.nn import DNLBlock

    return [m for m in module.modules() if isinstance(m, DNLBlock)]


def _target(source: nn.Module, finer: bool) -> nn.Module:
    """The module of the other depth, with fresh tensors."""
    from dnl_kernels.nn import DNLBlock, DNLNet
    from dnl_kernels.nn.network import NormActivation, Transition

    for name, module in source.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise TypeError(f"source's {name or 'module'} has hooks: in a network that is made anew they would be lost")
    if type(source) is not DNLNet:
        if isinstance(source, DNLBlock):
            return _block(source, _layers(source, finer), source.config.in_channels)
        raise TypeError(f"source must be a DNLBlock, a DNLNet or DiscreteParameters, got {type(source).__name__}")
    new = copy.deepcopy(source)
    channels = source.stem.out_channels
    blocks: Any = source.blocks
    transitions: Any = source.transitions
    for index, block in enumerate(blocks):
        if index:
            old = transitions[index - 1]
            previous, channels = channels, max(1, int(source.compression * channels))
            _expect(old.conv, nn.Conv2d, f"transitions.{index - 1}.conv")
            kind = None if old.norm.norm is None else "batch"
            made = Transition(previous, channels, kind, old.norm.activation, old.pool)
            nn.init.kaiming_normal_(made.conv.weight)
            if made.conv.bias is not None:
                nn.init.zeros_(made.conv.bias)
            _like_norm(made.norm.norm, old.norm.norm)
            new.transitions[index - 1] = made
        new.blocks[index] = _block(block, _layers(block, finer), channels)
        channels = int(new.blocks[index].out_channels)  # type: ignore[arg-type]
    norm: Any = source.norm
    _expect(source.classifier, nn.Linear, "classifier")
    new.norm = NormActivation(channels, None if norm.norm is None else "batch", norm.activation)
    _like_norm(new.norm.norm, norm.norm)
    new.classifier = nn.Linear(channels, source.classifier.out_features, source.classifier.bias is not None)
    weight = source.classifier.weight
    return new.to(device=weight.device, dtype=weight.dtype).train(source.training)


def _expect(module: nn.Module, kind: type, name: str) -> None:
    if type(module) is not kind:
        raise TypeError(f"source's {name} must be a {kind.__name__}, got {type(module).__name__}")


def _like_norm(new: Any, old: Any) -> None:
    if old is not None:
        if type(old) is not nn.BatchNorm2d:
            raise TypeError(f"source must normalise by BatchNorm2d between its blocks, got {type(old).__name__}")
        new.eps, new.momentum = old.eps, old.momentum


def _layers(block: DNLBlock, finer: bool) -> int:
    layers = int(check_block(block).num_layers)
    if not finer and (layers % 2 or layers < 4):
        what = "an even number of layers" if layers % 2 else "at least 4 layers"
        raise ValueError(f"source must have {what} to be coarsened, got {layers}")
    return 2 * layers if finer else layers // 2


def _block(block: DNLBlock, layers: int, in_channels: int) -> DNLBlock:
    """A block of another depth, and for another input, with the settings of `block` and fresh tensors."""
    from dnl_kernels.nn import DNLBlock

    config = block.config
    explicit = abs(config.tau * config.num_layers - 1) < 1e-12
    first: Any = block.layers[0]
    norm = first.norm if first.norm is not None else first.inner_norm
    weight = next(block.parameters())
    projection = next((p for p in (first.value, first.output, first.query) if p is not None), None)
    new = DNLBlock(
        in_channels,
        layers,
        config.growth_rate,
        affine=config.affine,
        kernel=config.kernel,
        norm=config.norm,
        preactivation=config.preactivation,
        activation=first.activation,
        bottleneck=config.bottleneck,
        heads=config.heads,
        head_dim=config.head_dim or None,
        tau=1 / layers if explicit else config.tau,
        input_skip=config.input_skip,
        residual=config.residual,
        backend=block.backend,
        projection_bias=projection is not None and projection.bias is not None,
        eps=config.eps,
        momentum=0.1 if norm is None else norm.momentum,
        track_running_stats=norm is None or norm.track_running_stats,
        spatial_dims=config.spatial_dims,
        dropout=first.dropout,
        device=weight.device,
        dtype=weight.dtype,
    )
    fresh: Any = new.layers[0]
    made = {name: type(module) for name, module in fresh.named_modules()}
    for name, module in block.layers.named_modules():
        index, _, inner = name.partition(".")
        if name and type(module) is not made.get(inner):
            raise TypeError(f"source's layers.{name} is a {type(module).__name__}: made anew it would be lost")
    return new.train(block.training)


def _carried(source: nn.Module, target: nn.Module, state: State, fresh: State | None) -> State:
    """The tensors of `target` from those of `source`; `fresh`: what new channels start with, None for 0 (tangents)."""
    from dnl_kernels.nn import DNLBlock

    if isinstance(source, DNLBlock) and isinstance(target, DNLBlock):
        return _carried_block(source, target, state, fresh)
    found = {name: value for name, value in state.items() if name.startswith("stem.")}
    blocks, made = _blocks(source), _blocks(target)
    for index, pair in enumerate(zip(blocks, made, strict=True)):
        prefix = f"blocks.{index}."
        inner = _carried_block(*pair, _under(state, prefix), None if fresh is None else _under(fresh, prefix))
        found.update({prefix + name: value for name, value in inner.items()})
        after = (f"transitions.{index}.",) if index + 1 < len(blocks) else ("norm.", "classifier.")
        names = [name for name in state if name.startswith(after)]
        for name in names:
            out = target.get_parameter(name).shape[0] if name.endswith(("conv.weight", "conv.bias")) else 0
            found[name] = _over_states(name, state[name], *pair, out, None if fresh is None else fresh[name])
    return found


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _over_states(name: str, value: Tensor, old: DNLBlock, new: DNLBlock, out: int, fresh: Tensor | None) -> Tensor:
    """A tensor behind a block: over its states one-index, over what goes out (a transition's filters) padded."""
    weight = name.endswith(("conv.weight", "classifier.weight"))
    outgoing = name.endswith("conv.bias")
    if value.ndim == 0 or name == "classifier.bias":
        return value
    if not outgoing:
        axis, growth, depth = int(weight), old.config.growth_rate, old.config.num_layers
        growth = int(growth)
        head, tail = value.split([old.config.in_channels, depth * growth], axis)
        curve = tail.unflatten(axis, (depth, growth)).movedim(axis, 0)
        curve = _resample(curve, new.config.num_layers) * (depth / new.config.num_layers if weight else 1)
        head = _fit(head, axis, new.config.in_channels, None if weight or fresh is None else fresh)
        value = torch.cat([head, curve.movedim(0, axis).flatten(axis, axis + 1)], axis)
    return _fit(value, 0, out, fresh) if out else value


def _fit(value: Tensor, axis: int, size: int, fresh: Tensor | None) -> Tensor:
    """Cut to `size`, or filled up to it: from `fresh` at the same places, else with zeros."""
    have = value.shape[axis]
    if size <= have:
        return value.narrow(axis, 0, size)
    if fresh is None:
        shape = list(value.shape)
        shape[axis] = size - have
        return torch.cat([value, value.new_zeros(shape)], axis)
    return torch.cat([value, fresh.narrow(axis, have, size - have).to(value)], axis)


def _carried_block(source: DNLBlock, target: DNLBlock, state: State, fresh: State | None) -> State:
    config, new = source.config, target.config
    old = [_under(state, f"layers.{index}.") for index in range(config.num_layers)]
    found: State = {}
    wider = new.in_channels != config.in_channels
    # S = tau * weight; S^{l,j} carries the quadrature weight 1/L, which changes with the depth.
    states = config.num_layers / new.num_layers * config.tau / new.tau
    column = states if config.input_skip else config.tau / new.tau
    for name in old[-1]:
        if name == WEIGHT or (config.preactivation and name in TWO_INDEX_NORM):
            factors = (column, states) if name == WEIGHT else (1.0, 1.0)
            triangle = Triangle(name, old, config, own_column=wider)
            values = _carry(triangle, new.num_layers, *factors)
            if wider:
                values = [
                    _fit_column(value, triangle.axis, config.in_channels, new.in_channels, fresh, f"layers.{i}.{name}")
                    for i, value in enumerate(values)
                ]
        else:
            values = list(_resample(torch.stack([layer[name] for layer in old]), new.num_layers))
            if wider and name == "skip.weight":
                values = [_fit(value, 1, new.in_channels, None) for value in values]
        found.update({f"layers.{index}.{name}": value for index, value in enumerate(values)})
    return found


def _fit_column(value: Tensor, axis: int, have: int, want: int, fresh: State | None, name: str) -> Tensor:
    head, tail = value.split([have, value.shape[axis] - have], axis)
    filling = None if fresh is None or name.endswith(WEIGHT) else fresh[name]
    return torch.cat([_fit(head, axis, want, filling), tail], axis)


def _resample(values: Tensor, layers: int) -> Tensor:
    """One-index values [L, ...] at the nodes l / layers: interpolated when refining, subsampled when coarsening."""
    if layers < values.shape[0]:
        return values[:: values.shape[0] // layers]
    if not values.is_floating_point():
        return values.repeat_interleave(layers // values.shape[0], 0)
    nodes = torch.arange(layers, dtype=torch.float64, device=values.device) / layers
    return PiecewiseLinear(values.double())(nodes).to(values.dtype)


def _carry(source: Triangle, layers: int, column_factor: float, factor: float) -> list[Tensor]:
    """The tensors of the layers of another depth: the bilinear extension of the flipped triangle at the new nodes."""
    base, axis = source.base, source.axis
    square = unpack(source.packed, source.depth - base)
    nodes = torch.arange(layers, dtype=torch.float64, device=square.device) * (source.depth / layers)
    nodes = nodes.clamp(base, source.depth - 1) - base
    low = nodes.long()
    if layers > source.depth:
        high, wide = (low + 1).clamp_max(square.shape[0] - 1), square.double()
        lam = (nodes - low).reshape(-1, *[1] * (square.ndim - 1))
        wide = (1 - lam) * wide[low] + lam * wide[high]
        wide = wide.transpose(0, 1)
        wide = ((1 - lam) * wide[low] + lam * wide[high]).transpose(0, 1)
        square = wide.to(square.dtype)
    else:
        square = square[low][:, low]
    columns = None if source.column is None else _resample(source.column, layers) * column_factor
    found = []
    for index in range(layers):
        states = square[index, base : index + 1] * factor
        parts = [states.movedim(0, axis).flatten(axis, axis + 1)] if len(states) else []
        found.append(torch.cat([*([] if columns is None else [columns[index]]), *parts], axis))
    return found
