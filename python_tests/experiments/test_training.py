"""`dnl train`: that it is the SGD it says it is, what it leaves behind, and how it stops."""

import functools
import sys

import pytest
import torch
from torch import nn

from dnl_kernels import theory
from dnl_kernels.experiments import checkpoint, cli, data, metrics, model, run
from dnl_kernels.experiments.config import Config
from dnl_kernels.experiments.ranks import Ranks

ALONE = Ranks(torch.device("cpu"))
SMALL = "--limit 40 --batch-size 16 --epochs 2 --repeats 2 --depths 1 2 --threads 1".split()


def dnl(*words):
    return cli.main([str(word) for word in words])


def read(out):
    header, records = metrics.read(out / metrics.NAME)
    return header, [{k: v for k, v in r.items() if k not in TIMES} for r in records]


TIMES = ("seconds", "images_per_second", "share_of_matmul_rate")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert dnl("train", *SMALL, "--out", out) == 0
    return out


def test_the_files_of_a_sweep(swept):
    names = {path.name for path in swept.iterdir()}
    assert names == {"metrics.jsonl", "loss.png", "L1-repeat0", "L1-repeat1", "L2-repeat0", "L2-repeat1"}
    assert (swept / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoint.stored(swept / "L1-repeat0")] == ["epoch-00002", "epoch-00001"]


def test_the_metrics_are_settings_then_one_line_per_epoch(swept):
    header, records = read(swept)
    assert header["config"]["lr"] == 0.01 and header["seed"] == 0 and header["images"] == 40
    assert header["versions"]["torch"] == torch.__version__
    keys = [(r["depth"], r["repeat"], r["epoch"]) for r in records]
    assert keys == [(d, r, e) for d in (1, 2) for r in (0, 1) for e in (1, 2)]
    assert all(0 < r["train_loss"] < 5 for r in records)
    assert records[0]["parameters"] < records[-1]["parameters"]


def test_training_is_plain_sgd(swept, contents):
    """The recorded losses and the stored weights are those of a loop written out here."""
    config = Config(limit=40, batch_size=16, epochs=2, repeats=2, depths=(1, 2))
    images = data.load("digits", limit=40)
    torch.manual_seed(run.derive(0, 2, 1))
    network = model.build(config, 2, images)
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for epoch in (1, 2):
        total = 0.0
        order = torch.randperm(40, generator=torch.Generator().manual_seed(run.derive(0, 1, epoch)))
        for batch in (order[:16], order[16:32], order[32:]):
            x = images.images[batch].float() / 16
            loss = nn.functional.cross_entropy(network(x), images.labels[batch])
            total += loss.item() * len(batch)
            for v, p, g in zip(
                velocity, network.parameters(), torch.autograd.grad(loss, [*network.parameters()]), strict=True
            ):
                v.mul_(0.9).add_(g)
                p.data.sub_(0.01 * v)
        (record,) = [r for r in read(swept)[1] if (r["depth"], r["repeat"], r["epoch"]) == (2, 1, epoch)]
        assert record["train_loss"] == pytest.approx(total / 40, rel=1e-5)
    stored = contents(swept / "L2-repeat1")["model"]
    for name, value in network.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(swept, tmp_path):
    assert dnl("train", *SMALL, "--out", tmp_path / "same") == 0
    assert read(tmp_path / "same")[1] == read(swept)[1]
    assert dnl("train", *SMALL, "--repeats", 1, "--depths", 1, "--seed", 1, "--out", tmp_path / "other") == 0
    assert read(tmp_path / "other")[1] != read(swept)[1][:2]


def test_a_finished_sweep_can_be_extended(swept, tmp_path):
    """More epochs, repeats and depths later are the same as all at once."""
    out = tmp_path / "grown"
    assert dnl("train", *SMALL, "--epochs", 1, "--repeats", 1, "--depths", 2, "--out", out) == 0
    assert dnl("train", *SMALL, "--resume", "--out", out) == 0
    assert read(out)[1] == read(swept)[1]
    assert dnl("train", *SMALL, "--depths", 1, "--resume", "--out", out) == 0  # what is there stays
    assert read(out)[1] == read(swept)[1]


