"""Compiles csrc/ with ninja: `_C` (C++ kernels for the CPU, build facts) and, where nvcc is found, `_cuda`.

Used by setup.py at install time, by `make build`, and by the package at first import when nothing was built before.
It imports neither torch nor setuptools: torch is only a folder with headers and libraries.

File roles (a new operator adds files, this script does not change):
    csrc/module.cpp, csrc/*/cpu.cpp    compiled once, against torch's stable ABI
    csrc/*/cpu_kernel*.cpp             compiled once per instruction-set level, without any torch header
    csrc/*/cuda.cu                     compiled by nvcc for every architecture that `architectures` names
Environment: DNL_CUDA=0 leaves CUDA out; DNL_CUDA_ARCH_LIST; DNL_ISA_LEVELS; DNL_TORCH_DIR; CXX; CUDA_HOME; DNL_CXXFLAGS
(appended).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

HERE = pathlib.Path(__file__).resolve().parent
OLDEST_ARCHITECTURE = 8.0  # cp.async, mma.sync of bfloat16 and tf32
WITHOUT_CARDS = "8.0;9.0+PTX"  # the data centres' two, and what a driver can compile for every later one
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the oldest torch whose stable ABI the binary needs: 2.10
CXXFLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror=return-type"
)
NVCCFLAGS = "-O3 -std=c++20 -Werror all-warnings -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden"
X86_LEVELS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}


def isa_levels() -> dict[str, str]:
    """The levels to compile and their flags: all of this processor's family, or those named in DNL_ISA_LEVELS."""
    family = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"generic": ""}
    names = os.environ.get("DNL_ISA_LEVELS", " ".join(family)).replace(";", " ").split()
    if not names or not set(names) <= set(family):
        raise ValueError(f"DNL_ISA_LEVELS is {' '.join(names)!r}; this kind of processor has {', '.join(family)}")
    return {name: flags for name, flags in family.items() if name in names}


def source_dir() -> pathlib.Path:
    """csrc of a checkout, or the copy inside an installed package."""
    checkout = HERE.parent / "csrc"
    return checkout if (checkout / "module.cpp").exists() else HERE / "csrc"


