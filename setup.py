"""Packages the Python tree and the C++ sources, and runs the one builder (dnl_kernels/_builder.py).

The installation never fails for want of torch, a compiler, nvcc or a GPU: what cannot be built is said in one line,
and the package falls back (compiled at first import, or the reference backend).
"""

import importlib.util
import pathlib
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
_spec = importlib.util.spec_from_file_location("_builder", ROOT / "dnl_kernels" / "_builder.py")
builder = importlib.util.module_from_spec(_spec)
sys.modules["_builder"] = builder
_spec.loader.exec_module(builder)


class Build(build_ext):
    def run(self):
        package = ROOT / "dnl_kernels" if self.inplace else pathlib.Path(self.build_lib, "dnl_kernels").resolve()
        if not self.inplace:  # build/lib outlives a build: what an earlier one left must not get into this wheel
            for stale in [*package.glob("_C*.so"), *package.glob("_cuda.so")]:
                stale.unlink()
        for library, outcome in builder.build(package, work=ROOT / "build").items():
            print(f"dnl_kernels: {library}: {outcome}", file=sys.stderr)

    def get_outputs(self):
        return []


csrc = {"dnl_kernels.csrc": "csrc"} | {
    f"dnl_kernels.csrc.{d.name}": f"csrc/{d.name}" for d in (ROOT / "csrc").iterdir() if d.is_dir()
}
setup(
    packages=find_packages(include=["dnl_kernels", "dnl_kernels.*"]) + list(csrc),
    package_dir=csrc,
    # The sources travel with the wheel, so that it can compile itself at first import where it could not before.
    package_data={"dnl_kernels": ["py.typed"], "dnl_kernels.experiments": ["configs/*.toml"]}
    | {name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in csrc},
    ext_modules=[Extension("dnl_kernels._C", [])],
    cmdclass={"build_ext": Build},
)
