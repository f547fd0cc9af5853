"""`dnl.accelerate` on the networks of well-known packages: `python -m bench.accelerate` prints the table of
docs/accelerate.md, `python -m bench.accelerate MONAI timm` the rows whose names hold one of these words. Errors in
float64 on small images; memory and times in float32 on those that the name says: medians of alternating runs in one
process, with DNL_BENCH_THREADS threads (all by default). Of one thread it is the processor's time that counts, which
says something on a machine that other work shares too."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time

import torch
from torch import nn

import dnl_kernels as dnl


def densenet():
    import torchvision

    return torchvision.models.densenet121(num_classes=10)


def timm():
    from timm import create_model

    return create_model("densenet121", num_classes=10)


def monai():
    from monai.networks.nets import DenseNet121

    return DenseNet121(2, 1, 10)


def monai_volumes():
    from monai.networks.nets import DenseNet

    return DenseNet(3, 1, 2, init_features=16, growth_rate=8, block_config=(4, 8))


def xray():
    from torchxrayvision.models import DenseNet

    return DenseNet()


def segmentation():
    import segmentation_models_pytorch as smp

    return smp.Unet("densenet121", encoder_weights=None)


def spandrel():
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN(num_filters=64, num_blocks=2, scale=2)


def basicsr():
    import types

    from torchvision.transforms import functional

    # basicsr imports a module that torchvision has no more.
    gone = types.SimpleNamespace(rgb_to_grayscale=functional.rgb_to_grayscale)
    sys.modules.setdefault("torchvision.transforms.functional_tensor", gone)  # type: ignore[arg-type]
    from basicsr.archs.rrdbnet_arch import RRDBNet

    return RRDBNet(3, 3, num_feat=64, num_block=1, num_grow_ch=32)


def non_local(mode):
    from mmcv.cnn.bricks import NonLocal2d

    return nn.Sequential(NonLocal2d(64, zeros_init=False, mode=mode))


class Perceptron(nn.Module):
    """Densely connected linear maps, as people write them."""

    def __init__(self, channels=64, layers=12, growth=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels + i * growth, growth) for i in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, nn.functional.gelu(layer(x))], -1)
        return x


# name: the model, the shape of an input for the errors, that for memory and times
CASES = {
    "torchvision densenet121, 224 x 224, B = 2": (densenet, (2, 3, 64, 64), (2, 3, 224, 224)),
    "torchvision densenet121, 64 x 64, B = 2": (densenet, (2, 3, 64, 64), (2, 3, 64, 64)),
    "timm densenet121, 128 x 128, B = 2": (timm, (2, 3, 64, 64), (2, 3, 128, 128)),
    "MONAI DenseNet121, 2-d, 128 x 128, B = 2": (monai, (2, 1, 64, 64), (2, 1, 128, 128)),
    "MONAI DenseNet, 3-d, 12 layers, 32^3, B = 2": (monai_volumes, (2, 1, 24, 24, 24), (2, 1, 32, 32, 32)),
    "torchxrayvision DenseNet, 128 x 128, B = 2": (xray, (2, 1, 64, 64), (2, 1, 128, 128)),
    "segmentation_models_pytorch Unet densenet121, 128 x 128": (segmentation, (1, 3, 64, 64), (1, 3, 128, 128)),
    "spandrel RRDB, 64 filters, 2 blocks, 64 x 64": (spandrel, (1, 3, 16, 16), (1, 3, 64, 64)),
    "BasicSR RRDBNet, 64 filters, 1 block, 64 x 64": (basicsr, (1, 3, 16, 16), (1, 3, 64, 64)),
    "mmcv NonLocal2d, softmax, 64 channels, 40 x 40, B = 2": (
        lambda: non_local("embedded_gaussian"), (2, 64, 12, 12), (2, 64, 40, 40),
    ),
    "mmcv NonLocal2d, dot product, 64 channels, 40 x 40, B = 2": (
        lambda: non_local("dot_product"), (2, 64, 12, 12), (2, 64, 40, 40),
    ),
    "linear maps in a list, 12 layers of 64, 1024 rows": (lambda: nn.Sequential(Perceptron()), (9, 64), (1024, 64)),
}  # fmt: skip


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


def ratio(ways, x, run, rounds: int = 5, seconds: float = 1.0) -> float:
    """Time of the first way over that of the second: at least so many rounds, and for so long."""
    times: list[list[float]] = [[] for _ in ways]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while len(times[0]) <= rounds or time.perf_counter() < end:
        for way, spent in zip(ways, times, strict=True):
            start = clock()
            run(way, x)
            spent.append(clock() - start)
    plain, fast = (statistics.median(spent[1:]) for spent in times)
    return plain / fast


def evaluate(model, x):
    with torch.no_grad():
        return model(x)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("DNL_BENCH_THREADS", torch.get_num_threads())))
    words = sys.argv[1:]
    print("| network | accelerated | evaluation | training | kept, MiB | step | evaluation |")
    print("|---|---|---|---|---|---|---|")
    for name, (make, small, shape) in CASES.items():
        if words and not any(word in name for word in words):
            continue
        torch.manual_seed(0)
        try:
            plain = make()
        except ImportError as error:
            print(f"| {name} | not installed: {error.name} | | | | | |")
            continue
        fast = copy.deepcopy(plain)
        report = dnl.accelerate(fast, report=True)
        wide = [copy.deepcopy(model).double() for model in (plain, fast)]
        x = torch.rand(small, dtype=torch.float64)
        with torch.no_grad():
            evaluation = worst(*([m.eval()(x)] for m in reversed(wide)))
        training = worst(*(step(m.train(), x) for m in reversed(wide)))
        x = torch.rand(shape)
        memory = [kept(model.train(), x) for model in (plain, fast)]
        steps = ratio([plain.train(), fast.train()], x, step)
        forward = ratio([plain.eval(), fast.eval()], x, evaluate)
        print(f"| {name} | {len(report.accelerated)} of {len(report)} | {evaluation:.0e} | {training:.0e} "
              f"| {memory[1]:.1f} / {memory[0]:.1f} | {steps:.2f} | {forward:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
