"""DNLBlock: L densely connected layers, the block of a DenseNet or of the paper's networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._activations import activate
from .._backend import check_backend
from .._checks import fail
from ..ops.dnl_block.api import check_config
from ..ops.dnl_block.config import BlockConfig, LayerParameters
from ..ops.nonlocal_attention.api import nonlocal_attention
from .layers import CONVOLUTIONS, NORMS, DenseLayer, tensors
from .plan import Plan

OP = "DNLBlock"
Connectivity = str | int | Tensor | Sequence[Sequence[bool]]


class DNLLayer(nn.Module):
    """One layer of a DNLBlock: its parameters in ordinary modules of PyTorch, and what they mean.

    The block computes whole runs of layers by one kernel while the submodules are what they were made as. Where one is
    not (a hook, a wrapper, another class), it calls the layer, which calls its submodules.

    What the configuration does not have is None:

    affine: convolution or Linear over the channels that the layer reads (None if it reads no state).
    norm: BatchNorm of the states read (preactivation), or of the layer's output.
    inner_norm, inner: the second half of a bottleneck.
    query, key, value, output: Linear; rho [heads]: log of the Gaussian bandwidth.
    skip: A_l and a_l of the input skip.
    activation, inner_activation: names, or modules where the block was given one.
    """

    affine: Any
    norm: Any
    inner_norm: Any
    inner: Any
    query: Any
    key: Any
    value: Any
    output: Any
    rho: nn.Parameter | None
    skip: Any
    activation: Any
    inner_activation: Any

    def __init__(
        self,
        config: BlockConfig,
        layer: int,
        momentum: float | None,
        track: bool,
        projection_bias: bool,
        activation: str | nn.Module,
        dropout: float,
    ):
        super().__init__()
        shapes = config.shapes(layer)
        tokens = config.affine == "linear"
        self.config, self.layer, self.dropout = config, layer, dropout

        def linear_map(name: str, bias: bool) -> nn.Module | None:
            if (shape := shapes.get(f"{name}_weight")) is None:
                return None
            if len(shape) == 2:
                return nn.Linear(shape[1], shape[0], bias)
            return CONVOLUTIONS[len(shape) - 2](shape[1], shape[0], shape[2], padding=shape[2] // 2, bias=bias)

        def norm(name: str) -> nn.Module | None:
            if (shape := shapes.get(f"{name}_weight")) is None:
                return None
            return NORMS[1 if tokens else config.spatial_dims][0](shape[0], config.eps, momentum, True, track)

        self.norm = norm("norm")
        # One bias per layer: a_l, part of the input skip where there is one. The pre-activation order has BN's.
        self.affine = linear_map("affine", bias=not (config.preactivation or config.input_skip))
        self.inner_norm, self.inner = norm("inner_norm"), linear_map("inner", bias=False)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, linear_map(name, bias=projection_bias))
        self.rho = nn.Parameter(torch.empty(config.heads)) if "rho" in shapes else None
        self.skip = linear_map("skip", bias=True)
        self.activation = activation if isinstance(activation, str) else copy.deepcopy(activation)
        if config.bottleneck is not None:
            self.inner_activation = activation if isinstance(activation, str) else copy.deepcopy(activation)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """x_{l+1} from the states x_0 .. x_l, by calling the submodules one after the other."""
        config, axis = self.config, -1 if self.config.affine == "linear" else 1
        y: Any = None
        if read := [states[j] for j in config.reads(self.layer)]:
            x = torch.cat(read, axis)
            if config.preactivation:
                x = self._activate("activation", self._normalise(self.norm, x))
            # W (tau x) + b is tau W x + b, whatever stands around W.
            y = self.affine(x if config.tau == 1 else x * config.tau)
            if self.inner is not None:
                y = self.inner(self._activate("inner_activation", self._normalise(self.inner_norm, y)))
        if self.skip is not None:
            skip = self.skip(states[0])
            y = skip if y is None else y + skip
        x = y if config.kernel == "local" else self._non_local(y)
        x = x + y if config.residual else x
        if not config.preactivation:
            x = self._activate("activation", self._normalise(self.norm, x))
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _normalise(self, norm: Any, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return norm(x.movedim(-1, 1)).movedim(1, -1) if self.config.affine == "linear" else norm(x)

    def _activate(self, name: str, x: Tensor) -> Tensor:
        activation = getattr(self, name)
        return activate(x, activation) if isinstance(activation, str) else activation(x)

    def _non_local(self, y: Tensor) -> Tensor:
        images = self.config.affine != "linear"
        tokens = y.flatten(2).mT if images else y

        def project(module: Any) -> Tensor:  # [B, h, N, D]
            return module(tokens).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

        query = project(self.query)
        key = query if self.key is None else project(self.key)
        bandwidth = None if self.rho is None else torch.exp(self.rho)
        out = nonlocal_attention(query, key, project(self.value), kernel=self.config.kernel, bandwidth=bandwidth)
        out = self.output(out.transpose(1, 2).flatten(2))
        return out.mT.unflatten(2, y.shape[2:]) if images else out

    def tensors(self) -> LayerParameters:
        """The layer's tensors as `dnl_block` takes them."""
        return LayerParameters(**tensors(self.description()))

    def description(self) -> DenseLayer:
        """The layer as a plan reads it."""
        config = self.config
        parts: dict[str, Any] = {name: getattr(self, name) for name in PARTS}
        return DenseLayer(
            f"layers.{self.layer}",
            self,
            _append,
            {name: part for name, part in parts.items() if part is not None},
            (self.activation,) if config.bottleneck is None else (self.activation, self.inner_activation),
            self.dropout,
            config.preactivation,
            reads=config.connectivity[self.layer],
            options={name: getattr(config, name) for name in OPTIONS},
        )


