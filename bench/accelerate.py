"""`dnl.accelerate` on the networks of well-known packages: `python -m bench.accelerate` prints the table of
docs/accelerate.md. Errors in float64; memory and times in float32: processor time of one thread, alternating, medians.
Not a timing on a quiet machine: bench/test_networks.py has those."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

import dnl_kernels as dnl


def densenet():
    import torchvision

    return torchvision.models.densenet121(num_classes=10), (2, 3, 64, 64)


def timm():
    from timm import create_model

    return create_model("densenet121", num_classes=10), (2, 3, 64, 64)


def monai():
    from monai.networks.nets import DenseNet

    return DenseNet(3, 1, 2, init_features=16, growth_rate=8, block_config=(4, 8)), (2, 1, 24, 24, 24)


def xray():
    from torchxrayvision.models import DenseNet

    return DenseNet(), (2, 1, 64, 64)


def segmentation():
    import segmentation_models_pytorch as smp

    return smp.Unet("densenet121", encoder_weights=None), (1, 3, 64, 64)


def spandrel():
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN(num_filters=64, num_blocks=2, scale=2), (1, 3, 32, 32)


def non_local():
    from mmcv.cnn.bricks import NonLocal2d

    return nn.Sequential(NonLocal2d(64, zeros_init=False)), (2, 64, 40, 40)


CASES = {
    "torchvision densenet121, 64 x 64, B = 2": densenet,
    "timm densenet121, 64 x 64, B = 2": timm,
    "MONAI DenseNet 3-d, 12 layers, 24^3, B = 2": monai,
    "torchxrayvision DenseNet, 64 x 64, B = 2": xray,
    "segmentation_models_pytorch Unet densenet121, 64 x 64": segmentation,
    "spandrel RRDB, 64 filters, 2 blocks, 32 x 32": spandrel,
    "mmcv NonLocal2d, 64 channels, 40 x 40, B = 2": non_local,
}


def step(model, x):
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def worst(found, expected) -> float:
    largest = max(float(e.abs().max()) for e in expected)
    return max(
        float((f - e).abs().max()) / max(float(e.abs().max()), 1e-6 * largest)
        for f, e in zip(found, expected, strict=True)
    )


def kept(model, x) -> float:
    """MiB that a training forward pass keeps besides the parameters."""
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    for parameter in model.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(size for size, _ in found.values()) / 2**20


def ratio(ways, x, run, rounds: int = 5) -> float:
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, spent in zip(ways, times, strict=True):
            start = time.process_time()
            run(way, x)
            spent.append(time.process_time() - start)
    plain, fast = (statistics.median(spent[1:]) for spent in times)
    return plain / fast


def evaluate(model, x):
    with torch.no_grad():
        return model(x)


def main() -> None:
    torch.set_num_threads(1)
    print("| network | accelerated | evaluation | training | kept, MiB | step | evaluation |")
    print("|---|---|---|---|---|---|---|")
    for name, make in CASES.items():
        torch.manual_seed(0)
        try:
            plain, shape = make()
        except ImportError as error:
            print(f"| {name} | not installed: {error.name} | | | | | |")
            continue
        fast = copy.deepcopy(plain)
        report = dnl.accelerate(fast, report=True)
        x = torch.rand(shape)
        wide = [copy.deepcopy(model).double() for model in (plain, fast)]
        with torch.no_grad():
            evaluation = worst(*([m.eval()(x.double())] for m in reversed(wide)))
        training = worst(*(step(m.train(), x.double()) for m in reversed(wide)))
        memory = [kept(model.train(), x) for model in (plain, fast)]
        steps = ratio([plain.train(), fast.train()], x, step)
        forward = ratio([plain.eval(), fast.eval()], x, evaluate)
        print(f"| {name} | {len(report.accelerated)} of {len(report)} | {evaluation:.0e} | {training:.0e} "
              f"| {memory[1]:.1f} / {memory[0]:.1f} | {steps:.2f} | {forward:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
