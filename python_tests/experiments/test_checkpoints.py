"""Checkpoints and the metrics file: whole or absent, whatever happens while they are written."""

import errno
import json
import os
import pathlib
import subprocess

import pytest
import torch

from dnl_kernels.experiments import checkpoint, metrics
from dnl_kernels.experiments.errors import Stopped, UsageError
from dnl_kernels.experiments.ranks import Ranks

ALONE = Ranks(torch.device("cpu"))


def save(folder, epoch):
    tensors = {"model": {"weight": torch.full((3, 5), float(epoch))}}
    checkpoint.save(folder, epoch, tensors, {"history": [{"loss": 1 / 3}] * epoch}, ALONE)


def latest_epoch(folder, say):
    """The history and the weights of the newest whole checkpoint agree on its epoch."""
    found = checkpoint.latest(folder, say)
    tensors = {"model": {"weight": torch.zeros(3, 5)}}
    checkpoint.load(found.path, tensors, ALONE)
    epoch = len(found.facts["history"])
    assert torch.equal(tensors["model"]["weight"], torch.full((3, 5), float(epoch)))
    return epoch


@pytest.fixture
def said():
    return []


def test_what_was_saved_is_loaded(tmp_path, said):
    save(tmp_path / "new" / "folder", 1)
    assert checkpoint.latest(tmp_path / "new" / "folder", said.append).facts == {"history": [{"loss": 1 / 3}]}
    assert latest_epoch(tmp_path / "new" / "folder", said.append) == 1 and not said


def test_nothing_saved_is_none(tmp_path, said):
    assert checkpoint.latest(tmp_path / "absent", said.append) is None and not said


def test_the_two_newest_are_kept(tmp_path):
    for epoch in (1, 2, 9, 10):
        save(tmp_path, epoch)
    assert [path.name for path in checkpoint.stored(tmp_path)] == ["epoch-00010", "epoch-00009"]
    assert not list(tmp_path.glob(".*"))


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    save(tmp_path, 1)
    names = {path.name for path in (tmp_path / "epoch-00001").iterdir()}
    checked = subprocess.run(
        ["sha256sum", "--check", checkpoint.SUMS],
        cwd=tmp_path / "epoch-00001",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(names) - 1 == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_one_bit(path):
    """In the weights, where torch.load would not notice; elsewhere in the middle."""
    content = bytearray(path.read_bytes())
    place = content.find(torch.full((3, 5), 2.0).numpy().tobytes())
    content[place + 7 if place >= 0 else len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, empty, flip_one_bit, pathlib.Path.unlink]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(tmp_path, said, damage, name):
    for epoch in (1, 2):
        save(tmp_path, epoch)
    damage(tmp_path / "epoch-00002" / name)
    assert latest_epoch(tmp_path, said.append) == 1
    assert len(said) == 1 and "epoch-00002 is damaged" in said[0] and "\n" not in said[0]
    save(tmp_path, 2)  # the epoch trained anew takes its place
    assert latest_epoch(tmp_path, said.append) == 2 and len(said) == 1


def test_all_damaged_is_none(tmp_path, said):
    save(tmp_path, 2)
    flip_one_bit(tmp_path / "epoch-00002" / "__0_0.distcp")
    assert checkpoint.latest(tmp_path, said.append) is None and len(said) == 1


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_stops_and_leaves_the_last_one(tmp_path, said, monkeypatch, at):
    """Whichever of its four files is the first that finds no room."""
    save(tmp_path, 1)
    fsync, done = os.fsync, []

    def full(descriptor):
        done.append(descriptor)
        if len(done) > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stopped, match=r"epoch-00002 \(No space left on device\); last good .*epoch-00001"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001"]
    assert latest_epoch(tmp_path, said.append) == 1


def test_ctrl_c_inside_a_save_stays_a_ctrl_c(tmp_path, monkeypatch):
    """torch.distributed.checkpoint catches it and raises something else."""

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)


def test_a_half_written_one_is_never_seen(tmp_path, said):
    """What a kill in the middle of a write leaves."""
    save(tmp_path, 1)
    (tmp_path / ".epoch-00002.partial").mkdir()
    (tmp_path / ".epoch-00002.partial" / "__0_0.distcp").write_bytes(b"half")
    assert latest_epoch(tmp_path, said.append) == 1 and not said
    save(tmp_path, 2)
    assert latest_epoch(tmp_path, said.append) == 2
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
