"""Several ranks with gloo against one process, on other numbers of ranks after a restart, and a worker that is killed
under torchrun.
"""

import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

import dnl_kernels
from dnl_kernels.experiments import cli, data, metrics, model, run
from dnl_kernels.experiments.config import Config
from dnl_kernels.experiments.ranks import Ranks

PACKAGE = str(pathlib.Path(dnl_kernels.__file__).parents[1])
KILLED = str(pathlib.Path(__file__).with_name("killed.py"))
# The last of the batches is smaller, and splits unevenly.
WORDS = "train --limit 45 --batch-size 16 --epochs 2 --repeats 1 --depths 2 --threads 1".split()
PLAIN = [*WORDS, "--order", "post"]  # no batch norm
TESTED = ("train_loss", "test_loss", "test_accuracy", "regularizer")


def results(out):
    return [{k: r[k] for k in TESTED if k in r} for r in metrics.read(out / metrics.NAME)[1]]


def assert_close(found, wanted):
    assert [set(r) for r in found] == [set(r) for r in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """45 images to train on and 7 to test with, in the files of Fashion-MNIST."""
    folder, random = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(1)
    for name, count in (("train", 45), ("t10k", 7)):
        pixels = torch.randint(256, (count, 8, 8), generator=random, dtype=torch.uint8).numpy().tobytes()
        labels = torch.randint(10, (count,), generator=random, dtype=torch.uint8).numpy().tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, count, 8, 8) + pixels)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)
    return folder


@pytest.mark.parametrize(
    "words", ["--parallel ddp --regularizer 1e-4", "--parallel fsdp", "--parallel fsdp --regularizer 1e-4"]
)
def test_two_processes_equal_one(words, images, together, contents, tmp_path):
    words = [*PLAIN, *words.split(), "--dataset", "fashion-mnist", "--data", str(images), "--evaluate"]
    log = tmp_path / "log"
    assert together(2, [*words, "--out", tmp_path / "two"], output=log) == [0, 0], log.read_text()
    assert log.read_text().count("figure:") == 1 and "2 ranks" in log.read_text()  # rank 0 alone speaks
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    assert_close(results(tmp_path / "two"), results(tmp_path / "one"))
    one, two = (contents(tmp_path / name / "L2-repeat0") for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    for name, state in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][name], state, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_batch_norm_normalises_by_the_share_of_each_rank(how, together, contents, tmp_path):
    """Against one process that runs the shares one after the other and averages gradients and running statistics."""
    assert together(2, [*WORDS, "--parallel", how, "--out", tmp_path / "two"]) == [0, 0]
    digits = data.load("digits", limit=45)
    torch.manual_seed(run.derive(0, 2, 0))
    ranks = [Ranks(torch.device("cpu"), rank, 2) for rank in range(2)]
    network = model.build(Config(limit=45), 2, digits)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    statistics = {n: [b.clone(), b.clone()] for n, b in network.named_buffers()}
    for epoch in (1, 2):
        for batch in run.batches(45, 16, run.derive(0, 0, epoch), ranks[0]):
            optimizer.zero_grad()
            for rank in ranks:
                for name, buffer in network.named_buffers():
                    buffer.copy_(statistics[name][rank.rank])
                x, labels = digits.batch(rank.share(batch))
                (nn.functional.cross_entropy(network(x), labels) * rank.weight(batch) / 2).backward()
                for name, buffer in network.named_buffers():
                    statistics[name][rank.rank].copy_(buffer)
            optimizer.step()
        for a, b in statistics.values():
            mean = (a + b) / 2 if a.is_floating_point() else a
            a.copy_(mean)
            b.copy_(mean)
    wanted = dict(network.named_parameters()) | {name: both[0] for name, both in statistics.items()}
    found = contents(tmp_path / "two" / "L2-repeat0")["model"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    assert cli.main([*PLAIN, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "before, after", [((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (1, "ddp")), ((2, "ddp"), (3, "ddp"))]
)
def test_a_run_continues_on_another_number_of_processes(before, after, one, together, tmp_path):
    for (size, how), epochs in ((before, 1), (after, 2)):
        words = [*PLAIN, "--epochs", epochs, "--parallel", how, "--resume", "--out", tmp_path / "out"]
        assert together(size, words) == [0] * size
    assert_close(results(tmp_path / "out"), results(one))
    assert metrics.read(tmp_path / "out" / metrics.NAME)[0]["ranks"] == after[0]


def test_a_loss_that_is_not_finite_stops_every_rank(together, tmp_path):
    codes = together(2, [*PLAIN, "--lr", "1e30", "--out", tmp_path / "out"], output=tmp_path / "log")
    assert 1 in codes and 0 not in codes
    assert "the loss became nan in step" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_nothing_is_lost(together, contents, tmp_path):
    """With batch norm, under torchrun itself."""
    start = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()
    command = [sys.executable, *start, KILLED, *WORDS, "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": PACKAGE}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "SIGKILL" in result.stderr or "-9" in result.stderr  # it was killed
    assert together(2, [*WORDS, "--out", tmp_path / "two"]) == [0, 0]
    assert results(tmp_path / "out") == results(tmp_path / "two")
    for name, value in contents(tmp_path / "two" / "L2-repeat0")["model"].items():
        assert torch.equal(contents(tmp_path / "out" / "L2-repeat0")["model"][name], value)


@pytest.mark.parametrize("count, size", [(16, 2), (7, 2), (8, 3), (5, 1)])
def test_shares_cover_a_batch_and_their_weighted_means_are_its_mean(count, size):
    batch, values = torch.randperm(count), torch.randn(count, dtype=torch.float64)
    ranks = [Ranks(torch.device("cpu"), rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([rank.share(batch) for rank in ranks]), batch)
    averaged = sum(values[rank.share(batch)].mean() * rank.weight(batch) for rank in ranks) / size
    torch.testing.assert_close(averaged, values.mean())
