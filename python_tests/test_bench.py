"""What the benchmark suite says of its measurements: bench/report.py and bench/compare.py on made-up results."""

import copy
import json
import math

import pytest
import torch

from bench import compare, comparison, report, results
from bench.comparison import DRAWS, Case, Way, measure
from bench.harness import quantiles
from bench.test_scaling import exponent


def row(**changes):
    """Ours 2 ms, eager 3 ms, compiled 1 ms; the check passed."""

    def way(seconds, error):
        times = {phase: quantiles([seconds]) for phase in ("forward", "backward", "both")}
        return {**times, "first_call_s": 0.5, "error": error, "saved_bytes": 2**20, "peak_bytes": 2**21}

    base = {
        "operator": "dense_sum", "case": "odd", "train": True, "device": "cpu", "dtype": "float32", "threads": 2,
        "check": {"passed": True, "share": 0.1},
        "flops": {"forward": 2e6, "backward": 4e6}, "bytes": {"forward": 1e6}, "bars": {"eager": 2.0, "compile": 0.4},
        "absent": {"keops": "pykeops is not installed"},
        "ways": {"ours": way(2e-3, 1e-7), "eager": way(3e-3, 1e-7), "compile": way(1e-3, 2e-7)},
    }  # fmt: skip
    return {**base, **changes}


def result(path, *rows):
    machine = {"dnl": {"versions": {"torch": "2"}, "ceilings": {"fma_gflops": 100.0, "copy_gb_per_s": 10.0}}}
    benchmarks = [{"extra_info": one} for one in rows]
    path.write_text(json.dumps({"machine_info": machine, "commit_info": {"id": "abc"}, "benchmarks": benchmarks}))
    return str(path)


def slower(one, factor):
    found = copy.deepcopy(one)
    for phase in ("forward", "backward", "both"):
        found["ways"]["ours"][phase] = {k: v * factor for k, v in found["ways"]["ours"][phase].items()}
    return found


