"""kill -9 at any moment, then --resume: the metrics and the weights are those of a run that was never stopped."""

import itertools
import multiprocessing
import random
import signal
import sys
import time

import pytest
import torch

from dnl_kernels.experiments import checkpoint, metrics

sys.path.insert(0, __file__.rpartition("/")[0])
import killed  # noqa: E402

WORDS = ["train", "--limit", "60", "--batch-size", "16", "--epochs", "2", "--repeats", "1", "--depths", "1", "2"]
TIMES = ("seconds", "images_per_second", "share_of_matmul_rate")


@pytest.fixture(scope="module")
def start():
    """Starts commands in processes that have the imports done already and no threads yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["killed", "dnl_kernels.nn", "sklearn.datasets", "torch._dynamo", "matplotlib.pyplot", "rich.table"]
    )

    def started(out, *words, kill_at=None):
        arguments = [*WORDS, "--threads", "1", "--resume", "--out", str(out), *words]
        process = context.Process(target=killed.dnl, args=(arguments, kill_at))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(out)
    process.join()
    assert process.exitcode == 0
    return out


def lines(out):
    header, *rest = (out / metrics.NAME).read_text().splitlines(keepends=True)
    records = metrics.read(out / metrics.NAME)[1]
    assert len(records) == len(rest) and all(line.endswith("\n") for line in rest)
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def assert_same(out, whole):
    assert lines(out) == lines(whole)
    for depth in (1, 2):
        a, b = (checkpoint.latest(folder / f"L{depth}-repeat0", pytest.fail) for folder in (out, whole))
        for part in ("model", "optimizer"):
            assert_equal(a[part], b[part])
    assert not list(out.rglob(".*"))


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


def test_killed_wherever_it_touches_a_file(start, uninterrupted, tmp_path):
    """The n-th process is killed at its n-th file event; together they pass every event of the run."""
    killed_at = []
    for n in itertools.count(1):
        process = start(tmp_path / "out", kill_at=n)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed_at.append(n)
    assert len(killed_at) >= 6
    assert_same(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("first", (2, 15, 27))
def test_one_kill_at_a_file_event(start, uninterrupted, tmp_path, first):
    process = start(tmp_path / "out", kill_at=first)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start(tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "out", uninterrupted)


def test_killed_at_random_moments(start, uninterrupted, tmp_path):
    moments, out = random.Random(torch.initial_seed()), tmp_path / "out"
    for _ in range(6):
        process = start(out)
        while process.exitcode is None and not (out / metrics.NAME).exists():
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.5))
        process.kill()
        process.join()
    process = start(out)
    process.join()
    assert process.exitcode == 0
    assert_same(out, uninterrupted)
