"""The layer map phi = sigma o N of the theory: kernels, normalisations and activations in dense float64 form."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_tensor

NORMALIZATIONS = ("row", "const", "none", "sym")
ACTIVATIONS = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": torch.nn.functional.softplus,
}
# Lipschitz constants of assumption (A1). softplus(0) != 0 violates sigma(0) = 0 and so has no entry.
ACTIVATION_LIPSCHITZ = {"identity": 1.0, "tanh": 1.0, "relu": 1.0}


@dataclass(frozen=True)
class LocalKernel:
    """kappa(y_i, y_j) = 1 if i = j, else 0: N(y)_i = eta(y_i)."""

    name = "local"


@dataclass(frozen=True)
class GaussianKernel:
    """kappa(y_i, y_j) = exp(y_i . y_j), the Gaussian of non-local networks: softmax attention with M = I."""

    name = "gaussian"


@dataclass(frozen=True)
class EmbeddedGaussianKernel:
    """kappa(y_i, y_j) = exp(y_i^T M y_j), M = W_q^T W_k / sqrt(d_k): embedded Gaussian, or softmax attention.

    Args:
        matrix: M [c, c], or None to read c * c entries of vartheta as M (a curve M(t)).
    """

    matrix: Tensor | None = None
    name = "embedded_gaussian"

    @classmethod
    def from_projections(cls, query: Tensor, key: Tensor) -> EmbeddedGaussianKernel:
        """M = W_q^T W_k / sqrt(d_k) from W_q, W_k [d_k, c]."""
        return cls(query.T @ key / math.sqrt(query.shape[0]))


@dataclass(frozen=True)
class RBFKernel:
    """kappa(y_i, y_j) = exp(-|y_i - y_j|^2 / (2 h^2)).

    Args:
        bandwidth: h > 0, or None to read vartheta's next entry as rho = log h (a learnable bandwidth curve).
    """

    bandwidth: float | Tensor | None = None
    name = "rbf"

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not bool(torch.as_tensor(self.bandwidth) > 0):
            raise ValueError(f"bandwidth must be > 0, got {self.bandwidth}")


Kernel: TypeAlias = LocalKernel | GaussianKernel | EmbeddedGaussianKernel | RBFKernel
KERNELS: dict[str, type[Kernel]] = {
    "local": LocalKernel,
    "gaussian": GaussianKernel,
    "softmax": EmbeddedGaussianKernel,
    "rbf": RBFKernel,
}


class NonLocalOperator:
    """N(y; vartheta)_i = (1 / C_i) sum_j kappa(y_i, y_j; vartheta) V y_j on n positions of c channels.

    Normalisations: row C_i = sum_j kappa_ij; const C_i = n; none C_i = 1; sym w_ij = kappa_ij / sqrt(C_i C_j) with row
    sums C. Scores are shifted by their row maximum and an RBF's inputs are centred first, so that large scores and
    offsets cost no accuracy.

    Args:
        kernel: one of the kernel records above.
        normalization: "row" (the paper's), "const", "none", "sym" (ours). "const" and "none" of an exponential of dot
            products grow exponentially and violate (A2): allowed, with a warning.
        positions: n; states have d = n c entries, position-major.
        value: V [c, c]; None for the identity; "curve" to read c * c entries of vartheta as V - I (a curve V(t)).
        backend: None computes densely here, in any dtype; a name of the package's operator backends, or "auto", sends
            any row-normalised kernel through `dnl_kernels.nonlocal_attention`.

    vartheta is read in the order kernel (M, or log h), then value.

    Source: DNL section 2, the non-local operator (formula reconstructed from Wang et al. 2018).
    """

    def __init__(
        self,
        kernel: Kernel,
        normalization: str = "row",
        *,
        positions: int = 1,
        value: Tensor | str | None = None,
        backend: str | None = None,
    ):
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be one of the kernel records, got {type(kernel).__name__}")
        self.kernel = kernel
        self.normalization = check_choice("normalization", normalization, NORMALIZATIONS)
        self.positions = check_count("positions", positions)
        if isinstance(value, str):
            check_choice("value", value, ("curve",))
        elif value is not None:
            check_tensor("value", value)
        self.value, self.backend = value, backend
        dot = isinstance(kernel, GaussianKernel | EmbeddedGaussianKernel)
        if dot and normalization in ("const", "none"):
            warnings.warn(
                f"normalization {normalization!r} of exp(dot product) grows exponentially and violates (A2)",
                stacklevel=2,
            )
        if backend is not None and normalization != "row":
            raise ValueError(f"backend={backend!r} needs normalization 'row'")

    def parameter_count(self, dim: int) -> int:
        """The entries of vartheta that a state of size d needs."""
        c = self.channels(dim)
        count = 1 if isinstance(self.kernel, RBFKernel) and self.kernel.bandwidth is None else 0
        count += c * c if isinstance(self.kernel, EmbeddedGaussianKernel) and self.kernel.matrix is None else 0
        return count + (c * c if isinstance(self.value, str) else 0)

    def channels(self, dim: int) -> int:
        if dim % self.positions:
            raise ValueError(f"the state size must be a multiple of positions = {self.positions}, got {dim}")
        return dim // self.positions

    def unpack(self, vartheta: Tensor | None, dim: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(h or M or None, V or None) that apply for this vartheta [v]."""
        need = self.parameter_count(dim)
        given = 0 if vartheta is None else vartheta.shape[-1]
        if given < need:
            raise ValueError(f"vartheta must hold at least {need} entries for this operator, got {given}")
        c = self.channels(dim)
        free = like.new_zeros(0) if vartheta is None else vartheta
        shape: Tensor | None = None
        if isinstance(self.kernel, RBFKernel):
            if self.kernel.bandwidth is None:
                shape, free = torch.exp(free[0]), free[1:]
            else:
                shape = torch.as_tensor(self.kernel.bandwidth, dtype=like.dtype, device=like.device)
        elif isinstance(self.kernel, EmbeddedGaussianKernel):
            if self.kernel.matrix is None:
                shape, free = free[: c * c].reshape(c, c), free[c * c :]
            else:
                shape = self.kernel.matrix.to(like)
        if isinstance(self.value, str):
            return shape, torch.eye(c, dtype=like.dtype, device=like.device) + free[: c * c].reshape(c, c)
        return shape, None if self.value is None else self.value.to(like)

    def __call__(self, y: Tensor, vartheta: Tensor | None = None) -> Tensor:
        """N(y; vartheta) for y [..., d] and one vartheta [v]."""
        shape, value = self.unpack(vartheta, y.shape[-1], y)
        u = y.unflatten(-1, (self.positions, self.channels(y.shape[-1])))
        eta = u if value is None else u @ value.transpose(-1, -2)
        if self.backend is not None:
            return self._package(u, eta, shape).flatten(-2)
        if isinstance(self.kernel, LocalKernel):
            return eta.flatten(-2)
        return (self.weights(u, shape) @ eta).flatten(-2)

    def scores(self, u: Tensor, shape: Tensor | None) -> Tensor:
        """s_ij = log kappa_ij for u [..., n, c]."""
        if isinstance(self.kernel, RBFKernel) and shape is not None:
            u = (u - u.mean(-2, keepdim=True)) / shape  # translation invariance: less cancellation in the expansion
            squares = (u * u).sum(-1)
            distance = squares[..., :, None] + squares[..., None, :] - 2 * u @ u.transpose(-1, -2)
            return -distance.clamp_min(0) / 2
        return (u if shape is None else u @ shape) @ u.transpose(-1, -2)

    def weights(self, u: Tensor, shape: Tensor | None) -> Tensor:
        """w_ij = kappa_ij / C_i in [..., n, n]."""
        s = self.scores(u, shape)
        if self.normalization == "row":
            return torch.softmax(s, -1)
        if self.normalization == "sym":
            log_c = torch.logsumexp(s, -1)
            return torch.exp(s - (log_c[..., :, None] + log_c[..., None, :]) / 2)
        return torch.exp(s) / (self.positions if self.normalization == "const" else 1)

    def _package(self, u: Tensor, eta: Tensor, shape: Tensor | None) -> Tensor:
        from dnl_kernels import nonlocal_attention

        q, k, v = (z.reshape(-1, 1, *z.shape[-2:]) for z in (u, u, eta))
        backend = None if self.backend == "auto" else self.backend
        if isinstance(self.kernel, LocalKernel):
            out = nonlocal_attention(q, k, v, kernel="local", backend=backend)
        elif isinstance(self.kernel, RBFKernel):
            out = nonlocal_attention(q, k, v, kernel="gaussian", bandwidth=shape, backend=backend)
        else:
            q = q if shape is None else q @ shape
            out = nonlocal_attention(q, k, v, kernel="softmax", scale=1.0, backend=backend)
        return out.reshape(eta.shape)


class LayerMap:
    """phi(y, vartheta) = sigma(N(y; vartheta)), eq. (1b).

    Args:
        operator: N, or None for the identity.
        activation: "tanh", "relu", "identity" or "softplus".
    """

    def __init__(self, operator: NonLocalOperator | None = None, activation: str = "tanh"):
        if operator is not None and not isinstance(operator, NonLocalOperator):
            raise TypeError(f"operator must be a NonLocalOperator or None, got {type(operator).__name__}")
        self.operator = operator
        self.activation = check_choice("activation", activation, ACTIVATIONS)

    @classmethod
    def of(cls, kernel: str = "local", activation: str = "tanh", positions: int = 1, **options) -> LayerMap:
        """By names: kernel "local", "gaussian", "softmax" (M from vartheta) or "rbf" (log h from vartheta).

        The names are those of non-local networks: "gaussian" is exp(y_i . y_j); `dnl_kernels.nonlocal_attention` uses
        that word for "rbf".
        """
        check_choice("kernel", kernel, KERNELS)
        return cls(NonLocalOperator(KERNELS[kernel](), positions=positions, **options), activation)

    def parameter_count(self, dim: int) -> int:
        return 0 if self.operator is None else self.operator.parameter_count(dim)

    def __call__(self, y: Tensor, vartheta: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[self.activation](y if self.operator is None else self.operator(y, vartheta))
