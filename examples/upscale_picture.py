"""Upscale a picture of scikit-image twofold with spandrel's RRDB network, accelerated. Trained weights: --weights FILE;
without, a small network is trained for some steps on pieces of the picture."""

import argparse

import spandrel
import torch
from skimage import data
from spandrel.architectures.ESRGAN import ESRGAN
from torch.nn import functional as F

import dnl_kernels as dnl


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="a file that spandrel loads")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    picture = torch.as_tensor(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    if options.weights:
        model = spandrel.ModelLoader().load_from_file(options.weights).model
    else:
        model = ESRGAN(num_filters=16, num_blocks=2, scale=2)
    print(dnl.accelerate(model, report=True))

    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(0 if options.weights else options.steps):
        top, left = torch.randint(0, 448, (2,)).tolist()
        piece = picture[..., top : top + 64, left : left + 64]
        loss = F.l1_loss(model(F.avg_pool2d(piece, 2)), piece)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: mean error {loss.item():.3f}")

    low = F.avg_pool2d(picture[..., :128, 160:288], 2)
    with torch.no_grad():
        fast = model.eval()(low)
        plain = dnl.restore(model)(low)
    print(f"{list(low.shape)} -> {list(fast.shape)}, largest difference {(fast - plain).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
