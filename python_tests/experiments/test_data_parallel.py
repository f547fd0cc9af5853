"""`torchrun ... -m dnl_kernels.experiments train`: two processes with gloo against one, and a worker that is killed."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import dnl_kernels
from dnl_kernels.experiments import checkpoint, cli, metrics
from dnl_kernels.experiments.ranks import Ranks

PACKAGE = str(pathlib.Path(dnl_kernels.__file__).parents[1])
KILLED = str(pathlib.Path(__file__).with_name("killed.py"))
WORDS = "train --limit 45 --batch-size 16 --epochs 2 --repeats 1 --depths 2 --threads 1".split()
PLAIN = [*WORDS, "--order", "post"]  # no batch norm


def torchrun(out, words, *program, restarts=0):
    start = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {restarts}".split()
    command = [sys.executable, *start, *program, *words, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": PACKAGE}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(out):
    return [record["train_loss"] for record in metrics.read(out / metrics.NAME)[1]]


def weights(out):
    return checkpoint.latest(out / "L2-repeat0", pytest.fail)["model"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    shown = torchrun(out, PLAIN, "-m", "dnl_kernels.experiments")
    assert shown.count("figure:") == 1 and "2 ranks" in shown  # rank 0 alone speaks
    return out


def test_two_processes_equal_one(two, tmp_path):
    """The last of the batches is smaller, and splits unevenly."""
    assert cli.main([*PLAIN, "--out", str(tmp_path / "one")]) == 0
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes(two, tmp_path):
    out = tmp_path / "out"
    assert cli.main([*PLAIN, "--epochs", "1", "--out", str(out)]) == 0
    torchrun(out, [*PLAIN, "--resume"], "-m", "dnl_kernels.experiments")
    assert losses(out) == pytest.approx(losses(two), rel=1e-5)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_nothing_is_lost(two, tmp_path):
    torchrun(tmp_path / "out", PLAIN, KILLED, restarts=1)
    assert losses(tmp_path / "out") == losses(two)
    for name, value in weights(two).items():
        assert torch.equal(weights(tmp_path / "out")[name], value)


@pytest.mark.parametrize("count, size", [(16, 2), (7, 2), (8, 3), (5, 1)])
def test_shares_cover_a_batch_and_their_weighted_means_are_its_mean(count, size):
    batch, values = torch.randperm(count), torch.randn(count, dtype=torch.float64)
    ranks = [Ranks(torch.device("cpu"), rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([rank.share(batch) for rank in ranks]), batch)
    averaged = sum(values[rank.share(batch)].mean() * rank.weight(batch) for rank in ranks) / size
    torch.testing.assert_close(averaged, values.mean())
