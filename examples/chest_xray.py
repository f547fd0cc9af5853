"""Classify chest X-rays with torchxrayvision's DenseNet, accelerated. Random weights unless --weights names some."""

import argparse

import torch
import torchxrayvision as xrv
from skimage import data, transform

import dnl_kernels as dnl


def pictures():
    """Grey pictures of a package in place of X-rays, [B, 1, 224, 224] in the range that torchxrayvision wants."""
    images = [transform.resize(image, (224, 224)) for image in (data.camera(), data.coins(), data.moon())]
    return torch.stack([torch.as_tensor(image * 2048 - 1024).float()[None] for image in images])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="of torchxrayvision, for example densenet121-res224-all; downloaded")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = xrv.models.DenseNet(weights=options.weights, apply_sigmoid=True).eval()
    x = pictures()
    with torch.no_grad():
        expected = model(x)
        print(dnl.accelerate(model, report=True))
        probabilities = model(x)
    for name, row in zip(model.targets, probabilities.T.tolist(), strict=True):
        print(f"{name:28}", *(f"{p:.3f}" for p in row))
    print(f"largest difference: {(probabilities - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