def torch_dir() -> pathlib.Path | None:
    if os.environ.get("DNL_TORCH_DIR"):
        return pathlib.Path(os.environ["DNL_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def nvcc() -> str | None:
    if os.environ.get("DNL_CUDA", "auto") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    installed = [os.path.join("/usr/local/cuda", "bin"), None]  # None: PATH; then the nvidia-cuda-nvcc package
    installed += sorted(map(str, pathlib.Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")))
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in installed)), None)


@functools.cache
def cards() -> tuple[str, ...]:
    """The compute capabilities of this machine's GPUs, as the driver's own program tells them; it starts no context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = [line.strip() for line in run.stdout.splitlines()] if run.returncode == 0 else []
    return tuple(sorted({line for line in found if line.replace(".", "", 1).isdigit()}, key=float))


def architectures(cuda: str | None = None) -> str:
    """What to compile CUDA code for: DNL_CUDA_ARCH_LIST, or the cards of this machine, or `WITHOUT_CARDS`, which also
    stands where a card is too old for the kernels or too new for the compiler `cuda`."""
    if chosen := os.environ.get("DNL_CUDA_ARCH_LIST"):
        return chosen
    found = cards()
    if not found or float(found[0]) < OLDEST_ARCHITECTURE:
        return WITHOUT_CARDS
    if cuda is not None:
        run = subprocess.run([cuda, "--list-gpu-arch"], capture_output=True, text=True, check=False)
        if not {f"compute_{card.replace('.', '')}" for card in found} <= set(run.stdout.split()):
            return WITHOUT_CARDS
    return ";".join(found)


def gencode(names: str) -> str:
    flags = []
    for arch in filter(None, names.replace(" ", ";").split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def key() -> str:
    """Names a build by everything that it depends on: sources, flags, Python, compiler choice."""
    chosen = [os.environ.get(name) for name in ("CXX", "DNL_CXXFLAGS", "DNL_CUDA")]
    facts = (TARGET, CXXFLAGS, NVCCFLAGS, isa_levels(), architectures(), sys.version_info[:2], chosen)
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(source_dir().rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _ninja() -> list[str] | None:
    """The one that the ninja wheel carries, or else the program: pip's isolated builds have the wheel's as well, and
    another version would take all that they left for out of date."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return [found] if (found := shutil.which("ninja")) else None


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(cxx: str, torch: pathlib.Path, pybind: str, cuda: str | None) -> tuple[str, list[str]]:
    csrc = source_dir()
    base = f'{TARGET} -isystem "{torch / "include"}" -I"{csrc}"'  # warnings are for our own code
    # pybind11 and Python stay out of the CUDA library and of the kernels: only module.cpp includes them.
    module = f'-I"{pybind}" -I"{sysconfig.get_path("include")}"'
    extra = os.environ.get("DNL_CXXFLAGS", "")
    link = f'-L"{torch / "lib"}" -ltorch_cpu'
    runtime = pathlib.Path(cuda).parents[1] / "lib" if cuda else ""  # of the packages; a toolkit's nvcc knows its own
    levels = isa_levels()
    names = architectures(cuda) if cuda else ""
    chosen = sum(1 << list(X86_LEVELS).index(level) for level in levels)  # DNL_LEVELS of csrc/common/isa.h
    lines = [
        f"cxxflags = {CXXFLAGS} {base} -DDNL_LEVELS={chosen} {extra}",
        f"rule cxx\n  command = {cxx} -MD -MF $out.d $cxxflags $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared {extra} $in {link} -o $out",
        f"rule nvcc\n  command = {cuda} {NVCCFLAGS} -MD -MF $out.d -ccbin {cxx} "
        f"{gencode(names)} {base} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f'rule nvlink\n  command = {cuda} -shared --cudadevrt none -ccbin {cxx} $in -L"{runtime}" {link} -o $out',
    ]

    def compile_all(rule, jobs):
        objects = []
        for source, tag, flags in jobs:
            objects.append(f"{source.parent.name}.{source.stem}{tag}.o")
            lines.append(f"build {objects[-1]}: {rule} {_escape(source)}\n  flags = {flags}")
        return " ".join(objects)

    once = [(s, "", module if s.name == "module.cpp" else "") for s in [csrc / "module.cpp", *csrc.glob("*/cpu.cpp")]]
    kernels = [
        (source, f".{level}", f"{flags} -fno-exceptions -DDNL_ISA={level}")
        for source in csrc.glob("*/cpu_kernel*.cpp")
        for level, flags in levels.items()
    ]
    libraries = ["_C" + sysconfig.get_config_var("EXT_SUFFIX")]
    lines.append(f"build {libraries[0]}: link {compile_all('cxx', sorted(once + kernels))}")
    sources = sorted(csrc.glob("*/cuda.cu"))
    if cuda and sources:
        libraries.append("_cuda.so")
        said = f"'-DDNL_ARCHITECTURES=\"{names}\"'"
        jobs = [(s, "", said if s.parent.name == "common" else "") for s in sources]
        lines.append(f"build _cuda.so: nvlink {compile_all('nvcc', jobs)}")
    return "\n".join(lines) + "\n", libraries


def build(package: pathlib.Path, work: pathlib.Path, cuda: bool = True) -> dict[str, str]:
    """Compiles into `work`, then moves the libraries into `package`. Returns what became of each; raises ValueError for
    a wrong DNL_ISA_LEVELS and nothing else."""
    torch, cxx, ninja = torch_dir(), compiler(), _ninja()
    pybind = importlib.util.find_spec("pybind11")
    lacking = [name for name, found in [("torch", torch), ("C++ compiler", cxx), ("ninja", ninja), ("pybind11", pybind)]
               if not found]  # fmt: skip
    if lacking or not (torch and cxx and ninja and pybind and pybind.origin):
        later = " (tried again at first import)" if lacking == ["torch"] else ": pure Python, reference backend"
        return {"_C": f"not built, no {' and no '.join(lacking)}{later}"}
    if shutil.which(cxx.split()[0]) is None:
        return {"_C": f"not built, CXX={cxx} is not a program: pure Python, reference backend"}
    work.mkdir(parents=True, exist_ok=True)
    package.mkdir(parents=True, exist_ok=True)
    include = os.path.join(os.path.dirname(pybind.origin), "include")
    text, libraries = _ninja_file(cxx, torch, include, nvcc() if cuda else None)
    (work / "build.ninja").write_text(text)

    def ninja_of(*targets: str) -> subprocess.CompletedProcess[str]:
        command = [*ninja, "-C", str(work), "-k", "0", *targets]  # one's errors do not stop the other
        return subprocess.run(command, capture_output=True, text=True, check=False)

    together, outcome = ninja_of(*libraries), {}
    for library in libraries:
        run = ninja_of(library) if together.returncode else together  # again, to hear what belongs to it alone
        if run.returncode:
            errors = [line for line in run.stdout.splitlines() if "error" in line] or run.stdout.splitlines()
            outcome[library] = "not built: " + (errors or [run.stderr.strip()])[0]
            (work / f"{library}.log").write_text(run.stdout + run.stderr)
            continue
        temporary = package / f"{library}.{os.getpid()}.tmp"
        shutil.copyfile(work / library, temporary)
        os.replace(temporary, package / library)  # atomic: two processes may build at once
        outcome[library] = "built"
    return outcome


if __name__ == "__main__":
    # With a folder as argument, builds there and leaves the package's own library alone (DNL_LIBRARY_DIR loads it).
    target = pathlib.Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    results = build(target, work=target / "objects" if len(sys.argv) > 1 else HERE.parent / "build")
    print("\n".join(f"{library}: {result}" for library, result in results.items()))
    sys.exit(any(result.startswith("not built") for result in results.values()))
