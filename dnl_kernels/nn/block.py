"""DNLBlock: L densely connected layers, the block of a DenseNet or of the paper's networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import recomputes
from .._backend import check_backend
from .._checks import fail
from ..ops.dnl_block.api import check_config, dnl_block_with_statistics
from ..ops.dnl_block.config import BlockConfig, LayerParameters, Statistics

OP = "DNLBlock"
Connectivity = str | int | Tensor | Sequence[Sequence[bool]]


class DNLLayer(nn.Module):
    """The parameters of one layer of a DNLBlock, which computes with them; calling a layer is an error.

    What the configuration does not have is None. Each submodule is an ordinary one of PyTorch, so initialisers,
    weight decay groups and `.eval()` on a normalisation find what they know:

    affine: Conv2d or Linear over the channels that the layer reads (None if it reads no state).
    norm: BatchNorm of the states read (preactivation), or of the layer's output.
    inner_norm, inner: the second half of a bottleneck.
    query, key, value, output: Linear; rho [heads]: log of the Gaussian bandwidth.
    skip: A_l and a_l of the input skip.
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

    def __init__(self, config: BlockConfig, layer: int, momentum: float | None, track: bool, projection_bias: bool):
        super().__init__()
        shapes = config.shapes(layer)
        tokens = config.affine == "linear"

        def linear_map(name: str, bias: bool) -> nn.Module | None:
            if (shape := shapes.get(f"{name}_weight")) is None:
                return None
            if len(shape) == 2:
                return nn.Linear(shape[1], shape[0], bias)
            return nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2, bias=bias)

        def norm(name: str) -> nn.Module | None:
            if (shape := shapes.get(f"{name}_weight")) is None:
                return None
            return (nn.BatchNorm1d if tokens else nn.BatchNorm2d)(shape[0], config.eps, momentum, True, track)

        self.norm = norm("norm")
        # One bias per layer: a_l, part of the input skip where there is one. The pre-activation order has BN's.
        self.affine = linear_map("affine", bias=not (config.preactivation or config.input_skip))
        self.inner_norm, self.inner = norm("inner_norm"), linear_map("inner", bias=False)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, linear_map(name, bias=projection_bias))
        self.rho = nn.Parameter(torch.empty(config.heads)) if "rho" in shapes else None
        self.skip = linear_map("skip", bias=True)

    def forward(self, *_):
        raise RuntimeError("a layer of a DNLBlock holds parameters; call the block")

    def tensors(self) -> LayerParameters:
        found: dict[str, Tensor | None] = {
            "rho": self.rho,
            "inner_weight": None if self.inner is None else self.inner.weight,
        }
        for name in ("affine", "query", "key", "value", "output", "skip"):
            if (module := getattr(self, name)) is not None:
                found |= {f"{name}_weight": module.weight, f"{name}_bias": module.bias}
        for name in ("norm", "inner_norm"):
            if (module := getattr(self, name)) is not None:
                found |= {f"{name}_weight": module.weight, f"{name}_bias": module.bias}
                found |= {f"{name}_mean": module.running_mean, f"{name}_var": module.running_var}
        return LayerParameters(**found)


