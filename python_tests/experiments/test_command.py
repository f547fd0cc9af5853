"""The `dnl` command: its commands, its settings, and that bad arguments end in one line and exit code 2."""

import importlib.resources
import subprocess
import sys

import pytest

from dnl_kernels.experiments import cli, config
from dnl_kernels.experiments.config import Config
from dnl_kernels.experiments.errors import Stopped, UsageError, require


def parsed(*words):
    parser = cli.Parser()
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args(words))


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_overview_lists_every_command(argv, capsys):
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["train", "report", "info"])
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: dnl {name}" in capsys.readouterr().out


def test_info_runs(capsys):
    assert cli.main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "'trian' is not a command; expected one of train"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train", "--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["train", "--depths"], "--depths: expected at least one argument"),
        (["train", "--depths", "2", "2"], "--depths is (2, 2); expected a list of different numbers"),
        (["train", "--depths", "0"], "--depths is 0; expected a number >= 1"),
        (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "--epochs is 0; expected a number >= 1"),
        (["train", "--batch-size", "1"], "--batch-size is 1; expected a number >= 2"),
        (["train", "--lr", "0"], "--lr is 0.0; expected a number > 0"),
        (["train", "--lr", "inf"], "--lr is inf; expected a value of type float"),
        (["train", "--momentum", "1"], "--momentum is 1.0; expected a number < 1"),
        (["train", "--seed", "-1"], "--seed is -1; expected a number >= 0"),
        (["train", "--config", "absent"], "--config absent is no file and no shipped configuration; expected paper-"),
        (["train", "--regularizer", "1", "--depths", "1", "2"], "expected --depths of at least 2"),
        (["report"], "the following arguments are required: DIR"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_command_that_is_not_there_says_so(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "report", ("dnl_kernels.experiments.absent", ""))
    assert cli.main(["report"]) == 2
    assert "no such command" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, words",
    [(UsageError("a"), 2, "a\n"), (Stopped("b"), 1, "b\n"), (KeyboardInterrupt("c"), 130, "interrupted; c\n")],
)
def test_exit_codes(error, code, words, monkeypatch, capsys):
    def fail(name, rest):
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == f"dnl train: {words}"


def test_a_missing_package_names_its_extra():
    with pytest.raises(UsageError, match=r"surely_absent is not installed; pip install 'dnl_kernels\[vision\]'"):
        require("surely_absent.part", "vision")


def test_defaults_are_the_papers():
    found = parsed()
    assert (found.growth_rate, found.lr, found.momentum, found.tau, found.order) == (6, 0.01, 0.9, "absorbed", "pre")
    assert found.dataset == "digits" and found.regularizer == 0


@pytest.mark.parametrize("order, norm", [("pre", "batch"), ("post", "none")])
def test_norm_follows_the_order_unless_given(order, norm):
    assert Config(order=order).norm == norm
    assert Config(order=order, norm="batch").norm == "batch"


@pytest.mark.parametrize(
    "name, dataset, epochs", [("svhn", "svhn", 50), ("cifar10", "cifar10", 150), ("fashion-mnist",) * 2 + (50,)]
)
def test_the_papers_configurations(name, dataset, epochs):
    found = parsed("--config", f"paper-{name}")
    assert (found.dataset, found.epochs, found.repeats, found.depths) == (dataset, epochs, 5, (4, 8, 16, 32))
    assert (found.growth_rate, found.lr, found.momentum, found.norm, found.kernel) == (6, 0.01, 0.9, "batch", "local")


def test_the_command_line_overrides_the_file():
    found = parsed("--config", "paper-svhn", "--epochs", "3", "--depths", "1", "2", "--order", "post", "--compile")
    assert (found.epochs, found.depths, found.order, found.norm, found.compile) == (3, (1, 2), "post", "none", True)
    assert found.dataset == "svhn"


@pytest.mark.parametrize(
    "content, message",
    [
        ("epochs = ", "is not TOML"),
        ("epohcs = 3", "sets epohcs, which is no setting"),
        ("epochs = 2.5", "--epochs is 2.5; expected a value of type int"),
        ("epochs = true", "--epochs is True; expected a value of type int"),
        ('depths = "2"', "--depths is 2; expected a list"),
        ('order = "middle"', "--order is 'middle'; expected one of pre, post"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        parsed("--config", str(path))


def test_an_own_file_is_read(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('lr = 1\ndepths = [3]\nkernel = "gaussian"\n')
    found = parsed("--config", str(path))
    assert (found.lr, found.depths, found.kernel) == (1, (3,), "gaussian")


def test_a_resumed_run_must_have_the_same_settings():
    stored = Config(lr=0.1).fixed()
    Config(lr=0.1, epochs=9, depths=(7,), threads=1).check_same(stored, "there")
    with pytest.raises(UsageError, match="there was made with lr = 0.1, not 0.2; choose another --out"):
        Config(lr=0.2).check_same(stored, "there")


def test_the_configurations_are_package_data():
    names = [entry.name for entry in (importlib.resources.files("dnl_kernels.experiments") / "configs").iterdir()]
    assert sorted(name for name in names if name.endswith(".toml")) == [f"{name}.toml" for name in config.shipped()]
    assert len(config.shipped()) == 3


def test_the_overview_needs_no_plotting_packages():
    code = """if True:
        import sys, dnl_kernels.experiments.cli as cli
        cli.main(["--help"])
        print(sys.modules.keys() & {"matplotlib", "rich", "sklearn", "torchvision"})
    """
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("set()\n")
