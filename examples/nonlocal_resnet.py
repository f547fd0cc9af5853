"""Put a non-local block into a trained ResNet: it starts as the identity, and learns without the N x N matrix."""

import argparse

import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import dnl_kernels as dnl


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=("softmax", "gaussian", "dot"), default="gaussian")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)

    model = resnet18(num_classes=4).eval()
    images, labels = torch.rand(8, 3, options.size, options.size), torch.arange(8) % 4
    with torch.no_grad():
        before = model(images)

    channels = model.layer2[-1].conv2.out_channels
    model.layer2.append(dnl.NonLocal2d(channels, kernel=options.kernel).eval())
    with torch.no_grad():
        print(f"the logits change by {(model(images) - before).abs().max().item():.1e} when the block is put in")

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(options.steps):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