PARTS = ("affine", "norm", "inner_norm", "inner", "query", "key", "value", "output", "skip", "rho")
OPTIONS = ("kernel", "heads", "head_dim", "tau", "input_skip", "residual")


def _append(layer: nn.Module, states: list[Tensor]) -> list[Tensor]:
    return [*states, layer(states)]


def _describe(block: DNLBlock) -> list[DenseLayer] | str:
    """block.layers belongs to every layer: one in it may be replaced, by anything that takes the states."""
    found = []
    for name, layer in block.layers.named_children():
        if isinstance(layer, DNLLayer):
            described = layer.description()
        else:
            described = DenseLayer(f"layers.{name}", layer, _append, {}, ())
        found.append(described._replace(others=(block.layers,)))
    return found


class DNLBlock(nn.Module):
    """[x_0 .. x_L] of L densely connected layers: DNL (1), or a DenseNet block. Shapes are in `forward`.

    preactivation=True: y_l = tau * sum_j K_{l,j} (*) act(BN_{l,j}(x_j)) [+ A_l x_0 + a_l], x_{l+1} = N(y_l). With
    kernel="local" N is the identity and this is torchvision's dense block.
    preactivation=False, the paper's order: y_l = tau * sum_j K_{l,j} (*) x_j + a_l [+ A_l x_0] and
    x_{l+1} = act(BN(N(y_l))).
    The two differ as eq. (1) and its change of variables (1') do, save for one point: batch normalisation before the
    activation has its own gamma and beta for every pair (l, j), so phi depends on both.

    A non-local N acts on the H * W pixels or N tokens: out = W_o concat_heads(sum_j w(q_i, k_j) v_j / Z_i), with
    q = W_q y, k = W_k y, v = W_v y. kernel="softmax" weighs by exp(q.k / sqrt(head_dim)), "gaussian" by
    exp(-|q - k|^2 / (2 exp(rho)^2)) with one shared W_q = W_k and a learnable rho per head, "dot" by q.k with Z the
    number of positions.

    Args:
        in_channels: C0.
        num_layers: L.
        growth_rate: G, the channels of every layer's output; or one number for each layer.
        affine: "conv3x3", "conv1x1" (images; with spatial_dims=1 or 3, filters of 3, 3x3x3 or 1) or "linear" (tokens).
        kernel: "local", "softmax", "gaussian" or "dot".
        norm: "batch" or None.
        preactivation: the order, see above.
        activation: "identity", "relu", "leaky_relu", "leaky_relu(0.2)" (any slope), "tanh", "gelu" or "silu"; or a
            module, of which every layer gets a copy (nn.PReLU()). What the kernels do not have is computed by calling
            the module.
        bottleneck: b makes the accumulation a 1x1 convolution to b * G channels, followed by BN, act and a 3x3
            convolution to G (DenseNet-BC); affine="conv3x3" only. The input skip is added behind it.
        heads, head_dim: of N; head_dim defaults to G / heads.
        tau: the step: a number > 0, or "1/L". 1.0 trains W = tau K, the step absorbed, as a plain DenseNet does. An
            explicit step changes no function that the block can represent, but SGD with rate eta on K is SGD on W with
            rate tau^2 eta. K starts at (initial W) / tau, so both start as the same function.
        input_skip: adds A_l x_0 outside the step, eq. (1) to the letter.
        residual: y_l is added to N(y_l); not with kernel="local".
        connectivity: "dense"; an int w, for layers that read the last w states; or a boolean lower-triangular [L, L]
            mask (layer l, state j <= l). What is masked costs nothing and has no parameters.
        backend: None, "reference", "cpu", "triton" or "cuda", of the operators.
        projection_bias: biases of the projections of N.
        eps, momentum, track_running_stats: of batch normalisation, as in torch.nn.BatchNorm2d.
        spatial_dims: 2 for images, 1 for [B, C0, N], 3 for [B, C0, D, H, W].
        dropout: probability with which a number of a layer's output is zeroed in training, as F.dropout.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: a value that is not allowed, or that contradicts another one, named with the reason.

    The state_dict has layers.<l>.<name>.<weight | bias | running_mean | ..> with the names of DNLLayer, whatever the
    backend. Source: DNL (1), math of the two orders: Kumar and Sloan's change of variables.
    """

    def __init__(
        self,
        in_channels: int,
        num_layers: int,
        growth_rate: int | Sequence[int],
        *,
        affine: str = "conv3x3",
        kernel: str = "local",
        norm: str | None = "batch",
        preactivation: bool = True,
        activation: str | nn.Module = "relu",
        bottleneck: int | None = None,
        heads: int = 1,
        head_dim: int | None = None,
        tau: float | str = 1.0,
        input_skip: bool = False,
        residual: bool = False,
        connectivity: Connectivity = "dense",
        backend: str | None = None,
        projection_bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        spatial_dims: int = 2,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_backend(OP, backend)
        for name, value in (("in_channels", in_channels), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                fail(OP, name, repr(value), "an integer >= 1")
        rates = _growth_rate(growth_rate, num_layers)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            fail(OP, "dropout", repr(dropout), "a number from 0 to 1")
        self.config = BlockConfig(
            in_channels=in_channels,
            num_layers=num_layers,
            growth_rate=rates,
            connectivity=_mask(connectivity, num_layers),
            affine=affine,
            kernel=kernel,
            norm=norm,
            preactivation=preactivation,
            activation="relu" if isinstance(activation, nn.Module) else activation,
            bottleneck=bottleneck,
            heads=heads,
            head_dim=_head_dim(kernel, rates, heads, head_dim),
            tau=_step(tau, num_layers),
            input_skip=input_skip,
            residual=residual,
            eps=eps,
            spatial_dims=spatial_dims,
        )
        check_config(self.config._replace(growth_rate=self.config.growth(0)), OP)
        self.backend = backend
        self.out_channels = sum(map(self.config.state_channels, range(num_layers + 1)))
        self.layers = nn.ModuleList(
            DNLLayer(self.config, layer, momentum, track_running_stats, projection_bias, activation, dropout)
            for layer in range(num_layers)
        ).to(device=device, dtype=dtype)
        self._plan = Plan(_describe, -1 if affine == "linear" else 1)
        self.reset_parameters()

    def _layers(self) -> list[DNLLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Convolutions and input skips as torchvision's DenseNet (Kaiming normal; K = W / tau), projections with the
        variance of their input kept, zero biases, and the Gaussian bandwidth that gives softmax's scale D^-1/2."""
        for layer in self._layers():
            for name in ("affine", "inner", "skip", "query", "key", "value", "output"):
                if (module := getattr(layer, name)) is None:
                    continue
                linear = name in ("query", "key", "value", "output")
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if linear else "relu")
                if name == "affine":
                    module.weight.div_(self.config.tau)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if layer.rho is not None:
                nn.init.constant_(layer.rho, math.log(self.config.head_dim) / 4)
            for norm in (layer.norm, layer.inner_norm):
                if norm is not None:
                    norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C0, H, W] -> [B, C0 + L * G, H, W], for affine="linear" [B, N, C0] -> [B, N, C0 + L * G]: the input
        followed by every layer's output. In training mode it updates running statistics as nn.BatchNorm2d does."""
        axis, config = self._plan.axis, self.config
        rank = 3 if config.affine == "linear" else config.spatial_dims + 2
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: x is of type {type(x).__name__}; expected a tensor")
        if x.dim() != rank or x.shape[axis] != config.in_channels:
            form = "[B, N, C0]" if axis == -1 else f"[B, C0, {', '.join('DHW'[3 - config.spatial_dims :])}]"
            fail(OP, "x", f"of shape {list(x.shape)}", f"{form} with C0 = {config.in_channels}")
        return self._plan(self, x, self.backend)  # type: ignore[return-value]

    def explain(self, x: Tensor) -> str:
        """What runs the layers for an input like x, and why nothing faster does."""
        return self._plan.explain(self, x, self.backend)

    def extra_repr(self) -> str:
        """The configuration where it is not the default."""
        defaults = BlockConfig._field_defaults
        given = [f"{name}={value}" for name, value in self.config._asdict().items()
                 if name not in ("connectivity", "training") and value != defaults.get(name)]  # fmt: skip
        if not all(map(all, self.config.connectivity)):
            given.append(f"connectivity={sum(map(sum, self.config.connectivity))} pairs")
        return ", ".join(given)


def _growth_rate(growth_rate: int | Sequence[int], num_layers: int) -> Any:
    rates: Any = growth_rate if isinstance(growth_rate, (list, tuple)) else [growth_rate] * num_layers
    if len(rates) != num_layers or any(isinstance(g, bool) or not isinstance(g, int) or g < 1 for g in rates):
        fail(OP, "growth_rate", repr(growth_rate), f"an integer >= 1, or {num_layers} of them")
    return rates[0] if len(set(rates)) == 1 else tuple(rates)


def _step(tau: float | str, num_layers: int) -> float:
    if isinstance(tau, str):
        if tau != "1/L":
            fail(OP, "tau", repr(tau), "a number > 0, or '1/L'")
        return 1.0 / num_layers
    return tau


def _head_dim(kernel: str, growth_rate: Any, heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if kernel != "local" and not isinstance(growth_rate, int):
        fail(OP, "head_dim", None, "an integer >= 1, where the layers have growth rates of their own")
    if (
        not isinstance(growth_rate, int)
        or kernel == "local"
        or isinstance(heads, bool)
        or not isinstance(heads, int)
        or heads < 1
    ):
        return 0
    if growth_rate % heads:
        fail(OP, "heads", heads, f"a divisor of growth_rate = {growth_rate}, or head_dim given")
    return growth_rate // heads


def _mask(connectivity: Connectivity, num_layers: int) -> tuple[tuple[bool, ...], ...]:
    if isinstance(connectivity, str):
        if connectivity != "dense":
            fail(OP, "connectivity", repr(connectivity), "'dense', an integer >= 1, or a boolean [L, L] mask")
        return tuple((True,) * (layer + 1) for layer in range(num_layers))
    if isinstance(connectivity, int) and not isinstance(connectivity, bool):
        if connectivity < 1:
            fail(OP, "connectivity", connectivity, "'dense', an integer >= 1, or a boolean [L, L] mask")
        return tuple(tuple(layer - j < connectivity for j in range(layer + 1)) for layer in range(num_layers))
    mask = torch.as_tensor(connectivity)
    if mask.dtype != torch.bool or list(mask.shape) != [num_layers, num_layers]:
        given = f"of shape {list(mask.shape)} and {mask.dtype}"
        fail(OP, "connectivity", given, f"torch.bool of shape {[num_layers, num_layers]}")
    if torch.triu(mask, 1).any():
        layer, state = torch.triu(mask, 1).nonzero()[0].tolist()
        fail(
            OP, "connectivity", f"True at layer {layer}, state {state}", "lower triangular: layer l reads states j <= l"
        )
    return tuple(tuple(map(bool, row[: layer + 1])) for layer, row in enumerate(mask.tolist()))