def test_a_sweep_is_not_overwritten_nor_mixed(swept, capsys):
    before = (swept / "metrics.jsonl").read_bytes()
    assert dnl("train", *SMALL, "--out", swept) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert dnl("train", *SMALL, "--lr", 0.5, "--resume", "--out", swept) == 2
    assert "lr = 0.01, not 0.5" in capsys.readouterr().err
    assert (swept / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over(swept, tmp_path, capsys):
    out = tmp_path / "damaged"
    words = ["train", *SMALL, "--depths", 1, "--repeats", 1, "--out", out]
    assert dnl(*words) == 0
    path = out / "L1-repeat0" / "epoch-00002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert dnl(*words, "--resume") == 0
    assert "epoch-00002 is damaged" in capsys.readouterr().out
    assert read(out)[1] == read(swept)[1][:2]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_checkpoint(tmp_path, capsys, monkeypatch):
    words = ["train", *SMALL, "--depths", 1, "--repeats", 1, "--out", tmp_path / "nan"]
    assert dnl(*words, "--epochs", 1) == 0
    step = torch.optim.SGD.step
    steps = []

    def poison(self, *args, **options):
        steps.append(step(self, *args, **options))
        if len(steps) == 3:  # one of them with zero gradients, when the checkpoint is read
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", poison)
    capsys.readouterr()
    assert dnl(*words, "--resume") == 1
    message = capsys.readouterr().err
    assert "the loss became nan in step 3 of epoch 2 (L = 1, repeat 0)" in message and message.count("\n") == 1
    assert "epoch-00001" in message and len(read(tmp_path / "nan")[1]) == 1


def test_a_full_disk_stops_and_can_be_resumed(swept, tmp_path, capsys, monkeypatch):
    words = ["train", *SMALL, "--depths", 1, "--repeats", 1, "--out", tmp_path / "full"]
    save = checkpoint.save

    def full(folder, epoch, *state):
        with monkeypatch.context() as patch:
            if epoch == 2:
                patch.setattr(checkpoint.os, "fsync", raise_full)
            return save(folder, epoch, *state)

    def raise_full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert dnl(*words) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and "last good checkpoint" in message and "epoch-00001" in message
    assert dnl(*words, "--resume") == 0
    assert read(tmp_path / "full")[1] == read(swept)[1][:2]


def test_ctrl_c_says_how_to_go_on(swept, tmp_path, capsys, monkeypatch):
    words = ["train", *SMALL, "--depths", 1, "--repeats", 1, "--out", tmp_path / "interrupted"]

    def interrupt(self, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Watch, "begin", interrupt, raising=True)
        patch.setattr("dnl_kernels.experiments.screen.Screen.epoch", interrupt)
        assert dnl(*words) == 130
    assert "--resume continues" in capsys.readouterr().err
    assert dnl(*words, "--resume") == 0
    assert read(tmp_path / "interrupted")[1] == read(swept)[1][:2]


def test_evaluate_adds_test_loss_and_accuracy():
    images = data.load("digits", limit=30)
    network = model.build(Config(), 1, images)
    found = run.evaluate(network, images, ALONE)
    scores = network.eval()(images.images.float() / 16)
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(scores, images.labels).item(), rel=1e-5)
    assert found["test_accuracy"] == (scores.argmax(1) == images.labels).double().mean()


@pytest.mark.parametrize(
    "count, size, ranks, lengths", [(10, 4, 1, [4, 4, 2]), (9, 4, 1, [4, 5]), (10, 4, 2, [4, 6]), (1, 4, 1, [1])]
)
def test_batches_cover_every_image_once(count, size, ranks, lengths):
    found = run.batches(count, size, 0, ALONE._replace(size=ranks))
    assert [len(batch) for batch in found] == lengths
    assert torch.cat(list(found)).sort().values.tolist() == list(range(count))


def test_the_order_of_images_changes_from_epoch_to_epoch():
    orders = [run.batches(50, 50, run.derive(0, 0, epoch), ALONE)[0].tolist() for epoch in (1, 2)]
    assert orders[0] != orders[1] != list(range(50))


