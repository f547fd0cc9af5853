"""Replace the dense blocks of a torchvision DenseNet: the same network, less kept for the backward pass."""

import argparse
import copy

import torch
from torchvision.models import densenet121

from dnl_kernels.nn import convert_densenet


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

    original = densenet121(weights=None)  # or one with trained weights: they are copied
    converted = convert_densenet(copy.deepcopy(original))  # in place; the copy is for the comparison

    images = torch.rand(options.batch, 3, options.size, options.size)
    with torch.no_grad():
        difference = (original.eval()(images) - converted.eval()(images)).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    for name, model in (("torchvision", original.train()), ("converted", converted.train())):
        logits, mebibytes = saved_for_backward(model, images)
        logits.sum().backward()
        print(f"{name:12} keeps {mebibytes:6.1f} MiB for backward")


if __name__ == "__main__":
    main()
