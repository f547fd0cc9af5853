"""Installs the project the ways users do, each in an environment that lacks something, and uses what came out.

`make install-check` runs it; it is no pytest module because every case needs a virtual environment of its own making.
The cases share one environment with an old torch where they can: creating one costs more than the case.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The floor is torch 2.10, of which package indexes have a build with CUDA only, 4 GB that take longer than all of this
# check; 2.13 comes without. DNL_OLDEST_TORCH=2.10.0 tests the floor; with an index that has builds for processors
# (PIP_EXTRA_INDEX_URL) 2.10.0+cpu does. docs/gpu/ready.md has what was seen under every version.
OLDEST = os.environ.get("DNL_OLDEST_TORCH", "2.13.0")
OLDEST_TORCH = f"torch=={OLDEST}"
# What a user does next: one forward and backward, on the best backend, and the report.
USE = """
import torch, dnl_kernels as dnl
from dnl_kernels.info import facts, backends
x, w = [torch.randn(2, 5) for _ in range(3)], torch.randn(3, requires_grad=True)
dnl.dense_sum(x, w).sum().backward()
assert torch.allclose(w.grad, torch.stack([s.sum() for s in x]), atol=1e-5)
print("|".join([torch.__version__, dnl.__file__, backends()["cpu"], backends()["cuda"]]))
"""


class Environment:
    """A virtual environment and what the commands run in it may see."""

    def __init__(self, folder: pathlib.Path):
        venv.create(folder, with_pip=True)
        self.bin = folder / "bin"
        self.cache = folder / "cache"

    def run(self, *command: str, env: dict[str, str] | None = None, cwd: pathlib.Path = ROOT) -> str:
        # What a build contains is not at stake here, so it is the cheapest one.
        cheap = {"DNL_CXXFLAGS": "-O0", "DNL_ISA_LEVELS": "generic"}
        variables = {"XDG_CACHE_HOME": str(self.cache)} | cheap | (env or {})
        full = {k: v for k, v in os.environ.items() if not k.startswith(("DNL_", "PYTHON"))} | variables
        result = subprocess.run(
            [str(self.bin / "python"), *command], cwd=cwd, env=full, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
        return result.stdout + result.stderr

    def pip(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        # pip itself is kept out of the cache under test, so that wheels are not downloaded again.
        return self.run("-m", "pip", "--no-input", *arguments, env={"XDG_CACHE_HOME": _pip_cache()} | (env or {}))

    def use(self, env: dict[str, str] | None = None) -> tuple[list[str], str]:
        """Runs USE outside the checkout; the four facts that it prints, and everything that it said."""
        output = self.run("-c", USE, env=env, cwd=self.bin)
        facts = next(line for line in output.splitlines() if line.count("|") == 3)
        return facts.split("|"), output


def _pip_cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")


def expect(condition: bool, what: str, seen: object) -> None:
    print(f"  {'ok' if condition else 'FAILED'}: {what}", flush=True)
    if not condition:
        raise SystemExit(f"saw: {seen}")


def path_without(folder: pathlib.Path, *programs: str) -> str:
    """A PATH on which everything can be found except the given programs."""
    folder.mkdir()
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in pathlib.Path(directory).glob("*") if directory else []:
            link = folder / program.name
            if program.name not in programs:
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return str(folder)


def main() -> None:
    work = pathlib.Path(tempfile.mkdtemp(prefix="dnl-install-"))
    try:
        check(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check(work: pathlib.Path) -> None:
    no_nvcc = {"PATH": path_without(work / "no-nvcc", "nvcc"), "CUDA_HOME": str(work)}
    compilers = ("g++", "c++", "clang++", "gcc", "cc", "clang", "nvcc")
    no_compiler = {"PATH": path_without(work / "no-compiler", *compilers), "CUDA_HOME": str(work)}

    # First: with the flags of `make build`, whose objects are still there. Every later build replaces them.
    wheels = work / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), "."],
                   cwd=ROOT, check=True, env=os.environ | {"DNL_CUDA": "0"})  # fmt: skip

    print("torch absent: one command installs both, the first import compiles", flush=True)
    old = Environment(work / "old")
    output = old.pip("install", OLDEST_TORCH, ".", "numpy", env=no_nvcc)
    fetched = re.findall(r"^ *(?:Downloading|Processing) \S*\btorch-\d\S*", output, re.MULTILINE)
    expect(len(fetched) == 1, "a single torch was fetched", output)
    (version, _, cpu, _), output = old.use()
    expect("dense_sum" in cpu, "the C++ kernels run", output)
    expect(version.startswith(OLDEST), f"under torch {version}", version)
    expect(any(old.cache.rglob("_C*.so")), "compiled into the user's cache", list(old.cache.rglob("*.so")))

    print("torch present: built against it, no second torch", flush=True)
    output = old.pip("install", "--force-reinstall", "--no-deps", "--verbose", ".", env={"DNL_CUDA": "0"})
    expect("Collecting torch" not in output, "pip did not look for torch", output)
    shutil.rmtree(old.cache)
    (_, file, cpu, cuda), output = old.use(env={"DNL_JIT": "0"})
    expect("dense_sum" in cpu, "the C++ kernels of the wheel run", output)
    expect("DNL_CUDA=0" in cuda, "DNL_CUDA=0 is given as the reason for no CUDA", cuda)
    expect(str(ROOT) not in file, "the installed package is used, not the checkout", file)

    print("no nvcc", flush=True)
    old.pip("install", "--force-reinstall", "--no-deps", ".", env=no_nvcc)
    (_, _, cpu, cuda), output = old.use(env={"DNL_JIT": "0"} | no_nvcc)
    expect("dense_sum" in cpu, "the C++ kernels run", output)
    expect("no nvcc at build time" in cuda, "the missing nvcc is given as the reason", cuda)

    print("no C++ compiler", flush=True)
    old.pip("install", "--force-reinstall", "--no-deps", ".", env=no_compiler)
    (_, _, cpu, _), output = old.use(env=no_compiler)
    expect("no C++ compiler" in cpu, "the missing compiler is given as the reason", cpu)
    expect(output.count("no C++ compiler") == 2, "it is logged in one line", output)

    print("editable", flush=True)
    old.pip("install", "--no-deps", "--editable", ".", env={"DNL_CUDA": "0"})
    (_, file, cpu, _), output = old.use(env={"DNL_JIT": "0"})
    expect(file == str(ROOT / "dnl_kernels" / "__init__.py"), "the checkout is used", file)
    expect("dense_sum" in cpu, "the C++ kernels run", output)

    print("one binary, two torches: built with this environment's torch, tested under the oldest and under this one")
    old.pip("install", "--force-reinstall", "--no-deps", *map(str, wheels.glob("*.whl")))
    (version, file, cpu, _), output = old.use(env={"DNL_JIT": "0"})
    expect("dense_sum" in cpu and version.startswith(OLDEST), f"its kernels run under torch {version}", output)
    old.pip("install", "--quiet", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "expecttest", "scipy")
    print("  ok: operator tests under the oldest torch:", operator_tests(str(old.bin / "python"), old.bin), flush=True)
    unpacked = work / "unpacked"
    old.pip("install", "--quiet", "--no-deps", "--target", str(unpacked), *map(str, wheels.glob("*.whl")))
    print("  ok: operator tests under this environment's:", operator_tests(sys.executable, work, unpacked), flush=True)


def operator_tests(python: str, cwd: pathlib.Path, package: pathlib.Path | None = None) -> str:
    """The last line of the operators' tests with the installed package, or the one in the folder `package`.

    The ABI is the same for all kernels: the operators that use most of it are enough, and fast; and graphs of Dynamo,
    of which each torch has another."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DNL_", "PYTHON"))}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DNL_JIT": "0"}
    if package is not None:
        env["PYTHONPATH"] = str(package)
    where = "import dnl_kernels, torch; print(dnl_kernels.__file__, torch.__version__)"
    seen = subprocess.run([python, "-c", where], cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout
    expect(not seen.startswith(str(ROOT)), f"the installed package is tested, under torch {seen.split()[1]}", seen)
    tests = [str(ROOT / "python_tests" / "ops" / f"test_{op}.py") for op in ("dense_sum", "dense_conv2d", "dnl_layer")]
    compiled = [str(ROOT / "python_tests" / "test_contracts.py") + "::test_compile_fullgraph_forward_and_backward"]
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-n", "auto"]
    command = [python, "-m", "pytest", *config, *tests, *compiled]
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"the operators' tests fail with {python}:\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}")
    return run.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