VARIANTS = {
    "softmax": "--kernel softmax",
    "gaussian": "--kernel gaussian --order post",
    "dot": "--kernel dot",
    "eq (1)": "--order post --input-skip --tau explicit",
    "post with norm": "--order post --norm batch",
    "reference": "--backend reference",
    "bfloat16": "--precision bfloat16",
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_variants_train(words, tmp_path):
    small = "--limit 64 --epochs 3 --repeats 1 --depths 2 --lr 0.05 --threads 1"
    assert dnl("train", *small.split(), *words.split(), "--out", tmp_path / "out") == 0
    losses = [r["train_loss"] for r in read(tmp_path / "out")[1]]
    assert losses[2] < losses[0]


def test_variants_are_the_networks_they_name():
    images = data.load("digits", limit=2)

    def block(**settings):
        return model.build(Config(**settings), 3, images).blocks[0].config

    assert (block().preactivation, block().norm, block().tau, block().kernel) == (True, "batch", 1, "local")
    eq1 = block(order="post", input_skip=True, tau="explicit")
    assert (eq1.preactivation, eq1.norm, eq1.tau, eq1.input_skip) == (False, None, 1 / 3, True)
    assert block(kernel="gaussian").kernel == "gaussian" and block(growth_rate=4).growth_rate == 4


@pytest.mark.slow
def test_runs_shared_by_processes_are_the_same_runs(swept, tmp_path):
    assert dnl("train", *SMALL, "--workers", 2, "--out", tmp_path / "shared") == 0
    assert read(tmp_path / "shared")[1] == read(swept)[1]


def test_the_regularizer_is_part_of_what_is_minimised(tmp_path, contents):
    """Its value is that of the stored blocks, and a larger weight makes it smaller."""
    small = "--limit 32 --epochs 2 --repeats 1 --depths 2 --threads 1".split()
    values = []
    for weight in (1e-6, 1e-4):
        out = tmp_path / str(weight)
        assert dnl("train", *small, "--regularizer", weight, "--out", out) == 0
        values.append(read(out)[1][-1]["regularizer"])
    network = model.build(Config(), 2, data.load("digits", limit=2))
    network.load_state_dict(contents(out / "L2-repeat0")["model"])
    assert values[1] == pytest.approx(sum(theory.regularizer(block).item() for block in network.blocks), rel=1e-5)
    assert values[1] < values[0]


def test_bad_variants_are_refused_before_training(tmp_path, capsys):
    assert dnl("train", "--workers", 0, "--out", tmp_path / "a") == 2
    assert "--workers is 0; expected a number >= 1" in capsys.readouterr().err
    assert dnl("train", "--data", "x", "--dataset", "cifar10", "--out", tmp_path / "b") == 2
    assert not (tmp_path / "b").exists()


def test_the_flops_of_a_network_by_hand():
    """Forward and backward of every convolution and of the classifier; the first convolution needs no dx."""
    images = data.load("digits", limit=2)
    network = model.build(Config(), 1, images)
    total, sizes = 0, {}
    hooks = [
        m.register_forward_hook(lambda m, i, o: sizes.__setitem__(m, o.shape))
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    network(images.images.float())
    for module, shape in sizes.items():
        macs = module.weight.numel() * shape[2:].numel()
        total += 2 * macs * (2 if not total else 3)
    assert hooks and model.flops(Config(), 1, images) >= total > 0


@pytest.mark.parametrize("words", ["--compile", "--channels-last"])
def test_what_changes_speed_only_trains_alike(words, swept, tmp_path, monkeypatch):
    """inductor compiles for minutes, and has its own tests of every operator: here the graph is captured and run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert dnl("train", *SMALL, "--depths", 1, "--repeats", 1, words, "--out", tmp_path / "c") == 0
    for mine, plain in zip(read(tmp_path / "c")[1], read(swept)[1][:2], strict=True):
        assert mine["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_tensorboard_has_the_losses(swept, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert dnl("train", *SMALL, "--depths", 1, "--repeats", 1, "--tensorboard", "--out", tmp_path / "board") == 0
    board = reader.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = [(point.step, point.value) for point in board.Scalars("train_loss/L1-repeat0")]
    assert shown == [(r["epoch"], pytest.approx(r["train_loss"], rel=1e-6)) for r in read(swept)[1][:2]]


def test_tensorboard_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert dnl("train", *SMALL, "--tensorboard", "--out", tmp_path / "board") == 2
    assert "pip install 'dnl_kernels[tensorboard]'" in capsys.readouterr().err


def test_a_learning_rate_that_diverges_stops(tmp_path, capsys):
    assert dnl("train", *SMALL, "--order", "post", "--lr", 1e30, "--out", tmp_path / "far") == 1
    assert "the loss became nan in step" in capsys.readouterr().err
