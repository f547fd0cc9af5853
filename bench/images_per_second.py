"""Images/s of a training step of the paper's network on 28 x 28 images, against the same network in plain torch.

CPU time of one thread, alternating. python bench/images_per_second.py --case DEPTH BATCH [--case DEPTH BATCH ...]
"""

import argparse
import time

import harness
import torch
from test_dnl_block import PlainBlock
from torch import nn

from dnl_kernels.nn import DNLNet


def network(depth, plain=False):
    net = DNLNet.paper(num_layers=depth, in_channels=1)
    if plain:
        configs = [block.config for block in net.blocks]
        net.blocks = nn.ModuleList(PlainBlock(c.in_channels, c.num_layers, c.growth_rate) for c in configs)
    return net


def step(net, images, labels):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def run():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, type=int, action="append", required=True, metavar=("DEPTH", "BATCH"))
    torch.set_num_threads(1)
    for depth, batch in parser.parse_args().case:
        x, labels = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
        last = {"memory_format": torch.channels_last}
        steps = {
            "ours": step(network(depth), x, labels),
            "plain": step(network(depth, plain=True), x, labels),
            "ours, channels_last": step(network(depth).to(**last), x.contiguous(**last), labels),
        }
        times = harness.alternate(steps, rounds=3, clock=time.process_time)
        rates = {name: f"{batch / t:.1f}" for name, t in times.items()}
        print(f"L = {depth}, batch {batch}: images/s {rates}; ours / plain {times['plain'] / times['ours']:.2f}")


if __name__ == "__main__":
    main()
