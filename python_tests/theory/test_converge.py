"""`dnl converge` from its command line: files, numbers, progress and one-line errors."""

import argparse
import functools
import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="dnl converge draws figures: pip install 'dnl_kernels[experiments]'")
pytest.importorskip("rich", reason="dnl converge prints tables: pip install 'dnl_kernels[experiments]'")

from dnl_kernels.experiments import cli, converge  # noqa: E402


def call(*arguments, out):
    return cli.main(["converge", *map(str, arguments), "--out", str(out)])


def result(out, name):
    record = json.loads((out / f"{name}.json").read_text())
    png = (out / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000
    return record


def test_forward(tmp_path, capsys):
    levels = ["--levels", 16, 32, 64]
    assert call("forward", "--kernel", "local", "rbf", "--sigma", "tanh", *levels, out=tmp_path) == 0
    record = result(tmp_path, "forward")
    (study,) = record["results"]
    tables = {table["name"]: table for table in study["tables"]}
    assert len(tables) == 2 * 3
    for name, table in tables.items():
        assert table["levels"] == [16, 32, 64]
        assert table["orders"][-1] == pytest.approx(table["expected_order"], abs=0.1), name
    assert max(study["reference_against_extrapolation"].values()) < 1e-8
    printed = capsys.readouterr().out
    assert "local tanh, euler" in printed
    assert "forward.json" in printed


def test_regularizer_and_constants(tmp_path, monkeypatch):
    assert call("regularizer", "--levels", 8, 16, 32, "--p", 4, out=tmp_path) == 0
    (study,) = result(tmp_path, "regularizer")["results"]
    assert study["averages_below_limit"] == {"p = 4": True}
    assert len(study["tables"]) == 2
    few = functools.partial(converge.studies.constants_study, trials=12)
    monkeypatch.setattr(converge.studies, "constants_study", few)
    assert call("constants", "--levels", 8, 16, out=tmp_path) == 0
    (study,) = result(tmp_path, "constants")["results"]
    assert all(0 < ratio <= 1 + 1e-12 for ratio in study["observed_over_bound"].values())


def test_learning_and_dynamics(tmp_path):
    options = ["--levels", 2, 3, 4, "--p", 2, "--first", "lifted", "--restarts", 1]
    assert call("learning", *options, out=tmp_path) == 0
    (study,) = result(tmp_path, "learning-a")["results"]
    assert [row["layers"] for row in study["rows"]] == [2, 3, 4]
    assert all(row["independent_starts_agree"] for row in study["rows"])
    assert call("dynamics", "--levels", 2, 4, 8, "--rule", "sobolev", "--steps", 5, out=tmp_path) == 0
    (study,) = result(tmp_path, "dynamics-a")["results"]
    assert len(study["losses"]["sobolev"]["8"]) == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["everything"], "invalid choice"),
        (["forward", "--levels", "64"], "at least 2 increasing"),
        (["forward", "--levels", "64", "64"], "at least 2 increasing"),
        (["forward", "--levels", "0", "64"], ">= 1"),
        (["forward", "--levels", "64", "100"], "multiples of the first"),
        (["forward", "--levels", "many"], "invalid int"),
        (["forward", "--sigma", "gelu"], "invalid choice"),
        (["forward", "--steps", "3"], "does not read --steps"),
        (["learning", "--kernel", "rbf"], "does not read --kernel"),
        (["learning", "--levels", "4", "8"], "at least 3"),
        (["learning", "--p", "1.5"], "--p must be >= 2"),
        (["learning", "--restarts", "0"], "--restarts must be >= 1"),
        (["dynamics", "--rule", "adam"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    assert call(*arguments, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("dnl converge: ")
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def breaks(temporary: pathlib.Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        converge._write(path, breaks)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"
    converge._write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("regularizer", "--levels", 2, 4, out=tmp_path / "file") == 1
    assert "cannot write to" in capsys.readouterr().err


def test_every_option_is_read_by_some_study():
    parser = argparse.ArgumentParser()
    converge.add_arguments(parser)
    names = {action.dest for action in parser._actions} - {"help", "study", "out", "levels", "seed"}
    assert names == set().union(*converge.READS.values())
    assert set(converge.READS) == set(converge.STUDIES) == set(converge.LEVELS)


def test_importing_the_theory_is_light():
    code = "import sys, dnl_kernels.theory; print([m for m in ('scipy', 'matplotlib', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
