"""`dnl converge`: the statements of the continuous-depth theory, measured; a table, a figure and a JSON file each."""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from ..theory import dynamics, limit, operators, studies
from ..theory.learning import problem_a, problem_b
from . import converge_report
from .errors import Stopped, UsageError, require
from .screen import console

STUDIES = ("forward", "regularizer", "constants", "learning", "limit", "dynamics")
LEVELS = {
    "forward": [64, 128, 256, 512, 1024, 2048, 4096],
    "regularizer": [8, 16, 32, 64, 128, 256],
    "constants": [8, 16, 32, 64, 128, 256],
    "learning": [4, 8, 16, 32, 64],
    "limit": [4, 8, 16, 32, 64],
    "dynamics": [4, 8, 16, 32, 64],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", choices=STUDIES, help="what to measure")
    parser.add_argument("--out", default="out/converge", metavar="DIR", help="where NAME.json and NAME.png go")
    parser.add_argument("--levels", nargs="+", type=int, metavar="L", help="layer counts, increasing [by study]")
    parser.add_argument("--seed", type=int, help="of the random curves or starts [by study]")
    forward = parser.add_argument_group("forward")
    forward.add_argument(
        "--kernel",
        nargs="+",
        choices=list(operators.KERNELS),
        help="non-local operators; gaussian is exp(y_i.y_j), rbf what the package's operators call gaussian [all]",
    )
    forward.add_argument("--sigma", nargs="+", choices=["tanh", "relu"], help="activations [tanh relu]")
    learning = parser.add_argument_group("regularizer, learning, limit, dynamics")
    learning.add_argument(
        "--problem", choices=["a", "b"], help="a: local, d = 1; b: RBF with a learnable bandwidth [a]"
    )
    learning.add_argument("--p", type=float, nargs="+", help="exponents of the two-index norms [4; regularizer: 2 4]")
    learning.add_argument("--first", nargs="+", choices=["input", "lifted"], help="the first state x^0 [input]")
    learning.add_argument("--restarts", type=int, help="random starts at L = 8 [a: 4, b: 12]")
    learning.add_argument("--degrees", type=int, nargs="+", help="of the polynomials, for the limit [6 10 14 18 22]")
    learning.add_argument("--rule", nargs="+", choices=list(dynamics.RULES), help="descent rules [all but l2]")
    learning.add_argument("--steps", type=int, help="descent steps [300]")


PROBLEMS = ("learning", "limit", "dynamics")  # studies of one learning problem, whose name is in the files
# Which options a study reads; another one given with it is a mistake, not something to ignore.
READS = {
    "forward": {"kernel", "sigma"},
    "regularizer": {"p"},
    "constants": set(),
    "learning": {"problem", "p", "first", "restarts"},
    "limit": {"problem", "p", "restarts", "degrees"},
    "dynamics": {"problem", "rule", "steps"},
}


def run(args: argparse.Namespace) -> int:
    _check(args)
    out = pathlib.Path(args.out)
    for module in ("rich", "matplotlib"):
        require(module)
    screen = console()
    started, worked = time.perf_counter(), time.process_time()
    try:
        with _Progress(screen) as watch:
            found = [_study(args, p, first, watch) for p, first in _variants(args)]
    except ValueError as error:
        raise UsageError(str(error)) from error
    which = [args.problem or "a"] if args.study in PROBLEMS else []
    exponents = [f"p{p:g}" for p, _ in _variants(args) if args.study == "limit"]
    name = "-".join([args.study, *which, *exponents])
    record: dict[str, Any] = {
        "name": name,
        "versions": {"dnl_kernels": __version__, "torch": torch.__version__},
        "arguments": {key: value for key, value in vars(args).items() if key != "out" and value is not None},
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - worked, 2),
        "results": [_plain(study.to_dict()) for study in found],
    }
    for result in record["results"]:
        for table in converge_report.tables(result):
            converge_report.show(table, screen)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / f"{name}.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        _write(out / f"{name}.png", lambda path: converge_report.draw(record["results"], path))
    except OSError as error:
        raise Stopped(f"cannot write to {out}: {error.strerror or error}") from error
    screen.print(f"{out / name}.json and .png, {record['seconds']:.0f} s", highlight=False, soft_wrap=True)
    return 0


