"""kill -9 at any moment, then --resume: the metrics and the weights are those of a run that was never stopped."""

import itertools
import os
import random
import signal
import time

import pytest
import torch

from dnl_kernels.experiments import metrics

WORDS = ["train", "--limit", "60", "--batch-size", "16", "--epochs", "2", "--repeats", "1", "--depths", "1", "2"]
WORDS += ["--threads", "1", "--resume"]
TIMES = ("seconds", "images_per_second", "share_of_matmul_rate")


@pytest.fixture
def run(start):
    def started(out, **options):
        return start([*WORDS, "--out", out], **options)

    return started


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start([*WORDS, "--out", out])
    process.join()
    assert process.exitcode == 0
    return out


def lines(out):
    header, *rest = (out / metrics.NAME).read_text().splitlines(keepends=True)
    records = metrics.read(out / metrics.NAME)[1]
    assert len(records) == len(rest) and all(line.endswith("\n") for line in rest)
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


@pytest.fixture
def assert_same(uninterrupted, contents):
    def check(out):
        assert lines(out) == lines(uninterrupted)
        for depth in (1, 2):
            a, b = (contents(folder / f"L{depth}-repeat0") for folder in (out, uninterrupted))
            assert a.keys() == {"model", "optimizer"}
            assert_equal(a, b)
        assert not list(out.rglob(".*partial"))

    return check


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_killed_wherever_it_touches_a_file(run, assert_same, tmp_path):
    """Processes are killed at their first, third, fifth ... file event; together they pass every event of the run."""
    killed_at = []
    for n in itertools.count(1, 2):
        process = run(tmp_path / "out", kill_at=n)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed_at.append(n)
    assert len(killed_at) >= 6
    assert_same(tmp_path / "out")


@pytest.mark.parametrize("first", (15,))
def test_one_kill_at_a_file_event(run, assert_same, tmp_path, first):
    process = run(tmp_path / "out", kill_at=first)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = run(tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "out")


def wait_for(path, process):
    while process.exitcode is None and not path.exists():
        time.sleep(0.01)


def test_killed_at_random_moments(run, assert_same, tmp_path):
    moments, out = random.Random(torch.initial_seed()), tmp_path / "out"
    for _ in range(3):
        process = run(out)
        wait_for(out / metrics.NAME, process)
        process.join(moments.uniform(0, 0.5))
        process.kill()
        process.join()
    process = run(out)
    process.join()
    assert process.exitcode == 0
    assert_same(out)


def test_ctrl_c(start, run, assert_same, tmp_path):
    """The signal itself, in the middle of a run; what is there then is taken over."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start([*WORDS, "--epochs", 1000, "--out", out], output=log)
    wait_for(out / "L1-repeat0" / "epoch-00001", process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "dnl train: interrupted; the same command with --resume continues" in log.read_text()
    assert "Traceback" not in log.read_text()
    process = run(out)
    process.join()
    assert process.exitcode == 0
    kept = lines(out)[-2:]
    assert [record["depth"] for record in kept] == [2, 2] and kept[0]["epoch"] == 1


def test_a_disk_that_is_full(start, run, assert_same, tmp_path):
    """The system refuses to write more than part of the second checkpoint."""
    out, log = tmp_path / "out", tmp_path / "log"
    for options in ({}, {"output": log, "largest": 100_000}):
        process = start([*WORDS, "--depths", 2, "--epochs", 1 + len(options) // 2, "--out", out], **options)
        process.join()
    assert process.exitcode == 1
    shown = log.read_text()
    assert "dnl train: cannot write" in shown and "last good checkpoint" in shown and "epoch-00001" in shown
    assert "Traceback" not in shown
    assert [path.name for path in (out / "L2-repeat0").iterdir()] == ["epoch-00001"]
    process = run(out)
    process.join()
    assert_same(out)
