"""A dense attention network: eq. (1) of the paper with a softmax or Gaussian non-local operator in every layer."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import dnl_kernels as dnl


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=("softmax", "gaussian", "dot"), default="softmax")
    parser.add_argument("--layers", type=int, default=2, help="of each of the two blocks")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = slice(0, 1536), slice(1536, None)

    # y_l = tau sum_j K_{l,j} x_j + A_l x_0 + a_l, x_{l+1} = relu(BN(N(y_l) + y_l)), N over the 8 x 8 pixels
    model = dnl.DNLNet(
        1, 10, num_layers=[options.layers] * 2, growth_rate=8, kernel=options.kernel, heads=2, preactivation=False,
        residual=True, input_skip=True, tau="1/L",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(options.epochs):
        losses = []
        for batch in torch.randperm(train.stop).split(64):
            loss = cross_entropy(model.train()(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            right = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()
        print(f"epoch {epoch}: mean training loss {sum(losses) / len(losses):.3f}, test accuracy {right:.3f}")


if __name__ == "__main__":
    main()
