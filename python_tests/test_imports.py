"""The import rules of CONTRIBUTING.md, proved on the source, and what an import pulls in, in fresh processes."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import dnl_kernels

PACKAGE = pathlib.Path(dnl_kernels.__file__).parent
# What a reference may use of the package: functions of tensors that themselves import torch only.
PLAIN = {"dnl_kernels.ops", "dnl_kernels._activations", "dnl_kernels._activations.activate"}
OPERATORS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "api.py").exists())
COMPOSITIONS = {  # the operators that are made of others, and of which
    "dnl_layer": {"dense_conv2d", "dense_linear", "nonlocal_attention"},
    "dnl_block": {"dnl_layer", "dense_conv2d", "dense_linear", "nonlocal_attention"},
}


def imported_modules(path):
    """Absolute names of what a file imports, wherever the statement stands: 'dnl_kernels.ops.x.api', 'torch'."""
    package = ("dnl_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_within(path, prefix):
    return {name for name in imported_modules(path) if name == prefix or name.startswith(prefix + ".")}


@pytest.mark.parametrize("op", OPERATORS)
def test_a_reference_imports_torch_and_other_references_only(op):
    allowed = {"torch", "__future__", "collections", "typing", "math", "functools", "dnl_kernels"}
    allowed_own = {f"dnl_kernels.ops.{other}" for other in {op} | COMPOSITIONS.get(op, set())}
    for name in imported_modules(PACKAGE / "ops" / op / "reference.py"):
        assert name.split(".")[0] in allowed, name
        if name.startswith("dnl_kernels.") and name not in PLAIN:
            assert any(name.startswith(own) for own in allowed_own), name


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_imports_another_only_if_it_is_composed_of_it(op):
    for path in (PACKAGE / "ops" / op).glob("*.py"):
        others = {name.split(".")[2] for name in imports_within(path, "dnl_kernels.ops") if name.count(".") >= 2}
        assert others & set(OPERATORS) <= {op} | COMPOSITIONS.get(op, set()), path


RULES = [  # files, what they must not import
    ("ops/**/*.py", ("dnl_kernels.nn", "dnl_kernels.theory", "dnl_kernels.experiments", "dnl_kernels.testing")),
    ("nn/*.py", ("dnl_kernels.theory", "dnl_kernels.experiments", "dnl_kernels.testing")),
    ("theory/*.py", ("dnl_kernels.experiments", "dnl_kernels.testing", "numpy", "scipy", "matplotlib")),
    ("experiments/*.py", ("dnl_kernels.testing",)),
    ("_[!_]*.py", ("dnl_kernels.ops", "dnl_kernels.nn", "dnl_kernels.testing", "numpy")),
    ("**/*.py", ("python_tests", "bench", "examples")),
]


@pytest.mark.parametrize("files, forbidden", RULES, ids=[r[0] for r in RULES])
def test_layers_import_downwards_only(files, forbidden):
    paths = list(PACKAGE.glob(files))
    assert paths
    for path in paths:
        for prefix in forbidden:
            assert not imports_within(path, prefix), (path, prefix)


def test_kernel_sources_include_common_and_themselves_only():
    csrc = PACKAGE.parent / "csrc"
    for path in [p for p in csrc.glob("*/*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]:
        allowed = {"common", path.parent.name} | ({"emulator"} if path.name == "device.cuh" else set())
        allowed |= {"nonlocal_attention"} if path.parent.name == "dnl_layer" else set()  # of which it is composed
        for line in path.read_text("utf-8").splitlines():
            if line.startswith('#include "'):
                assert line.split('"')[1].split("/")[0] in allowed, (path, line)


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("DNL_")} | environment
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules); import dnl_kernels, dnl_kernels.nn, dnl_kernels.theory;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    added = run(code)
    for name in ("triton", "matplotlib", "scipy", "sklearn", "rich", "torchvision"):
        assert f"'{name}'" not in added, added


def test_without_the_extension_the_reference_serves_every_call(tmp_path):
    """The library hidden and not allowed to be built: one log line, and the same numbers."""
    code = (
        "import sys, types, pathlib\n"
        f"package = types.ModuleType('dnl_kernels'); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['dnl_kernels'] = package\n"
        "import dnl_kernels._builder as builder; builder.HERE = pathlib.Path('absent')\n"
        "del sys.modules['dnl_kernels']\n"
        "import torch, dnl_kernels as dnl\n"
        "x = torch.randn(3, 4)\n"
        "assert torch.equal(dnl.dense_sum([x, x], torch.tensor([1.0, 2.0])), x + 2.0 * x)\n"
        "from dnl_kernels import info; print(info.backends()['cpu'])"
    )
    output = run(code, DNL_JIT="0", XDG_CACHE_HOME=str(tmp_path))
    assert output.count("DNL_JIT=0") == 2, output


@pytest.mark.parametrize("level", dnl_kernels._extension._C.isa_levels() if dnl_kernels._extension._C else [])
def test_the_environment_chooses_the_instruction_set(level):
    assert level in run("import dnl_kernels; print(dnl_kernels._extension._C.isa())", DNL_CPU_ISA=level)


def test_an_unknown_instruction_set_is_refused_with_the_list():
    code = "import dnl_kernels"
    env = {k: v for k, v in os.environ.items()} | {"DNL_CPU_ISA": "mmx"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "DNL_CPU_ISA is 'mmx'" in result.stderr and "generic" in result.stderr


def test_a_build_can_be_of_some_levels_only(monkeypatch):
    from dnl_kernels import _builder

    everything = _builder.isa_levels()
    monkeypatch.setenv("DNL_ISA_LEVELS", "generic")
    assert _builder.isa_levels() == {"generic": ""}
    monkeypatch.setenv("DNL_ISA_LEVELS", ";".join(everything))
    assert _builder.isa_levels() == everything
    for wrong in ("", "mmx", "generic;mmx"):
        monkeypatch.setenv("DNL_ISA_LEVELS", wrong)
        with pytest.raises(ValueError, match="DNL_ISA_LEVELS is .*; this kind of processor has generic"):
            _builder.isa_levels()


def test_no_kernel_object_shares_code_with_another_instruction_set():
    """A weak symbol outside dnl::<level> could be merged by the linker and run on a processor that lacks the level."""
    objects = list((PACKAGE.parent / "build").glob("*.cpu_kernel*.o"))
    if not objects:
        pytest.skip("the library was not built in this checkout")
    for path in objects:
        level = path.suffixes[-2].removeprefix(".")
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in symbols.splitlines():
            _, kind, name = line.split(" ", 2)
            if kind in "WVu" and f"dnl::{level}::" not in name:
                raise AssertionError(f"{path.name}: {name}")
