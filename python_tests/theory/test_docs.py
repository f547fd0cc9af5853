"""docs/theory: its tables are those of the committed records, and the records are what today's code computes."""

import json
import pathlib
import re

import pytest
import torch

from dnl_kernels import theory
from dnl_kernels.experiments import converge_report
from dnl_kernels.theory import dynamics, studies

TESTS = pathlib.Path(__file__).parent
FOLDER = TESTS.parents[1] / "docs" / "theory"
NAMES = ("forward", "regularizer", "constants", "learning-a", "learning-b", "limit-a-p2", "dynamics-a")


def record(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["results"]


def errors(name, table):
    (found,) = (t for result in record(name) for t in result["tables"] if t["name"] == table)
    return dict(zip(found["levels"], found["errors"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_the_record(name):
    text = (FOLDER / "measured.md").read_text()
    for result in record(name):
        for table in converge_report.tables(result):
            if name != "forward" or table.header[0].startswith("largest state"):
                assert converge_report.markdown(table) in text, table.header
    assert f"({name}.png)" in text
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def guide():
    """The rows of the guide's map: cells between bars that are not escaped."""
    text = (FOLDER / "README.md").read_text().split("## The map")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_guide_names_functions_and_tests_that_exist():
    rows = guide()
    assert len(rows) > 20
    for statement, _, functions, tests, figures, status in rows:
        assert status, statement
        for name in re.findall(r"`(\w+)`", functions):
            assert hasattr(theory, name), (statement, name)
        for file, test in re.findall(r"`(\w+\.py)::(\w+)`", tests):
            assert f"def {test}(" in (TESTS / file).read_text(), (statement, file, test)
        for figure in figures.split(", "):
            assert not figure or "(" in figure or list(FOLDER.glob(f"{figure}*.png")), (statement, figure)


def test_the_guide_has_the_rows_of_the_solvers():
    rows = json.loads((FOLDER / "solvers.json").read_text())["rows"]
    text = (FOLDER / "README.md").read_text()
    for row in rows:
        name, solver = row["equation"], row["solver"]
        assert f"| {name} | {solver} | {row['error']:.0e} | {row['milliseconds']:.1f} |" in text


def test_the_limit_is_current():
    (result,) = record("limit-a-p2")
    problem = theory.problem_a(2, "lifted")
    found = theory.minimize_continuous(problem, 6)
    first = result["continuous"][0]
    assert first["degree"] == 6
    assert found.value == pytest.approx(first["value"], rel=1e-9)
    certificate = theory.certify(problem, found)
    assert certificate.residual == pytest.approx(first["certificate"]["residual"], rel=1e-3)
    assert certificate.curvature == pytest.approx(first["certificate"]["curvature"], rel=1e-3)
    values = [row["value"] for row in result["continuous"]]
    assert values == sorted(values, reverse=True)
    assert values[-2] == pytest.approx(values[-1], rel=1e-10), "two resolutions agree"
    discrete = problem.minimize(4, restarts=0, start=theory.sample_pointwise(found.curves, 4))
    assert discrete.value == pytest.approx(result["values"]["x0 lifted"][0], rel=1e-8)


def test_forward_is_current():
    study = studies.forward_study(["local", "rbf"], ["tanh"], [64, 128])
    for table in study.tables:
        recorded = errors("forward", table.name)
        assert [recorded[64], recorded[128]] == pytest.approx(table.errors, rel=1e-6), table.name


def test_regularizer_and_constants_are_current():
    for table in studies.regularizer_study([2, 4], [8, 16]).tables:
        recorded = errors("regularizer", table.name)
        assert [recorded[8], recorded[16]] == pytest.approx(table.errors, rel=1e-9), table.name
    (recorded,) = record("constants")
    study = studies.constants_study([8, 16], trials=8)
    assert study.facts["observed_over_bound"].keys() == recorded["observed_over_bound"].keys()
    for name, ratio in study.facts["observed_over_bound"].items():
        assert ratio <= recorded["observed_over_bound"][name] * (1 + 1e-9) or name == "Corollary 5", name


@pytest.mark.parametrize(("name", "build"), [("learning-a", theory.problem_a), ("learning-b", theory.problem_b)])
def test_learning_is_current(name, build):
    """The coarsest level's best value is reached, up to the accuracy of the minimisation, from the recorded branch."""
    for result in record(name):
        p = float(result["problem"].split("p = ")[1].split(",")[0])
        row = result["rows"][0]
        first = result["problem"].rsplit(maxsplit=1)[1]
        starts = build(p=p, first=first).minimize(row["layers"], restarts=3, seed=1).starts
        known = [*row["branches"], *row.get("independent_starts", ())]
        assert all(any(abs(value - other) < 1e-9 for other in known) for value in starts)


def test_dynamics_are_current():
    (result,) = record("dynamics-a")
    problem = theory.problem_a(2)
    start = theory.sample_pointwise(theory.ParameterCurves.random_smooth(1, 2), 4)
    for rule in ("sobolev", "absorbed", "explicit"):
        run = dynamics.descend(problem, start, rule, steps=25)
        assert result["losses"][rule]["4"][:25] == pytest.approx(run.losses, rel=1e-5)
    assert torch.tensor(result["losses"]["sobolev"]["64"]).diff().max() < 0
