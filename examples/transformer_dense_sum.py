"""A small causal transformer in which every block reads a learned sum of all earlier states (DenseSum).

The task is to repeat a sequence: the second half of every line is its first half.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import dnl_kernels as dnl


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, vocabulary, length, width=48, heads=4, layers=3):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 10)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.mix = dnl.DenseSum(layers + 1)  # one sum in front of every block, one in front of the head
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        history = self.mix.history(self.token(tokens) + self.position[: tokens.shape[1]])
        for block in self.blocks:
            history.append(block(self.mix(history)))
        return self.head(self.mix(history))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)

    half = options.length // 2
    model = Transformer(vocabulary=8, length=2 * half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(options.steps):
        line = torch.randint(0, 8, (16, half)).repeat(1, 2)
        logits = model(line[:, :-1])[:, half - 1 :]  # only the second half can be known
        loss = cross_entropy(logits.flatten(0, 1), line[:, half:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    print("weights of the sums (row: call, column: state)")
    for row in model.mix.weight.tolist():
        print(" ".join(f"{w:6.2f}" for w in row))


if __name__ == "__main__":
    main()