def test_the_report_shows_winners_losers_bars_and_absent_peers(tmp_path):
    report.main([result(tmp_path / "r.json", row()), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "0.50 (compile)" in text  # the strongest peer wins, and that is shown
    assert "eager 2: missed, compile 0.4: met" in text
    assert "pykeops is not installed" in text and "commit abc" in text
    assert "3%" in text  # 6e6 FLOP in 2 ms are 3 of 100 GFLOP/s
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "speed.png", "memory.png"}


def test_the_ceiling_beside_a_row_is_the_one_that_counts():
    assert report.rates(row(), "both", {"fma_gflops": 100.0})[2] == "3%"
    assert report.rates(row(fma_gflops=50.0), "both", {"fma_gflops": 100.0})[2] == "6%"


@pytest.mark.parametrize(
    "rates, attempts, kept",
    [([100, 95], 1, 0), ([100, 50, 90, 91], 2, 1), ([100, 50, 60, 70, 80, 40], 3, 1), ([50, 50], 1, 0)],
)
def test_what_a_busy_machine_timed_is_timed_again(monkeypatch, rates, attempts, kept):
    """By the rate of multiply-adds before and after, never by the times; of three that with the best rate is kept."""
    given, timings = iter(rates), iter(range(attempts))
    monkeypatch.setattr(comparison, "_best_rate", [0.0])
    monkeypatch.setattr(comparison.harness, "fma_ceiling", lambda: next(given) * 1e9)
    monkeypatch.setattr(comparison.harness, "interleave", lambda *_, **__: {"ours": [float(next(timings))]})
    rate, times = comparison._quiet_times({"ours": {"forward": None}}, ("forward",), 1.0, None)
    assert times == {"forward": {"ours": [float(kept)]}} and rate == min(rates[2 * kept : 2 * kept + 2])
    assert next(timings, None) is None


def test_floors_on_gpus_are_of_bytes_or_of_flops():
    rows = [row(), row(case="heavy", flops={"forward": 7.12e10, "backward": 0.0}), row(case="half", dtype="bfloat16")]
    bound, heavy, half = (line.split(" | ")[-3:] for line in report.floor_table(rows).splitlines()[2:])
    assert bound == half == ["1.1", "0.6", "0.3 |"]  # 1 MB at 936, 1555 and 3350 GB/s
    assert heavy[0] == "2000.0"  # 71.2 GFLOP at 35.6 TFLOP/s
    uncounted = row(flops={"forward": 0.0, "backward": 0.0})
    assert len(report.floor_table([uncounted]).splitlines()) == 2


def test_no_speed_up_is_printed_for_a_result_that_is_wrong(tmp_path):
    wrong = row(check={"passed": False, "share": 1e5})
    report.main([result(tmp_path / "r.json", wrong), "--out", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "check failed" in text and "(compile)" not in text and ": missed" not in text and ": met" not in text


def test_a_peer_that_computes_something_else_is_no_rival():
    other = row()
    other["ways"]["compile"]["error"] = 0.3
    assert results.strongest(other, "both") == "eager"
    other["ways"]["eager"]["error"] = None
    assert results.strongest(other, "both") is None


def test_compare_finds_a_regression_beyond_noise_and_only_that(tmp_path, capsys):
    old = result(tmp_path / "old.json", row(), row(case="tiny"))
    assert compare.main([old, old]) == 0
    assert "no regression in 2 cases" in capsys.readouterr().out
    assert compare.main([old, result(tmp_path / "a.json", slower(row(), 1.05), row(case="tiny"))]) == 0
    assert compare.main([old, result(tmp_path / "b.json", slower(row(), 1.5), row(case="tiny"))]) == 1
    assert "dense_sum odd both: 1.50x of its peer before, 1.00x now" in capsys.readouterr().out
    noisy = slower(row(), 1.5)
    for phase in results.phases(noisy):
        noisy["ways"]["ours"][phase]["p20"] = 1e-3
    assert compare.main([old, result(tmp_path / "c.json", noisy)]) == 0
    wrong = row(check={"passed": False, "share": 1e5})
    assert compare.main([old, result(tmp_path / "d.json", wrong)]) == 1


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for path in ("x.json", "absent.json"):
        with pytest.raises(SystemExit, match=f"{path} is not a result"):
            results.load([tmp_path / path])
    with pytest.raises(SystemExit, match="no benchmark"):
        report.main([result(tmp_path / "empty.json"), "--out", str(tmp_path)])


def test_the_exponent_is_a_slope_of_logarithms():
    values = (4, 8, 16, 32)
    assert math.isclose(exponent(values, [3.0 * v**1.5 for v in values]), 1.5)


@pytest.mark.parametrize(
    "gradient, output, until, passed, draw",
    [(0.0, 0.0, 0, True, 1), (0.01, 0.0, 1, True, 2), (0.01, 0.0, DRAWS, False, DRAWS), (0.01, 0.1, 1, False, 1),
     (2e-5, 0.0, DRAWS, False, DRAWS), (0.0, 2e-5, 1, False, 1)],
)  # fmt: skip
def test_only_gradients_that_are_off_in_some_draws_are_drawn_again(gradient, output, until, passed, draw):
    """ReLU's kink; a wrong output, or gradients that are wrong in every draw, are a wrong kernel's."""
    x = torch.randn(8).requires_grad_()
    exact, draws = x.detach().double().requires_grad_(), [0]

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return 2 * t + output

        @staticmethod
        def backward(ctx, g):
            return 2 * g * (1 + gradient * (draws[0] < until))

    @torch.no_grad()
    def redraw():
        draws[0] += 1
        exact.copy_(x.normal_())

    ways = {"ours": Way(lambda: Double.apply(x), [x]), "eager": Way(lambda: 2 * x, [x])}
    found = measure(Case("double", "case", ways, Way(lambda: 2 * exact, [exact]), redraw=redraw), seconds=0.01)
    assert (found["check"]["passed"], found["check"]["draw"]) == (passed, draw)
