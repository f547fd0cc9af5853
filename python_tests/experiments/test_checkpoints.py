"""Checkpoints and the metrics file: whole or absent, whatever happens while they are written."""

import errno
import json
import os

import pytest
import torch

from dnl_kernels.experiments import checkpoint, metrics
from dnl_kernels.experiments.errors import Stopped, UsageError


def state(epoch):
    return {"epoch": epoch, "model": {"weight": torch.full((3, 5), float(epoch))}, "history": [{"loss": 0.5}] * epoch}


@pytest.fixture
def said():
    return []


def test_what_was_saved_is_loaded(tmp_path, said):
    checkpoint.save(tmp_path / "new" / "folder", 1, state(1))
    found = checkpoint.latest(tmp_path / "new" / "folder", said.append)
    assert torch.equal(found.pop("model")["weight"], state(1)["model"]["weight"])
    assert found == {"epoch": 1, "history": [{"loss": 0.5}]} and not said


def test_nothing_saved_is_none(tmp_path, said):
    assert checkpoint.latest(tmp_path / "absent", said.append) is None and not said


def test_the_two_newest_are_kept(tmp_path):
    for epoch in (1, 2, 9, 10):
        checkpoint.save(tmp_path, epoch, state(epoch))
    assert [path.name for path in checkpoint.stored(tmp_path)] == ["epoch-00010.pt", "epoch-00009.pt"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_one_bit(path):
    """In the weights, where torch.load would not notice."""
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((3, 5), 2.0).numpy().tobytes())
    content[place + 7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_one_bit])
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(tmp_path, said, damage):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, state(epoch))
    damage(tmp_path / "epoch-00002.pt")
    assert checkpoint.latest(tmp_path, said.append)["epoch"] == 1
    assert len(said) == 1 and "epoch-00002.pt is damaged" in said[0] and "\n" not in said[0]


def test_all_damaged_is_none(tmp_path, said):
    checkpoint.save(tmp_path, 2, state(2))
    flip_one_bit(tmp_path / "epoch-00002.pt")
    assert checkpoint.latest(tmp_path, said.append) is None and len(said) == 1


def test_a_full_disk_stops_and_leaves_the_last_one(tmp_path, said, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stopped, match=r"epoch-00002.pt \(No space left on device\); last good .*epoch-00001.pt"):
        checkpoint.save(tmp_path, 2, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001.pt"]
    assert checkpoint.latest(tmp_path, said.append)["epoch"] == 1


def test_a_half_written_one_is_never_seen(tmp_path, said):
    """What a kill in the middle of a write leaves."""
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / ".epoch-00002.pt.partial").write_bytes(b"half")
    assert checkpoint.latest(tmp_path, said.append)["epoch"] == 1 and not said
    checkpoint.save(tmp_path, 2, state(2))
    assert checkpoint.latest(tmp_path, said.append)["epoch"] == 2
    assert not list(tmp_path.glob(".*"))


def record(depth, repeat, epoch):
    return {"depth": depth, "repeat": repeat, "epoch": epoch, "train_loss": 1 / 3}


def test_metrics_round_trip_in_order(tmp_path):
    path = tmp_path / metrics.NAME
    metrics.rewrite(path, {"seed": 7}, [record(2, 0, 1), record(1, 1, 1), record(1, 0, 1)])
    metrics.append(path, record(1, 0, 2))
    header, records = metrics.read(path)
    assert header == {"seed": 7}
    assert records == [record(1, 0, 1), record(1, 1, 1), record(2, 0, 1), record(1, 0, 2)]
    assert json.loads(path.read_text().splitlines()[0]) == {"seed": 7}


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = tmp_path / metrics.NAME
    metrics.rewrite(path, {}, [record(1, 0, 1)])
    with path.open("a") as file:
        file.write(metrics.line(record(1, 0, 2))[:-8])
    assert metrics.read(path)[1] == [record(1, 0, 1)]


@pytest.mark.parametrize("content", ["", "not json\n", "\xff\n"])
def test_what_is_no_metrics_file_is_refused(tmp_path, content):
    path = tmp_path / metrics.NAME
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="is not a metrics file of dnl train"):
        metrics.read(path)
