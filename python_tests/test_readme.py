"""The README's claims that can be held against the code."""

import pathlib
import re

from dnl_kernels import _backend
from dnl_kernels.ops.dense_conv2d import api as dense_conv2d
from dnl_kernels.ops.dense_sum import api as dense_sum
from dnl_kernels.ops.nonlocal_attention import api as attention

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STATUS = {"runs", "verified by emulation", "compiled only", "not planned"}


def status_table():
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| operator |"))
    header = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name.strip("`")] = dict(zip(header[1:], cells, strict=True))
    return rows


def test_the_status_table_lists_what_the_code_declares():
    table = status_table()
    assert set(table) == set(_backend.SUPPORTS)
    for op, cells in table.items():
        for backend, status in cells.items():
            assert status in STATUS, (op, backend, status)
            assert (status != "not planned") == (backend in _backend.SUPPORTS[op]), (op, backend, status)
            # No GPU has run any of this: only the backends of this machine may be said to run.
            assert status != "runs" or backend in ("reference", "cpu"), (op, backend)


def test_the_table_of_defaults_follows_the_order_and_the_limits():
    """Each operator once, and only backends that it has, the preferred one first."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (cpu) \| .* \|$", README, re.MULTILINE)
    assert {op for op, *_ in rows} == set(_backend.SUPPORTS) and len(rows) == len(_backend.SUPPORTS)
    for op, on_gpu, on_cpu in rows:
        named = [b for b in re.findall(r"\w+", on_gpu) if b in _backend.PREFERENCE]
        expected = [b for b in ("cuda", "triton") if b in _backend.SUPPORTS[op]]
        assert sorted(set(named), key=_backend.PREFERENCE.index)[: len(expected)] == expected, op
        assert on_cpu in _backend.SUPPORTS[op]
    assert "the first that can run it of " + ", ".join(_backend.PREFERENCE) in README
    for number in (dense_sum.CUDA_MAX_STATES, *dense_conv2d.CUDA_LIMITS.values(), attention.TRITON_WIDTH):
        assert re.search(rf"^\| `.*\b{number}\b", README, re.MULTILINE), number


def test_every_command_of_the_readme_is_a_make_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"^ +make ([a-z-]+)", README, re.MULTILINE):
        assert command in targets, command