def _check(args: argparse.Namespace) -> None:
    given = {key for key in set().union(*READS.values()) if getattr(args, key) is not None}
    if foreign := sorted(given - READS[args.study]):
        options = ", ".join(f"--{key}" for key in foreign)
        raise UsageError(f"{args.study} does not read {options}")
    levels = LEVELS[args.study] if args.levels is None else args.levels
    if len(levels) < 2 or levels[0] < 1 or any(b <= a for a, b in zip(levels[:-1], levels[1:], strict=True)):
        raise UsageError(f"--levels must be at least 2 increasing layer counts >= 1, got {' '.join(map(str, levels))}")
    if args.study in ("learning", "dynamics") and len(levels) < 3:
        raise UsageError("--levels must be at least 3 layer counts here: orders compare differences between levels")
    if args.study == "limit" and any(levels[-1] % level for level in levels):
        raise UsageError(f"--levels must divide the last, {levels[-1]}, for a common quadrature")
    if any(degree < 1 for degree in args.degrees or ()) or sorted(set(args.degrees or ())) != (args.degrees or []):
        raise UsageError(f"--degrees must be increasing and >= 1, got {' '.join(map(str, args.degrees))}")
    if args.study in ("forward", "constants") and any(level % levels[0] for level in levels):
        raise UsageError(f"--levels must be multiples of the first, {levels[0]}, for nested grids")
    for name in ("restarts", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be >= 1, got {value}")
    for p in args.p or ():
        if not 2 <= p < math.inf:
            raise UsageError(f"--p must be >= 2 and finite, got {p:g}")
    args.levels = levels


def _variants(args: argparse.Namespace) -> list[tuple[float | None, str]]:
    """The learning problems that were asked for; the other studies take their options together."""
    if args.study == "limit":
        return [(p, "") for p in args.p or [4]]
    if args.study != "learning":
        return [(None, "input")]
    return [(p, first) for p in args.p or [None] for first in args.first or ["input"]]


def _study(args: argparse.Namespace, p: float | None, first: str, watch: studies.Watch) -> studies.Study:
    levels, seed = args.levels, {} if args.seed is None else {"seed": args.seed}
    if args.study == "forward":
        kernels, sigmas = args.kernel or list(operators.KERNELS), args.sigma or ["tanh", "relu"]
        return studies.forward_study(kernels, sigmas, levels, reference=_ode_reference(), watch=watch, **seed)
    if args.study == "regularizer":
        return studies.regularizer_study(args.p or [2, 4], levels, watch=watch, **seed)
    if args.study == "constants":
        return studies.constants_study(levels, watch=watch, **seed)
    which = args.problem or "a"
    if args.study == "dynamics":
        problem = problem_a(2) if which == "a" else problem_b()
        rules = args.rule or ["sobolev", "absorbed", "explicit"]
        return studies.dynamics_study(problem, levels, rules, steps=args.steps or 300, watch=watch, **seed)
    p = (4 if which == "a" else 2) if p is None else p
    build = problem_a if which == "a" else problem_b
    if args.study == "limit":
        return limit.limit_study(
            lambda first: build(p=p, first=first),
            f"{which}, p = {p:g}",
            levels,
            args.degrees or [6, 10, 14, 18, 22],
            restarts=args.restarts or 4,
            watch=watch,
            **seed,
        )
    problem = build(p=p, first=first)
    restarts = args.restarts or (4 if which == "a" else 12)
    name = f"{which}, p = {p:g}, x0 {problem.first}"
    return studies.learning_study(problem, name, levels, restarts=restarts, watch=watch, **seed)


def _ode_reference() -> studies.Reference | None:
    """DOP853 on the ODE system that separable kernels are equivalent to, where scipy is installed."""
    try:
        import numpy as np
        from scipy.integrate import solve_ivp
    except ModuleNotFoundError:
        return None

    def solve(curves: Any, x: torch.Tensor, phi: Any, times: torch.Tensor) -> torch.Tensor:
        K, b = curves.K.coefficients, curves.b.coefficients
        rank, dim = K.shape[1], K.shape[2]

        def state(t: float, z: Any) -> torch.Tensor:
            """x(t) from Z_q = int_0^t g_q x and G_q = int_0^t g_q."""
            s, z = torch.tensor(t, dtype=torch.float64), torch.from_numpy(z)
            Z, G, f = z[: rank * dim].reshape(rank, dim), z[rank * dim :], curves.K.left(s)
            memory = torch.einsum("m,mqij,qj->i", f, K, Z) + torch.einsum("m,q,mqi->i", f, G, b)
            y = curves.A(s) @ x + curves.a(s) + memory
            return phi(y, None if curves.vartheta is None else curves.vartheta(s))

        def slope(t: float, z: Any) -> Any:
            g = curves.K.right(torch.tensor(t, dtype=torch.float64))
            return torch.cat([(g[:, None] * state(t, z)).reshape(-1), g]).numpy()

        start = np.zeros(rank * (dim + 1))
        options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-14, "max_step": 0.02}
        solution = solve_ivp(slope, (0.0, 1.0), start, t_eval=times.numpy(), **options)
        return torch.stack(
            [state(t, np.ascontiguousarray(z)) for t, z in zip(times.tolist(), solution.y.T, strict=True)]
        )

    return solve


class _Progress(studies.Watch):
    """One bar for the current part on a terminal; nothing elsewhere."""

    def __init__(self, screen: Any):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> _Progress:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def begin(self, what: str, total: int) -> None:
        self.progress.reset(self.task, description=what, total=total or None)

    def advance(self, steps: int = 1) -> None:
        self.progress.advance(self.task, steps)


def _plain(value: Any) -> Any:
    """JSON has no nan or inf: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: pathlib.Path, fill: Callable[[pathlib.Path], object]) -> None:
    """Written aside and moved into place: a reader sees the old file or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        fill(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is not what a result file should keep
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