class DNLBlock(nn.Module):
    """[x_0 .. x_L] of L densely connected layers: DNL (1), or a DenseNet block. Shapes are in `forward`.

    preactivation=True: y_l = tau * sum_j K_{l,j} (*) act(BN_{l,j}(x_j)) [+ A_l x_0 + a_l], x_{l+1} = N(y_l). With
    kernel="local" N is the identity and this is torchvision's dense block (`from_torchvision`).
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
        growth_rate: G, the channels of every layer's output.
        affine: "conv3x3", "conv1x1" (images) or "linear" (tokens).
        kernel: "local", "softmax", "gaussian" or "dot".
        norm: "batch" or None.
        preactivation: the order, see above.
        activation: "identity", "relu", "leaky_relu", "tanh", "gelu" or "silu".
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
        growth_rate: int,
        *,
        affine: str = "conv3x3",
        kernel: str = "local",
        norm: str | None = "batch",
        preactivation: bool = True,
        activation: str = "relu",
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_backend(OP, backend)
        for name, value in (("in_channels", in_channels), ("num_layers", num_layers), ("growth_rate", growth_rate)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                fail(OP, name, repr(value), "an integer >= 1")
        self.config = BlockConfig(
            in_channels=in_channels,
            num_layers=num_layers,
            growth_rate=growth_rate,
            connectivity=_mask(connectivity, num_layers),
            affine=affine,
            kernel=kernel,
            norm=norm,
            preactivation=preactivation,
            activation=activation,
            bottleneck=bottleneck,
            heads=heads,
            head_dim=_head_dim(kernel, growth_rate, heads, head_dim),
            tau=_step(tau, num_layers),
            input_skip=input_skip,
            residual=residual,
            eps=eps,
        )
        check_config(self.config, OP)
        self.backend = backend
        self.out_channels = in_channels + num_layers * growth_rate
        self.layers = nn.ModuleList(
            DNLLayer(self.config, layer, momentum, track_running_stats, projection_bias) for layer in range(num_layers)
        ).to(device=device, dtype=dtype)
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
        config = self.config._replace(training=self._uses_batch_statistics())
        states, statistics = dnl_block_with_statistics(
            x, [layer.tensors() for layer in self._layers()], config, backend=self.backend
        )
        if statistics is not None:
            self._update_running_statistics(statistics)
        return states

    def extra_repr(self) -> str:
        """The configuration where it is not the default."""
        defaults = BlockConfig._field_defaults
        given = [f"{name}={value}" for name, value in self.config._asdict().items()
                 if name not in ("connectivity", "training") and value != defaults.get(name)]  # fmt: skip
        if not all(map(all, self.config.connectivity)):
            given.append(f"connectivity={sum(map(sum, self.config.connectivity))} pairs")
        return ", ".join(given)

    def _norms(self) -> list[Any]:
        return [norm for layer in self._layers() for norm in (layer.norm, layer.inner_norm) if norm is not None]

    def _uses_batch_statistics(self) -> bool:
        modes = set()
        for norm in self._norms():
            if isinstance(norm, nn.SyncBatchNorm):
                raise RuntimeError(f"{OP}: SyncBatchNorm is not supported: statistics are those of each process")
            modes.add(norm.training or norm.running_mean is None)
        if len(modes) > 1:
            raise RuntimeError(f"{OP}: some normalisations are in training mode and some in eval mode; set all alike")
        return modes == {True}

    @torch.no_grad()
    def _update_running_statistics(self, found: Statistics) -> None:
        if found.elements == 0:
            return
        inner = iter(zip(found.inner_mean, found.inner_var, strict=True))
        output = iter(zip(found.output_mean, found.output_var, strict=True))
        shared: Any = (found.states_mean, found.states_var)
        updates = []
        for index, layer in enumerate(self._layers()):
            if layer.inner_norm is not None:
                updates.append((layer.inner_norm, *next(inner)))
            if layer.norm is not None and self.config.preactivation:
                spans = self.config.spans(index)
                parts = [[v[a:b] for a, b in spans] for v in shared]
                updates.append((layer.norm, *(p[0] if len(p) == 1 else torch.cat(p) for p in parts)))
            elif layer.norm is not None:
                updates.append((layer.norm, *next(output)))
        update_running_statistics(updates, found.elements)

    @classmethod
    def from_torchvision(cls, block: nn.Module, *, backend: str | None = None) -> DNLBlock:
        """The same block as a torchvision `_DenseBlock`: see `convert_dense_block`."""
        from .convert import convert_dense_block

        return convert_dense_block(block, backend=backend)


@torch.no_grad()
def update_running_statistics(found: list[tuple[Any, Tensor, Tensor]], elements: int) -> None:
    """The running statistics of (normalisation, mean, biased variance), in place and as nn.BatchNorm2d: unbiased
    variance, momentum=None for the cumulative mean. Few calls for all of them: there may be a hundred. Unchanged where
    a forward pass is computed again for a backward pass (activation checkpointing)."""
    if recomputes():
        return
    found = [update for update in found if update[0].training and update[0].track_running_stats]
    if not found:
        return
    norms = [norm for norm, _, _ in found]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    running = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    unbiased = torch._foreach_mul([var for _, _, var in found], elements / max(elements - 1, 1))
    batch = [t for (_, mean, _), var in zip(found, unbiased, strict=True) for t in (mean, var)]
    momenta = [norm.momentum for norm in norms]
    if (
        momenta[0] is not None
        and set(momenta) == {momenta[0]}
        and {t.dtype for t in running} == {t.dtype for t in batch}
    ):
        torch._foreach_lerp_(running, batch, momenta[0])
        return
    for i, norm in enumerate(norms):
        factor = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.double()
        for at in (2 * i, 2 * i + 1):
            running[at].add_((batch[at] - running[at]) * factor)


def _step(tau: float | str, num_layers: int) -> float:
    if isinstance(tau, str):
        if tau != "1/L":
            fail(OP, "tau", repr(tau), "a number > 0, or '1/L'")
        return 1.0 / num_layers
    return tau


def _head_dim(kernel: str, growth_rate: int, heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if kernel == "local" or isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
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
