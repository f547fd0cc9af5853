"""The package's solvers of integral equations beside voles, torchdiffeq and scipy: accuracy and processor time.

    python -m bench.integral_equations [--out docs/theory/solvers.json]

Two equations x = phi(sin t - int_0^t cos(3 (t - s)) x(s) ds), phi the identity or tanh, whose separable kernel makes
them a system of two ODEs for those who solve ODEs; and Abel's, x = 1 - 3 int_0^t (t - s)^(-1/2) x(s) ds, whose solution
is erfcx(3 sqrt(pi t)). Errors are the largest at 1,001 points for solvers with dense output, else at the solver's own
grid points. Times are the best of three, in one thread. Peers take part where they are installed (neither is a
dependency of the package; voles takes linear convolution equations only).
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import integrate, special

from dnl_kernels import theory

T = torch.linspace(0, 1, 1001, dtype=torch.float64)
Run = Callable[[], tuple[Any, Any]]  # -> times, values
PHI: dict[str, Callable] = {"linear": lambda y: y, "tanh": torch.tanh}


def kernel(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return -torch.cos(3 * (t - s))


def of_ode(t: Any, z: Any, phi: Callable, lib: Any) -> Any:
    """x(t) from z = (int cos(3 s) x, int sin(3 s) x)."""
    return phi(lib.sin(t) - lib.cos(3 * t) * z[0] - lib.sin(3 * t) * z[1])


def scipy_ode(phi: Callable, method: str, rtol: float) -> Run:
    def slope(t: float, z: Any) -> Any:
        x = of_ode(t, z, phi, np)
        return np.cos(3 * t) * x, np.sin(3 * t) * x

    def run() -> tuple[Any, Any]:
        found = integrate.solve_ivp(slope, (0, 1), (0, 0), method, rtol=rtol, atol=rtol, dense_output=True)
        return T, of_ode(T.numpy(), found.sol(T.numpy()), phi, np)

    return run


def torch_ode(phi: Callable, method: str, rtol: float) -> Run | None:
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError:
        return None

    def slope(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        x = of_ode(t, z, phi, torch)
        return torch.stack([torch.cos(3 * t) * x, torch.sin(3 * t) * x])

    def run() -> tuple[Any, Any]:
        found = odeint(slope, torch.zeros(2, dtype=torch.float64), T, rtol=rtol, atol=rtol, method=method)
        return T, of_ode(T, found.T, phi, torch)

    return run


def with_voles(samples: int) -> Run | None:
    try:
        import voles
    except ModuleNotFoundError:
        return None
    t = torch.linspace(0, 1, samples, dtype=torch.float64)

    def run() -> tuple[Any, Any]:
        values = kernel(t, torch.zeros(()).double()).numpy()
        step = 1 / (samples - 1)
        return t, voles.solve_VIE_2(kernel_values=values, g_values=torch.sin(t).numpy(), time_step=step, coll_divs=4)

    return run


def ours(problem: theory.IntegralProblem, rtol: float) -> Run:
    def run() -> tuple[Any, Any]:
        return T, theory.solve(problem, rtol=rtol)(T)[:, 0]

    return run


def grid(problem: theory.IntegralProblem, phi: Callable, scheme: str, layers: int) -> Run:
    def run() -> tuple[Any, Any]:
        x = torch.zeros(1, dtype=torch.float64)
        path = theory.forward(problem.curves(), x, lambda y, _: phi(y), layers=layers, scheme=scheme, first="lifted")
        return path.times, path.states[:, 0]

    return run


def cases() -> Iterator[tuple[str, str, Run | None]]:
    for name, phi in PHI.items():
        problem = theory.IntegralProblem(kernel, torch.sin, phi)
        for rtol in (1e-5, 1e-8, 1e-11):
            yield name, f"theory.solve, rtol {rtol:.0e}", ours(problem, rtol)
        for scheme, layers in (("euler", 256), ("trapezoid", 256), ("collocation", 16), ("collocation", 64)):
            yield name, f"forward, {scheme}, L = {layers}", grid(problem, phi, scheme, layers)
        if name == "linear":
            for samples in (65, 257, 1025):
                yield name, f"voles, 4 collocation points, {samples} samples", with_voles(samples)
        numeric = np.tanh if name == "tanh" else PHI["linear"]
        for rtol in (1e-5, 1e-8, 1e-11):
            yield name, f"scipy DOP853 (as ODE), rtol {rtol:.0e}", scipy_ode(numeric, "DOP853", rtol)
        for method, rtol in (("dopri5", 1e-5), ("dopri5", 1e-8), ("dopri8", 1e-11)):
            yield name, f"torchdiffeq {method} (as ODE), rtol {rtol:.0e}", torch_ode(phi, method, rtol)
    abel = theory.IntegralProblem(lambda t, s: -3 * torch.ones_like(t - s), torch.ones(1), alpha=0.5)
    for rtol in (1e-5, 1e-8, 1e-11):
        yield "Abel", f"theory.solve, rtol {rtol:.0e}", ours(abel, rtol)


def exact(name: str, t: Any) -> Any:
    t = np.asarray(t)
    if name == "Abel":
        return special.erfcx(3 * np.sqrt(math.pi * t))
    phi = np.tanh if name == "tanh" else PHI["linear"]

    def slope(u: float, z: Any) -> Any:
        x = of_ode(u, z, phi, np)
        return np.cos(3 * u) * x, np.sin(3 * u) * x

    found = integrate.solve_ivp(slope, (0, 1), (0, 0), "Radau", t_eval=t, rtol=1e-13, atol=1e-15)
    return of_ode(t, found.y, phi, np)


def measure() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for name, solver, run in cases():
        if run is None:
            print(f"{solver}: not installed")
            continue
        times = []
        for _ in range(3):
            started = time.process_time()
            t, values = run()
            times.append(time.process_time() - started)
        error = float(np.abs(np.asarray(values) - exact(name, t)).max())
        rows.append({"equation": name, "solver": solver, "error": error, "milliseconds": 1e3 * min(times)})
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| equation | solver | largest error | ms |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['equation']} | {row['solver']} | {row['error']:.0e} | {row['milliseconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="write the rows as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure()
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
