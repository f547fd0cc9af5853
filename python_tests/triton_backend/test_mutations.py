"""The mutation check itself: every mutation still fits the source, one is caught, and a harmless one survives."""

import importlib.util
import pathlib

import pytest

spec = importlib.util.spec_from_file_location("mutations", pathlib.Path(__file__).with_name("mutations.py"))
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)
ALL = [(operator, m) for operator, found in mutations.MUTATIONS.items() for m in found]


@pytest.mark.parametrize("operator, mutation", ALL, ids=[f"{operator}-{m.kind}-{m.new[:40]}" for operator, m in ALL])
def test_a_mutation_changes_one_place_and_still_parses(operator, mutation):
    text = mutations.source(operator, mutation).read_text()
    assert text.count(mutation.old) == 1 and mutation.old != mutation.new
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")


@pytest.mark.slow
def test_a_broken_kernel_is_caught_and_a_sound_one_is_not():
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    mask = mutations.MUTATIONS["dense_sum"][0]._replace(tests="several")
    assert mutations.survives("dense_sum", mask) is None
    harmless = mask._replace(new=mask.old + "  # the same")
    assert "the tests passed" in mutations.survives("dense_sum", harmless)
