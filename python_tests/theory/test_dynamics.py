"""Descent rules: each is the step it says, and only the Sobolev gradient has a limit as L grows."""

import pytest

from dnl_kernels import theory
from dnl_kernels.theory import dynamics


@pytest.fixture(scope="module")
def problem():
    return theory.problem_a(2)


def start_at(layers, seed=2):
    return theory.sample_pointwise(theory.ParameterCurves.random_smooth(1, seed), layers)


def partials(problem, parameters):
    final = theory.forward(parameters, problem.inputs, problem.phi).final
    return theory.adjoint(parameters, problem.inputs, problem.phi, (final - problem.targets) / len(final)).gradient


@pytest.mark.parametrize("rule", dynamics.RULES)
def test_one_step(problem, rule):
    """The first step against the adjoint's derivatives: absorbed is descent on W = tau K, written out here."""
    layers, rate = 5, 0.1
    start = start_at(layers)
    found = dynamics.descend(problem, start, rule, steps=1, rate=rate).parameters
    g = partials(problem, start)
    if rule == "absorbed":
        W = start.K / layers - rate * g.K * layers  # dJ/dW = dJ/dK / tau
        expected = {"A": start.A - rate * g.A, "K": W * layers}
    elif rule == "sobolev":
        h = theory.sobolev_gradient(start, g)
        expected = {"A": start.A - rate * h.A, "K": start.K - rate * h.K}
    else:
        one, two = (layers, layers**2) if rule == "l2" else (1, 1)
        expected = {"A": start.A - rate * one * g.A, "K": start.K - rate * two * g.K}
    for name, value in expected.items():
        assert (getattr(found, name) - value).abs().max() < 1e-13, name


def test_losses_are_those_of_the_iterates(problem):
    start = start_at(4)
    run = dynamics.descend(problem, start, "sobolev", steps=3, rate=0.5)
    assert run.losses[0] == pytest.approx(problem.data_loss(start).item(), rel=1e-14)
    again = dynamics.descend(
        problem, dynamics.descend(problem, start, "sobolev", steps=2, rate=0.5).parameters, "sobolev", steps=1
    )
    assert run.losses[2] == pytest.approx(again.losses[0], rel=1e-13)
    assert run.moved["A"] > 0
    assert run.losses[0] > run.losses[1] > run.losses[2]


def test_sobolev_curves_converge_in_depth(problem):
    """sup_it |loss_L - loss_2L| decreases, and the end state fits the data."""
    runs = {n: dynamics.descend(problem, start_at(n), "sobolev", steps=100).losses for n in (4, 8, 16, 32)}
    gaps = [max(abs(a - b) for a, b in zip(runs[n], runs[2 * n], strict=True)) for n in (4, 8, 16)]
    assert gaps[0] > 1.3 * gaps[1] > 1.6 * gaps[2]
    assert max(run[-1] for run in runs.values()) < 0.03


def test_explicit_descent_moves_less_and_less(problem):
    """Explicit K at a fixed rate: K's movement dies out with L, the last A's does not."""
    runs = {n: dynamics.descend(problem, start_at(n), "explicit", steps=60) for n in (4, 16)}
    assert runs[16].moved["K"] < 0.4 * runs[4].moved["K"]
    assert runs[16].others < 0.5 * runs[4].others
    assert runs[16].last_layer > 5 * runs[16].others


def test_bad_input_is_named(problem):
    for options, says in (({"rule": "adam"}, "rule must be one of"), ({"rule": "l2", "rate": 0.0}, "rate must be > 0")):
        with pytest.raises(ValueError, match=says):
            dynamics.descend(problem, start_at(2), **options)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        dynamics.descend(problem, start_at(2), "l2", steps=0)
