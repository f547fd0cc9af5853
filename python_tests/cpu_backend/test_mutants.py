"""The mutation check of the CPU kernels: every mutant still fits the source, and there are enough of each operator."""

import collections
import importlib.util
import pathlib
import sys

import pytest

spec = importlib.util.spec_from_file_location("cpu_mutations", pathlib.Path(__file__).with_name("mutations.py"))
mutations = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = mutations
spec.loader.exec_module(mutations)
FILES = sorted({m.file for m in mutations.MUTATIONS})


@pytest.mark.parametrize("path", FILES)
def test_every_mutant_changes_one_place(path):
    text = (mutations.ROOT / path).read_text()
    broken = mutations.mutated(text, path)
    assert broken.count(mutations.SWITCH if path.endswith(".py") else "dnl_mutant") == len(
        [m for m in mutations.MUTATIONS if m.file == path]
    )
    if path.endswith(".py"):
        compile(broken, path, "exec")


def test_every_operator_and_every_kind_is_broken():
    assert len(mutations.MUTATIONS) >= 40 and all(m.old != m.new for m in mutations.MUTATIONS)
    operators = collections.Counter(m.file.split("/")[-2] for m in mutations.MUTATIONS)
    wanted = {"dnl_block", "nonlocal_attention", "dense_linear", "dense_sum", "dnl_layer", "norm_activation"}
    assert wanted | {"dense_conv2d", "dnl_bottleneck", "transition"} <= {*operators}
    kinds = {m.kind for m in mutations.MUTATIONS}
    assert {"tail", "piece", "term", "statistics", "window", "order", "zero", "little"} <= kinds


def test_every_selection_names_a_file_of_tests():
    for mutation in mutations.MUTATIONS:
        assert (mutations.ROOT / "python_tests" / "ops" / mutation.tests).is_file()
