"""`dnl report`: the numbers of the table, the statement, the merging of folders, and the figure."""

import math

import pytest

from dnl_kernels.experiments import cli, metrics, report
from dnl_kernels.experiments.errors import UsageError

CONFIG = {"dataset": "digits", "depths": [1, 2], "order": "pre", "lr": 0.01, "seed": 0}


def store(folder, finals, *, seed=0, epochs=3, repeats_from=0, **config):
    """A sweep whose runs end at finals[depth][repeat], from three times that, in equal ratios."""
    records = [
        {
            "depth": depth,
            "repeat": repeat,
            "epoch": epoch,
            "train_loss": final * 3 ** (1 - epoch / epochs),
            "parameters": 100 * depth,
            "images_per_second": 1000.0 * epoch,
            "share_of_matmul_rate": 0.1 * epoch,
        }
        for depth, losses in finals.items()
        for repeat, final in enumerate(losses, repeats_from)
        for epoch in range(1, epochs + 1)
    ]
    folder.mkdir()
    metrics.rewrite(folder / metrics.NAME, {"config": CONFIG | config | {"seed": seed}, "seed": seed}, records)
    return folder


def only(groups):
    (group,) = groups.values()
    return group


def test_mean_and_standard_error_by_hand(tmp_path):
    group = only(report.collect([store(tmp_path / "a", {1: [0.3, 0.5, 0.7], 2: [0.2, 0.2, 0.2]})]))
    assert group[1].mean()[-1] == pytest.approx(0.5)
    assert group[1].error() == pytest.approx(math.sqrt(((0.2**2 + 0.2**2) / 2) / 3))
    assert (group[2].error(), group[2].parameters) == (pytest.approx(0), 200)
    assert (group[2].rate, group[2].share) == (2000, 0.2)


def test_a_single_repeat_has_no_error(tmp_path):
    group = only(report.collect([store(tmp_path / "a", {1: [0.3], 2: [0.1]})]))
    assert math.isnan(group[1].error()) and "1 to 2: x 0.333 (one repeat)" in report.statement(group)


def test_depths_compare_over_the_epochs_that_all_repeats_have(tmp_path):
    store(tmp_path / "a", {1: [0.3, 0.5]})
    header, records = metrics.read(tmp_path / "a" / metrics.NAME)
    metrics.rewrite(tmp_path / "a" / metrics.NAME, header, records[:-1])
    assert only(report.collect([tmp_path / "a"]))[1].epochs == 2


@pytest.mark.parametrize(
    "finals, words",
    [
        ({1: [0.50, 0.51, 0.52], 2: [0.25, 0.26, 0.27]}, ["decreases with L at every step: 1 to 2: x 0.51 (p = "]),
        ({1: [0.1, 0.9], 2: [0.1, 0.8]}, ["decreases with L at every step", "(not clear, p = "]),
        (
            {1: [0.4, 0.5], 2: [0.2, 0.3], 4: [0.3, 0.45]},
            ["does not decrease with L at every step (1 of 2 do)", "2 to 4: x 1.5"],
        ),
        ({1: [0.5]}, ["One depth only"]),
    ],
    ids=["clear", "unclear", "up", "single"],
)
def test_statement(tmp_path, finals, words):
    text = report.statement(only(report.collect([store(tmp_path / "a", finals)])))
    assert all(part in text for part in words)


def test_unequal_epochs_are_not_compared(tmp_path):
    store(tmp_path / "a", {1: [0.3]}, epochs=2)
    store(tmp_path / "b", {2: [0.2]}, epochs=3)
    assert "not compared" in report.statement(only(report.collect([tmp_path / "a", tmp_path / "b"])))


def test_folders_of_equal_settings_merge_and_a_run_counts_once(tmp_path):
    """Repeats of another seed are further repeats; the same run found twice is one run."""
    a = store(tmp_path / "a", {1: [0.3, 0.5]})
    b = store(tmp_path / "b", {1: [0.7]}, repeats_from=2)
    c = store(tmp_path / "c", {1: [0.9]}, seed=1)
    again = store(tmp_path / "again", {1: [0.3]})
    group = only(report.collect([a, b, c, again]))
    assert sorted(run[-1] for run in group[1].losses) == pytest.approx([0.3, 0.5, 0.7, 0.9])


def test_folders_of_other_settings_are_variants(tmp_path):
    a = store(tmp_path / "a", {1: [0.3]})
    b = store(tmp_path / "b", {1: [0.5]}, order="post")
    groups = report.collect([a, b])
    assert list(groups) == ["digits, order pre", "digits, order post"]
    assert [group[1].mean()[-1] for group in groups.values()] == pytest.approx([0.3, 0.5])


def test_the_command_draws_and_prints(tmp_path, capsys):
    a = store(tmp_path / "a", {1: [0.31, 0.5], 2: [0.2, 0.1]})
    b = store(tmp_path / "b", {1: [0.5, 0.6], 2: [0.2, 0.3]}, order="post")
    figure = tmp_path / "new" / "figure.png"
    assert cli.main(["report", str(a), str(b), "--figure", str(figure)]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("order post", "0.405", "standard error", str(figure)))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_every_depth_with_its_band(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    groups = report.collect([store(tmp_path / "a", {1: [0.31, 0.5], 2: [0.2, 0.1]})])
    report.draw(groups, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "epoch" and "loss" in axes.get_ylabel() and axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["L = 1", "L = 2"]
    for line, band, curve in zip(axes.lines, axes.collections, only(groups).values(), strict=True):
        assert list(line.get_ydata()) == curve.mean()
        heights = [y for x, y in band.get_paths()[0].vertices if x == 3]
        assert max(heights) == pytest.approx(curve.mean()[-1] + curve.spread()[-1])


def test_an_empty_sweep_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no epoch is finished"):
        report.collect([store(tmp_path / "a", {})])
