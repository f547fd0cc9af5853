"""Accelerate a torchvision DenseNet in place: the same network, less kept for the backward pass, and back again."""

import argparse
import copy

import torch
from torchvision.models import densenet121

import dnl_kernels as dnl


def saved_for_backward(model, images):
    """The logits of a training forward pass, and the MiB that it keeps besides the parameters."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return logits, sum(kept.values()) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)

    original = densenet121(weights=None)  # or one with trained weights
    model = copy.deepcopy(original)  # for the comparison
    print(dnl.accelerate(model, report=True))

    images = torch.rand(options.batch, 3, options.size, options.size)
    with torch.no_grad():
        difference = (original.eval()(images) - model.eval()(images)).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    for name, network in (("torchvision", original.train()), ("accelerated", model.train())):
        logits, mebibytes = saved_for_backward(network, images)
        logits.sum().backward()
        print(f"{name:12} keeps {mebibytes:6.1f} MiB for backward")
    print("restored:", type(dnl.restore(model).features.denseblock1) is type(original.features.denseblock1))


if __name__ == "__main__":
    main()
