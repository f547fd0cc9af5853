"""`dnl train --cascade` and `dnl report --against`."""

import math

import pytest

from dnl_kernels.experiments import against, cli, metrics

WORDS = "--limit 60 --batch-size 20 --repeats 1 --threads 1 --growth-rate 2".split()
TIMES = ("seconds", "images_per_second", "share_of_matmul_rate")


def train(out, *words):
    return cli.main(["train", *WORDS, *map(str, words), "--out", str(out)])


def records(out):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(out / metrics.NAME)[1]]


def test_a_cascade_grows_and_resumes_to_the_bits(tmp_path, capsys):
    cascade = ["--cascade", 2, 4]
    assert train(tmp_path / "whole", *cascade, "--epochs", 3) == 0
    whole = records(tmp_path / "whole")
    assert [(r["depth"], r["layers"]) for r in whole] == [(4, 2), (4, 4), (4, 4)]
    assert whole[1]["flops"] > 1.5 * whole[0]["flops"]
    assert whole[1]["parameters"] > whole[0]["parameters"]
    for epochs in (1, 2, 3):  # stopped on each level
        words = ["--resume"] if epochs > 1 else []
        assert train(tmp_path / "parts", *cascade, "--epochs", epochs, *words) == 0
    assert records(tmp_path / "parts") == whole
    assert train(tmp_path / "direct", "--depths", 4, "--epochs", 1) == 0
    fresh = records(tmp_path / "direct")[0]["train_loss"]
    assert whole[1]["train_loss"] < fresh, "it goes on from where the shallow network was"
    capsys.readouterr()
    figure = tmp_path / "cascade.png"
    folders = [str(tmp_path / "direct"), str(tmp_path / "whole")]
    assert cli.main(["report", *folders, "--against", "seconds", "flops", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    says = "digits, cascade 2 4, L = 4 reaches the final training loss of digits, cascade none, L = 4 with seconds"
    assert says in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cascade", "2", "6"], "expected levels that double"),
        (["--cascade", "4"], "expected levels that double"),
        (["--cascade", "1", "2"], ">= 2"),
        (["--cascade", "2", "4", "--depths", "8"], "expected 4, where --cascade ends"),
        (["--cascade", "2", "4", "--compile"], "expected no --compile"),
    ],
)
def test_a_wrong_cascade_is_one_line(words, says, tmp_path, capsys):
    assert train(tmp_path / "a", *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def history(losses, seconds, flops):
    return [{"train_loss": loss, "seconds": seconds, "flops": flops, "layers": 4, "epoch": 1} for loss in losses]


def test_reach_by_hand():
    direct = [history([2.0, 1.0], 10.0, 100.0), history([2.0, 0.5], 10.0, 100.0)]
    other = [history([3.0, 1.5, 1.0, 0.9], 2.0, 30.0), history([2.0, 0.6, 0.4], 5.0, 30.0)]
    seconds = against.reach(direct, other, "seconds")
    assert seconds.shares == [6 / 20, 15 / 20]
    assert against.reach(direct, other, "flops").shares == [90 / 200, 90 / 200]
    assert "52% +- 32%" in seconds.words()
    missed = against.reach(direct, [history([3.0], 1.0, 1.0), other[1]], "seconds")
    assert missed.shares == [math.inf, 0.75]
    assert "not reached in 1 of 2" in missed.words()
    with pytest.raises(against.UsageError, match="no record of their flops"):
        against.reach(direct, [[{"train_loss": 1.0, "seconds": 1.0}]] * 2, "flops")
