"""The settings of a sweep: one table that the command line, the configuration files and the checks are made from."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import math
import operator
import pathlib
from typing import Any

from .errors import UsageError, require

LIMITS = {"above": (">", operator.gt), "at_least": (">=", operator.ge), "below": ("<", operator.lt)}
METAVAR = {int: "N", float: "X", str: "DIR"}
DEPTHS = (2, 4, 8, 16)
DATASETS = ("digits", "fashion-mnist", "cifar10", "svhn")


def option(default: Any, help: str, *, kind: type, same: bool = True, **checks: Any) -> Any:
    """A setting. same: a resumed run must have the same value. checks: choices, above, at_least, below, many."""
    metadata = {"help": help, "kind": kind, "same": same, "checks": checks}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """A depth sweep: for every depth L and repeat, the paper's network of four blocks of L layers, trained by SGD."""

    dataset: str = option("digits", "what to train on", kind=str, choices=DATASETS)
    data: str | None = option(None, "folder with the files of the data set", kind=str, same=False)
    limit: int | None = option(None, "train on the first N images only", kind=int, at_least=2)
    depths: tuple[int, ...] = option(DEPTHS, "layers L per block", kind=int, many=True, same=False, at_least=1)
    cascade: tuple[int, ...] | None = option(
        None,
        "train shallow first: layers per block, each twice the one before; the last is --depths",
        kind=int,
        many=True,
        at_least=2,
    )
    cascade_epochs: int = option(1, "epochs on each level of --cascade but the last", kind=int, at_least=1)
    growth_rate: int = option(6, "channels that a layer adds", kind=int, at_least=1)
    epochs: int = option(6, "passes over the images", kind=int, same=False, at_least=1)
    repeats: int = option(3, "independent runs per depth", kind=int, same=False, at_least=1)
    batch_size: int = option(64, "images per step, over all processes", kind=int, at_least=2)
    lr: float = option(0.01, "learning rate, constant", kind=float, above=0)
    momentum: float = option(0.9, "momentum of SGD", kind=float, at_least=0, below=1)
    seed: int = option(0, "decides initial weights and order of the images", kind=int, at_least=0)
    kernel: str = option(
        "local", "the operator N of a layer", kind=str, choices=("local", "softmax", "gaussian", "dot")
    )
    order: str = option(
        "pre", "pre: BN-act-conv (DenseNet). post: conv-N-BN-act (eq. (1))", kind=str, choices=("pre", "post")
    )
    norm: str | None = option(
        None,
        "normalisation; where not given, batch for order pre and none for post",
        kind=str,
        choices=("batch", "none"),
    )
    input_skip: bool = option(False, "add A_l x_0 to every layer, as eq. (1) has it", kind=bool)
    tau: str = option("absorbed", "train W = tau K, or K with tau = 1/L", kind=str, choices=("absorbed", "explicit"))
    regularizer: float = option(0.0, "weight of the regularizer of eq. (5)", kind=float, at_least=0)
    precision: str = option(
        "float32", "bfloat16: autocast, weights stay float32", kind=str, choices=("float32", "bfloat16")
    )
    compile: bool = option(False, "torch.compile the network", kind=bool)
    channels_last: bool = option(False, "images and weights with channels innermost in memory", kind=bool)
    backend: str | None = option(
        None, "kernels to use, best available where not given", kind=str, choices=("reference", "cpu", "triton", "cuda")
    )
    parallel: str = option(
        "ddp",
        "under torchrun: weights whole on every rank, or sharded (FSDP2)",
        kind=str,
        same=False,
        choices=("ddp", "fsdp"),
    )
    device: str = option("cpu", "cpu or cuda", kind=str, same=False, choices=("cpu", "cuda"))
    threads: int | None = option(None, "CPU threads, torch's choice where not given", kind=int, same=False, at_least=1)
    evaluate: bool = option(False, "also measure loss and accuracy on the test split", kind=bool)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if self.norm is None:
            object.__setattr__(self, "norm", "batch" if self.order == "pre" else "none")
        if self.cascade is not None:
            self._check_cascade(self.cascade)
        if self.regularizer and min(self.depths) < 2:
            raise UsageError("--regularizer needs differences between layers; expected --depths of at least 2 with it")

    def _check_cascade(self, levels: tuple[int, ...]) -> None:
        if any(b != 2 * a for a, b in zip(levels[:-1], levels[1:], strict=True)) or len(levels) < 2:
            raise UsageError(f"--cascade is {' '.join(map(str, levels))}; expected levels that double, as 2 4 8 16")
        if self.depths not in (DEPTHS, levels[-1:]):
            raise UsageError(
                f"--depths is {' '.join(map(str, self.depths))}; expected {levels[-1]}, where --cascade ends"
            )
        if self.compile or self.parallel != "ddp":
            raise UsageError("--cascade changes the network while it trains; expected no --compile and no --parallel")
        object.__setattr__(self, "depths", levels[-1:])

    def layers(self, depth: int, epoch: int) -> int:
        """Layers per block of a run of `depth` in this epoch (from 1): fewer while a cascade is on its way."""
        if self.cascade is None:
            return depth
        return self.cascade[min((epoch - 1) // self.cascade_epochs, len(self.cascade) - 1)]

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["same"]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def check_same(self, stored: dict[str, Any], where: object) -> None:
        """Raises where `stored`, the settings of the run found at `where`, are not those of this one."""
        for name, value in self.fixed().items():
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            if stored.get(name, default) != value:  # a setting that came later had its default
                raise UsageError(
                    f"{where} was made with {name} = {stored.get(name)}, not {value}; choose another --out"
                )


def check(field: dataclasses.Field, given: Any) -> None:
    """The value has the kind and lies in the range of its field."""
    kind, checks = field.metadata["kind"], field.metadata["checks"]
    flag = "--" + field.name.replace("_", "-")
    if given is None and field.default is None:
        return
    if checks.get("many"):
        if not isinstance(given, tuple) or not given or len(set(given)) < len(given):
            raise UsageError(f"{flag} is {given}; expected a list of different numbers")
    for value in given if checks.get("many") else (given,):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) if kind is float else type(value) is kind):
            raise UsageError(f"{flag} is {value!r}; expected a value of type {kind.__name__}")
        if "choices" in checks and value not in checks["choices"]:
            raise UsageError(f"{flag} is {value!r}; expected one of {', '.join(checks['choices'])}")
        for name, (symbol, holds) in LIMITS.items():
            if name in checks and not holds(value, checks[name]):
                raise UsageError(f"{flag} is {value}; expected a number {symbol} {checks[name]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=f"settings from a TOML file, or one of {', '.join(shipped())}")
    for field in dataclasses.fields(Config):
        checks, kind = field.metadata["checks"], field.metadata["kind"]
        how: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {shown(field)})",
        }
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": kind, "choices": checks.get("choices"), "nargs": "+" if checks.get("many") else None}
            how["metavar"] = None if "choices" in checks else METAVAR[kind]
        parser.add_argument("--" + field.name.replace("_", "-"), **how)


def shown(field: dataclasses.Field) -> str:
    return " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)


def from_arguments(args: argparse.Namespace) -> Config:
    """Defaults, then the configuration file, then what the command line says."""
    names = {field.name for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = read(args.config) if args.config else {}
    settings |= {name: value for name, value in vars(args).items() if name in names}
    for name in ("depths", "cascade"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    return Config(**settings)


def folder() -> Any:
    return importlib.resources.files(__package__) / "configs"


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder().iterdir() if entry.name.endswith(".toml"))


def read(name: str) -> dict[str, Any]:
    """The settings in a shipped configuration or in a TOML file."""
    source = folder() / f"{name}.toml" if name in shipped() else pathlib.Path(name)
    if not source.is_file():
        raise UsageError(f"--config {name} is no file and no shipped configuration; expected {', '.join(shipped())}")
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        toml = require("tomli")
    try:
        settings = toml.loads(source.read_text())
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {name} is not TOML: {error}") from error
    if unknown := sorted(settings.keys() - {field.name for field in dataclasses.fields(Config)}):
        raise UsageError(f"--config {name} sets {unknown[0]}, which is no setting of dnl train")
    return settings
