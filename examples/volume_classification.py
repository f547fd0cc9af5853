"""Train MONAI's 3-d DenseNet, accelerated, to tell balls from boxes in small synthetic volumes."""

import argparse

import torch
from monai.networks.nets import DenseNet

import dnl_kernels as dnl


def volumes(count, size=16):
    """Noisy volumes [B, 1, size, size, size] with a ball (label 0) or a box (label 1) somewhere."""
    labels = torch.arange(count) % 2
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")).float()
    centres, radii = torch.randint(6, size - 5, (count, 3, 1, 1, 1)), torch.randint(3, 6, (count, 1, 1, 1))
    away = (grid - centres).abs()
    inside = torch.where(labels[:, None, None, None] == 0, away.norm(dim=1), away.amax(1) * 1.2) < radii
    return inside[:, None] + 0.3 * torch.randn(count, 1, size, size, size), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = DenseNet(spatial_dims=3, in_channels=1, out_channels=2, init_features=8, growth_rate=4, block_config=(3, 3))
    print(dnl.accelerate(model, report=True))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(options.steps):
        x, labels = volumes(16)
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    x, labels = volumes(64)
    with torch.no_grad():
        print(f"accuracy on new volumes: {(model.eval()(x).argmax(1) == labels).float().mean().item():.2f}")


if __name__ == "__main__":
    main()
