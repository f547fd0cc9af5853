"""Fine-tune an accelerated DenseNet with frozen batch norm and recomputed blocks: statistics stay, memory shrinks."""

import argparse

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import DenseNet

import dnl_kernels as dnl


class Recomputed(nn.Module):
    """Activation checkpointing of one block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = DenseNet(growth_rate=12, block_config=(4, 4, 4, 4), num_init_features=24, num_classes=2)
    print(dnl.accelerate(model, report=True))
    features = model.features
    for name in ("denseblock1", "denseblock2"):
        setattr(features, name, Recomputed(getattr(features, name)))

    model.train()
    for module in model.modules():  # all norms but the last, as in FixRes
        if isinstance(module, nn.BatchNorm2d) and module is not features.norm5:
            module.eval().requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02, momentum=0.9)
    for step in range(options.steps):
        labels = torch.arange(8) % 2
        images = torch.rand(8, 3, 64, 64) + 0.5 * labels[:, None, None, None]  # dark and bright ones
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    print("statistics that moved:", ", ".join(moved))


if __name__ == "__main__":
    main()
