"""The continuous learning problem (11) itself: minimised among polynomials by Galerkin's method, with a certificate.

A, a, vartheta are polynomials of degree N on [0, 1]; K, b polynomials of total degree N on 0 <= s <= t <= 1.
Those spaces are nested and conforming (their symmetric extensions lie in the space of (10)), so the minima decrease to
J* = min J as N grows. Coordinates are orthonormal in H^1, of the interval and of the square: gradients and Hessians in
them are those that the space of (10) with p = 2 has, whatever the degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_count
from .curves import NAMES, ParameterCurves
from .depth import CallableKernel
from .extension import extend
from .lbfgs import minimize_lbfgs
from .learning import LearningProblem
from .parameters import ONE_INDEX, DiscreteParameters
from .quadrature import duffy_rule, gauss_legendre
from .regularization import check_weights, power

ITERATIONS = 100  # of the Volterra fixed point, which contracts like (Lip(phi) ||K||)^k / k!


class SobolevPolynomials:
    """Polynomials of total degree <= N that are orthonormal in H^1 of [0, 1] or of the square (symmetric functions).

    Built by multiplying a polynomial of one degree less by t or s and orthonormalising (Arnoldi's process with the H^1
    inner product), which stays accurate where a basis change from monomials would not. The first polynomials of a
    larger degree are those of a smaller one.

    Args:
        degree: N >= 0.
        arguments: 1 for [0, 1]; 2 for the triangle, whose integrals count twice (the square's).
    """

    def __init__(self, degree: int, arguments: int):
        self.degree, self.arguments = check_count("degree", degree, 0), arguments
        count = 2 * degree + 2  # exact for the fourth power of a polynomial: p = 4
        if arguments == 1:
            t, self.weights = gauss_legendre(count)
            self.nodes: tuple[Tensor, ...] = (t,)
        else:
            t, s, weights = duffy_rule(count)
            self.nodes, self.weights = (t, s), 2 * weights
        # Of each degree: what is subtracted from t and s times the degree before, and the factor that makes it normal.
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.table = self._build()  # values, then d_t (and d_s), at the nodes: [1 + arguments, nodes, polynomials]

    def _build(self) -> Tensor:
        scale = self.weights.sqrt()
        one = torch.stack([torch.ones_like(scale), *[torch.zeros_like(scale)] * self.arguments])
        self.constant = 1 / torch.linalg.vector_norm(one * scale).item()
        table = (one * self.constant)[..., None]
        for degree in range(1, self.degree + 1):
            old = table[..., -self._count(degree - 1) :]
            new = [_times(old, self.nodes[0], 0)]
            if self.arguments == 2:
                new.append(_times(old[..., -1:], self.nodes[1], 1))
            flat, block = ((x * scale[:, None]).flatten(0, 1) for x in (table, torch.cat(new, -1)))
            subtract = flat.T @ block
            block = block - flat @ subtract
            again = flat.T @ block  # twice is enough for orthogonality to rounding
            q, r = torch.linalg.qr(block - flat @ again)
            sign = torch.diagonal(r).sign()
            self.steps.append((subtract + again, torch.linalg.inv(sign[:, None] * r)))
            table = torch.cat([table, (q * sign).unflatten(0, table.shape[:2]) / scale[:, None]], -1)
        return table

    def _count(self, degree: int) -> int:
        """Polynomials of exactly this degree."""
        return 1 if self.arguments == 1 else degree + 1

    def __len__(self) -> int:
        return self.table.shape[-1]

    def __call__(self, *points: Tensor) -> Tensor:
        """Values at points [...]: [..., number of polynomials]; differentiable in the points."""
        points = tuple(torch.broadcast_tensors(*points))
        values = torch.full_like(points[0], self.constant)[..., None]
        for degree, (subtract, factor) in enumerate(self.steps, 1):
            old = values[..., -self._count(degree - 1) :]
            new = points[0][..., None] * old
            if self.arguments == 2:
                new = torch.cat([new, points[1][..., None] * old[..., -1:]], -1)
            new = (new - values @ subtract.to(new)) @ factor.to(new)
            values = torch.cat([values, new], -1)
        return values


def _times(jet: Tensor, node: Tensor, argument: int) -> Tensor:
    """(v, v_t, v_s) of node * v from that of v, for several v."""
    new = jet * node[:, None]
    new[1 + argument] += jet[0]
    return new


@dataclass(frozen=True)
class ContinuousMinimizer:
    """A stationary point of J among polynomials of degree N.

    Attributes:
        curves: theta_N as parameters of the integral equation.
        value, data, penalty: J(theta_N) = data + penalty.
        gradient: the norm of J' on the polynomials of degree N: what the minimisation left.
        iterations: of L-BFGS.
        coordinates: theta_N in the coordinates of `GalerkinProblem`.
    """

    curves: ParameterCurves
    value: float
    data: float
    penalty: float
    gradient: float
    iterations: int
    degree: int
    coordinates: Tensor


@dataclass(frozen=True)
class Certificate:
    """What the polynomials of a larger degree say about theta_N.

    Attributes:
        degree: of the larger space.
        residual: the norm of J'(theta_N) there: the H^1 dual norm.
        curvature: the smallest eigenvalue of J''(theta_N) there. Positive: a strict local minimum to second order.
        decrement: g^T H^-1 g / 2, Newton's prediction of how far J falls when the larger space is minimised over.
        value_error: residual^2 / (2 curvature), a bound of that fall if J'' >= curvature around theta_N.
        distance_error: residual / curvature, likewise a bound of the H^1 distance to that minimiser.
    """

    degree: int
    residual: float
    curvature: float
    decrement: float

    @property
    def value_error(self) -> float:
        return self.residual**2 / (2 * self.curvature) if self.curvature > 0 else math.inf

    @property
    def distance_error(self) -> float:
        return self.residual / self.curvature if self.curvature > 0 else math.inf


class GalerkinProblem:
    """J of eq. (11) on polynomials of degree N, as a function of their H^1-orthonormal coordinates.

    The state is a polynomial through its values at Gauss points, at which the integral equation holds (collocation);
    the integrals of R are exact for p = 2 and p = 4.

    Args:
        problem: the learning problem; its `first` has no meaning here, x(0) is what the equation says.
        degree: N >= 1.
        points: collocation points.
    """

    def __init__(self, problem: LearningProblem, degree: int, points: int | None = None):
        self.problem = problem
        check_count("degree", degree)
        self.line, self.triangle = SobolevPolynomials(degree, 1), SobolevPolynomials(degree, 2)
        count = points or degree + 16
        nodes, weights = gauss_legendre(check_count("points", count, degree))
        d, v = problem.dim, problem.vartheta
        self.shapes = {"A": (d, d), "a": (d,), "K": (d, d), "b": (d,), "vartheta": (v,)}
        times = torch.cat([nodes, nodes.new_ones(1)])
        self.at_times = self.line(times)
        # int_0^t K(t, s) x(s) ds = sum_k (sum_c E[i, k, c] K_c) x(node k) for polynomials K and x, and the same for b.
        inner = times[:, None] * nodes
        rule = times[:, None] * weights
        kernel = self.triangle(times[:, None].expand_as(inner), inner)
        self.of_kernel = torch.einsum("iq,iqk,iqc->ikc", rule, _interpolation(nodes, inner), kernel)
        self.of_bias = torch.einsum("iq,iqc->ic", rule, kernel)
        self.weights = check_weights(problem.weight)

    @property
    def size(self) -> int:
        return sum(self._rows(name) * math.prod(shape) for name, shape in self.shapes.items())

    def _rows(self, name: str) -> int:
        return len(self.line if name in ONE_INDEX else self.triangle)

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Coefficients [number of polynomials, ...] by parameter."""
        sizes = [self._rows(name) * math.prod(shape) for name, shape in self.shapes.items()]
        parts = z.split(sizes)
        return {n: part.reshape(self._rows(n), *self.shapes[n]) for n, part in zip(NAMES, parts, strict=True)}

    def data_loss(self, z: Tensor) -> Tensor:
        c, problem = self.split(z), self.problem
        kernel = torch.tensordot(self.of_kernel, c["K"], 1)  # [i, k, d, d]
        base = torch.einsum("ic,cab,nb->ina", self.at_times, c["A"], problem.inputs)
        base = base + (self.at_times @ c["a"] + self.of_bias @ c["b"])[:, None]
        vartheta = self.at_times @ c["vartheta"] if problem.vartheta else None
        phi = problem.phi

        def layer(y: Tensor, v: Tensor | None) -> Tensor:
            return phi(y.flatten(0, 1), None).reshape(y.shape) if v is None else torch.vmap(phi)(y, v)

        inside = None if vartheta is None else vartheta[:-1]
        x = layer(base[:-1], inside)
        for _ in range(ITERATIONS):
            new = layer(base[:-1] + torch.einsum("ikab,knb->ina", kernel[:-1], x), inside)
            change = (new - x).detach().abs().max()
            x = new
            if bool(change <= 4e-16 * (1 + x.detach().abs().max())) or not bool(change.isfinite()):
                break
        last = None if vartheta is None else vartheta[-1:]
        final = layer(base[-1:] + torch.einsum("ikab,knb->ina", kernel[-1:], x), last)[0]
        return problem.loss(final, problem.targets).mean()

    def penalty(self, z: Tensor) -> Tensor:
        total = z.new_zeros(())
        for name, c in self.split(z).items():
            space, p = (self.line, 2.0) if name in ONE_INDEX else (self.triangle, self.problem.p)
            jets = torch.tensordot(space.table, c, 1)  # values and derivatives at the nodes
            if c.shape[-1]:
                total = total + self.weights[name] * (power(jets, p, 2) @ space.weights).sum()
        return total

    def objective(self, z: Tensor) -> Tensor:
        """J(theta_N)."""
        return self.data_loss(z) + self.penalty(z)

    def oracle(self, z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            value = self.objective(z)
        return value.item(), torch.autograd.grad(value, z)[0]

    def hessian(self, z: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.objective, z.detach(), vectorize=True)

    def curves(self, z: Tensor) -> ParameterCurves:
        c = {name: value.detach() for name, value in self.split(z).items()}
        d = self.problem.dim

        def of(name: str) -> Callable[..., Tensor]:
            space = self.line if name in ONE_INDEX else self.triangle
            return lambda *points: torch.tensordot(space(*points), c[name].to(points[0]), 1)

        kernels = CallableKernel(of("K"), (d, d)), CallableKernel(of("b"), (d,))
        return ParameterCurves(of("A"), of("a"), *kernels, of("vartheta") if self.problem.vartheta else None, d)

    def project(self, parameters: DiscreteParameters) -> Tensor:
        """Coordinates of the polynomials nearest to I_1 Theta in L2: a start on the branch of Theta."""
        parts = []
        for name, function in extend(parameters).items():
            space = self.line if name in ONE_INDEX else self.triangle
            values = function(*space.nodes).flatten(1)
            root = space.weights.sqrt()[:, None]
            parts.append(torch.linalg.lstsq(space.table[0] * root, values * root).solution.flatten())
        return torch.cat(parts)

    def embed(self, z: Tensor, larger: GalerkinProblem) -> Tensor:
        """The same polynomials in the coordinates of a larger degree."""
        found = {name: value.new_zeros(larger._rows(name), *value.shape[1:]) for name, value in self.split(z).items()}
        for name, value in self.split(z).items():
            found[name][: value.shape[0]] = value
        return torch.cat([value.flatten() for value in found.values()])


def minimize_continuous(
    problem: LearningProblem,
    degree: int = 12,
    *,
    start: DiscreteParameters | ContinuousMinimizer | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 4000,
    seed: int = 0,
) -> ContinuousMinimizer:
    """A minimiser of J, eq. (11), among polynomials of degree N: an upper bound of J*, decreasing in N.

    For p = 2 minimisers are smooth but for the corners, and J_N converges fast. For p > 2 the equation degenerates
    where d_t K or d_s K vanishes (they are Hoelder there, like |x|^(1 / (p - 1))): J_N converges like a power of N.

    Args:
        problem: the learning problem, in float64.
        degree: N >= 1.
        start: parameters of a branch to follow, or the minimiser of a smaller degree; None for a random start.
        tolerance: of the largest gradient entry.

    Raises:
        RuntimeError: the minimisation did not reach the tolerance.

    Source: DNL (11); the method is ours.
    """
    space = GalerkinProblem(problem, degree)
    if isinstance(start, ContinuousMinimizer):
        if start.degree > degree:
            raise ValueError(f"start must have at most degree {degree}, got {start.degree}")
        z = GalerkinProblem(problem, start.degree).embed(start.coordinates, space)
    elif start is not None:
        z = space.project(start)
    else:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(space.size, generator=generator, dtype=torch.float64) / math.sqrt(space.size)
    found = minimize_lbfgs(space.oracle, z, tolerance=tolerance, max_iterations=max_iterations)
    if not found.converged:
        size = found.gradient.abs().max().item()
        raise RuntimeError(f"the gradient is {size:.1e} after {found.iterations} iterations, above {tolerance:.1e}")
    z = found.point.detach()
    with torch.no_grad():
        data, penalty = space.data_loss(z).item(), space.penalty(z).item()
    gradient = torch.linalg.vector_norm(found.gradient).item()
    return ContinuousMinimizer(space.curves(z), data + penalty, data, penalty, gradient, found.iterations, degree, z)


def certify(problem: LearningProblem, minimizer: ContinuousMinimizer, extra: int = 4) -> Certificate:
    """Gradient and Hessian of J at theta_N among polynomials of degree N + extra.

    What they do not prove: that the Hessian stays as large nearby, that still larger degrees add little, and that the
    minimum is the global one. For p > 2 the curvature in H^1 has no positive bound (the equation degenerates): only
    `decrement` says something there, and only as an estimate.

    Args:
        extra: how much the degree is larger, >= 1. The Hessian is dense: (entries of theta)^2 numbers.
    """
    check_count("extra", extra)
    small, larger = GalerkinProblem(problem, minimizer.degree), GalerkinProblem(problem, minimizer.degree + extra)
    wide = small.embed(minimizer.coordinates, larger)
    residual = larger.oracle(wide)[1]
    values, vectors = torch.linalg.eigh(larger.hessian(wide))
    decrement = ((vectors.T @ residual).square() / values).sum().item() / 2
    size = torch.linalg.vector_norm(residual).item()
    return Certificate(minimizer.degree + extra, size, values[0].item(), decrement)


def _interpolation(nodes: Tensor, points: Tensor) -> Tensor:
    """Values at points [...] of the polynomials that are 1 at one node and 0 at the others: [..., nodes].

    The barycentric formula, whose weights at Gauss points are known up to a common factor from the differences.
    """
    gaps = nodes[:, None] - nodes + torch.eye(nodes.numel(), dtype=nodes.dtype)
    logs = gaps.abs().log().sum(1)
    weights = gaps.sign().prod(1) * torch.exp(logs.mean() - logs)
    distance = points[..., None] - nodes
    hit = distance == 0
    terms = torch.where(hit.any(-1, keepdim=True), hit.to(nodes), weights / torch.where(hit, 1.0, distance))
    return terms / terms.sum(-1, keepdim=True)
